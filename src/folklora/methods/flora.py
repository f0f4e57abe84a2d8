"""FLoRA: stack the clients' adapters, merge the stack, start afresh. arXiv 2409.05976 (Wang et al., NeurIPS 2024).

1. Client k trains A_k, B_k at a rank r_k of its own and sends both [code].
2. The server stacks: ``B = [B_1 ... B_K]`` beside each other, ``A = [p_1 A_1; ...; p_K A_K]`` below each other, so that
  ``B A = sum_k p_k B_k A_k`` without error. Only A is weighted [code].
3. Every client receives the stack and merges it into its frozen weights: ``W <- W + B A`` [code].
4. Every round begins with a fresh adapter, A random and B = 0 [code]; A is drawn from the seed and the round, so it is
  common to all and costs no byte [recon].

The rows of A_k carry s_k = alpha / r_k too, since ranks may differ [recon]. The head travels and is averaged as in
FedIT [recon]. A stack of K clients is K times a client's upload: downloads grow with the participants. Who was absent
gets all stacks it missed (`folklora.methods.residuals`), or the dense sum where that is smaller [recon].

With ``train.optimizer_state = "kept"`` the moments of the pair that was merged go on with the fresh one, of which they
know nothing: the default, fresh moments, is what the method means [recon].

The authors' repository misspells a variable in its FedIT branch, so that its "FedIT" is the first client alone; ours is
not. Since every round starts from scratch, many short rounds make the method look worse than it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from folklora.adapters.lowrank import Tensors, kaiming, kind
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import Method
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options
from folklora.methods.residuals import Changes, ResidualLog
from folklora.methods.work import Work
from folklora.randomness import torch_generator


class FLoRA(Method):
    """Stacks of all A and B, merged into the frozen weights in every round [paper]."""

    name = "flora"
    title = "FLoRA (stacks merged into the weights)"
    paper = "arXiv:2409.05976"
    mixed_ranks = True
    has_global_model = True
    takes_means = False
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal"})
    options_type = FedITOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.log = ResidualLog(context)

    def initial(self, client: str) -> Tensors:
        return {**super().initial(client), **self.log.zeros()}

    def fresh_factors(self, round: int, rank: int) -> Tensors:
        """What training starts from in a round."""
        factors: Tensors = {}
        for name, shape in self.adapter.shapes(rank).items():
            generator = torch_generator(self.context.seed, f"init/{name}", round=round)
            factors[name] = kaiming(shape, generator) if kind(name) == "A" else torch.zeros(shape)
        return factors

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        fresh = self.fresh_factors(round, self.adapter.rank(client.tensors))
        return tuple(replace(work, tensors={**work.tensors, **fresh}) for work in super().work(round, client))

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        known = {**super().known(round, client, told, message), **self.fresh_factors(round, self.context.ranks[client])}
        # B starts from zero, and what an upload lost of it belongs to an A that nobody has any more: no reference.
        return {name: tensor for name, tensor in known.items() if kind(name) != "B"}

    def repays(self, name: str) -> bool:
        return kind(name) not in {"A", "B"}  # what a merged pair lost is nothing to the next, fresh one

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        self.log.check(self.adapter, message)

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        changes = self._stacks(messages)
        others = [{n: t for n, t in m.tensors.items() if kind(n) not in {"A", "B"}} for m in messages.values()]
        mean = weighted_mean(others, self.weights(messages))
        state = {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}
        return self.log.extend(state, round, messages, changes)

    def _stacks(self, messages: Mapping[str, Message]) -> Changes:
        p = dict(zip(messages, self.weights(messages).tolist(), strict=True))
        # In the clients' order, so that the stack does not depend on who answered first.
        clients = [client for client in self.context.clients if client in messages]
        stacks = {}
        for site in self.context.sites:
            a = {client: messages[client].tensors[f"A/{site.name}"].double() for client in clients}
            weighted = [p[client] * self.adapter.scale(len(a[client])) * a[client] for client in clients]
            up = torch.cat([messages[client].tensors[f"B/{site.name}"] for client in clients], dim=1)
            stacks[site.name] = (up, torch.cat(weighted))
        return stacks

    def reply(self, state: State, client: str) -> Message | None:
        common = {name.removeprefix("global/"): t for name, t in state.items() if name.startswith("global/")}
        tensors = {**common, **self.log.missing(state, client)}
        return self.log.message(tensors) if tensors else None

    def receive(self, client: Client, message: Message) -> None:
        client.tensors.update(self.log.receive(client, message))
        # What the client trained is in the stack now, or it was refused: either way its adapter says nothing any more.
        client.tensors.update(self.initial_factors(client.id, self.adapter.rank(client.tensors)))

    def typical_reply(self, round: int, client: str) -> Message | None:
        own = {n: torch.zeros(s) for n, s in self.expected(round, {}, client).items() if kind(n) not in {"A", "B"}}
        return self.log.message({**own, **self.log.typical(round, sum(self.context.ranks.values()))})

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        model = super().global_model(state, client, tensors)
        if model is None:
            return None
        ours = {name: tensor for name, tensor in model.items() if name in tensors}
        return {**ours, **self.initial_factors(client, self.adapter.rank(tensors)), **self.log.total(state)}
