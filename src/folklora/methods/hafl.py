"""HAFL: each client trains the rank-1 pairs that matter most to it, as many as it can. arXiv 2411.06581 (HAFLQ).

A client's ``adapter.rank`` is its budget m_k; the server keeps R pairs per layer, R the largest budget.

1. Importance of a number, smoothed over local training: ``s(w) = I_bar U_bar`` with ``I = |w dL/dw|`` (see
   `folklora.methods.work.Trained`); of a pair: the mean of s over row i of A and column i of B [abstract].
2. ``scheme = "truncation"``: a client holds its top m_k pairs, an adapter of rank m_k. ``scheme = "freezing"``: all
   hold R pairs and client k trains only its top m_k, all others rest [abstract].
3. It sends what it trained: m_k rows of A, m_k columns of B, and which pairs those are, ``index/<site>`` [abstract].
4. Server, per pair, over the clients that sent it: ``a_i <- sum n_k a_ki / sum n_k``, b_i alike; a pair that nobody
   sent is unchanged [abstract].

What the abstract leaves open [recon]: a frozen client scores all R pairs, since gradients reach those that rest, and
chooses by itself. A truncated one cannot score what it does not hold, so the server chooses for it: the factors travel
in ascending order of pair and the indices most important first, which costs nothing and tells the server how each
client ranks its own. A pair's standing is the mean over its senders of 1 (first) down to 1 / m_k (last), kept until
somebody sends it again; the reply is the m_k pairs of highest standing. Before anything is known the choice is random,
from the seed and the client: while B = 0 every score is 0, and choosing the first pairs would leave the others at zero
for good. With ``train.optimizer_state = "kept"`` moments belong to a place in the adapter, where truncation may put
another pair: fresh moments are meant. HAFLQ's quantisations are not part of this file; ``message.dtype = "int8"`` is
the plain form.

Starts, scales and heads: see `folklora.methods.owners`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind
from folklora.errors import MessageError
from folklora.methods.base import blank
from folklora.methods.contract import Client, Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.owners import Chosen, Pairs, cut, owners_mean, side_by_side
from folklora.methods.work import Terms, Trained, Work
from folklora.randomness import torch_generator


class HAFLOptions(FedITOptions):
    scheme: Literal["truncation", "freezing"] = "truncation"


class HAFL(Pairs):
    """Averaging over the owners of each pair; clients own what matters to them."""

    name = "hafl"
    title = "HAFL (pairs by importance)"
    paper = "arXiv:2411.06581"
    options_type = HAFLOptions
    options: HAFLOptions

    @property
    def freezing(self) -> bool:
        return self.options.scheme == "freezing"

    def budget(self, client: str) -> int:
        """m_k."""
        return self.context.ranks[client]

    def rank(self, state: State, client: str) -> int:
        return self.most if self.freezing else self.budget(client)

    def held(self, client: str, rank: int) -> Chosen:
        if self.freezing:
            return {site.name: torch.arange(self.most) for site in self.context.sites}
        return self.first_choice(client)

    def first_choice(self, client: str) -> Chosen:
        """m_k pairs of each site at random, before anything is known of them."""
        return {
            site.name: torch.randperm(
                self.most, generator=torch_generator(self.context.seed, f"pairs/{site.name}", client)
            )[: self.budget(client)]
            .sort()
            .values
            for site in self.context.sites
        }

    # -- at the client -------------------------------------------------------------------------------------------

    def chosen(self, client: Client) -> Chosen:
        """The pairs that a client trains now: those it was given, or those it scored highest when it last trained."""
        if f"held/{self.context.sites[0].name}" in client.notes:
            return {site.name: client.notes[f"held/{site.name}"].long() for site in self.context.sites}
        if f"score/{self.context.sites[0].name}" in client.notes and self.freezing:
            return {
                site.name: best_first(client.notes[f"score/{site.name}"])[: self.budget(client.id)].sort().values
                for site in self.context.sites
            }
        return self.first_choice(client.id)

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        (work,) = super().work(round, client)
        masks = self.masks(client) if self.freezing else {}
        return (replace(work, terms=Terms(masks=masks, importance=True)),)

    def masks(self, client: Client) -> Tensors:
        """1 on the rows of A and columns of B that may move."""
        masks: Tensors = {}
        for site, pairs in self.chosen(client).items():
            for name in (f"A/{site}", f"B/{site}"):
                masks[name] = torch.zeros_like(client.tensors[name])
            masks[f"A/{site}"][pairs] = 1.0
            masks[f"B/{site}"][:, pairs] = 1.0
        return masks

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        chosen = self.chosen(client)  # by the scores before these
        super().learned(round, client, results)
        importance = results[""].importance
        for site in self.context.sites:
            score = side_by_side(importance, site, 1.0).mean(1)
            pairs = chosen[site.name]
            order = best_first(score[pairs] if self.freezing else score)
            client.notes[f"sent/{site.name}"] = pairs[order].int()
            if self.freezing:
                client.notes[f"score/{site.name}"] = score

    def send(self, round: int, client: Client) -> Message | None:
        message = super().send(round, client)
        assert message is not None  # pairs always travel
        index = {f"index/{site.name}": client.notes[f"sent/{site.name}"] for site in self.context.sites}
        tensors = {**message.tensors, **index}
        if self.freezing:
            factors = {name: client.tensors[name] for name in self.adapter.shapes(self.most)}
            tensors |= cut(
                factors, {site.name: index[f"index/{site.name}"].long().sort().values for site in self.context.sites}
            )
        return Message(tensors, message.numbers)

    def receive(self, client: Client, message: Message) -> None:
        """The reply's pairs take the place of those held."""
        for name, tensor in message.tensors.items():
            if name.startswith("index/"):
                client.notes[f"held/{name.removeprefix('index/')}"] = tensor
        super().receive(client, Message({n: t for n, t in message.tensors.items() if not n.startswith("index/")}))

    # -- at the server -------------------------------------------------------------------------------------------

    def expected(self, round: int, state: State, client: str) -> Shapes:
        budget = self.budget(client)
        index = {f"index/{site.name}": (budget,) for site in self.context.sites}
        return {**super().expected(round, state, client), **self.adapter.shapes(budget), **index}

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        for site in self.context.sites:
            index = message.tensors[f"index/{site.name}"]
            if len(index.unique()) < len(index) or int(index.min()) < 0 or int(index.max()) >= self.most:
                raise MessageError(
                    f"tensor 'index/{site.name}' names pairs {index.tolist()}; allowed: 0 to {self.most - 1}, each once"
                )

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        """Of the pairs both sides know, those the message holds."""
        known = dict(super().known(round, client, told, message))
        if self.freezing:
            self.check_update(round, {}, client, message)  # indices are used here before they would be looked at
            factors = {name: known[name] for name in self.adapter.shapes(self.most) if name in known}
            known |= cut(factors, self.owned({}, client, message))
        return known

    def owned(self, state: State, client: str, message: Message) -> Chosen:
        return {site.name: message.tensors[f"index/{site.name}"].long().sort().values for site in self.context.sites}

    def combine(self, values: Tensor, weights: Tensor, owned: Tensor, before: Tensor) -> Tensor:
        return owners_mean(values, weights, owned, before)

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        state = super().server(round, state, messages)
        if not self.freezing:
            for site in self.context.sites:
                name = f"standing/{site.name}"
                sent = [message.tensors[f"index/{site.name}"].long() for message in messages.values()]
                state[name] = standing(sent, state.get(name, torch.zeros(self.most)))
        return state

    def given(self, state: State, client: str) -> Chosen:
        if self.freezing:
            return super().given(state, client)
        return {
            site.name: best_first(state[f"standing/{site.name}"])[: self.budget(client)].sort().values
            for site in self.context.sites
        }

    def reply(self, state: State, client: str) -> Message | None:
        message = super().reply(state, client)
        if message is None or self.freezing or not self.aggregated(state):
            return message
        index = {f"index/{site}": pairs.int() for site, pairs in self.given(state, client).items()}
        return Message({**message.tensors, **index})

    def typical_reply(self, round: int, client: str) -> Message | None:
        message = super().typical_reply(round, client)
        if message is None or not self.freezing:
            return message
        others = {n: t for n, t in message.tensors.items() if kind(n) not in {"A", "B", "index"}}
        return Message({**others, **blank(self.adapter.shapes(self.most))})


def best_first(scores: Tensor) -> Tensor:
    """Indices by falling score; of equal ones the lower index first."""
    return torch.argsort(scores, descending=True, stable=True)


def standing(sent: Sequence[Tensor], before: Tensor) -> Tensor:
    """[R]: the mean over the senders of a pair of 1 where it came first of m, down to 1 / m where it came last.

    Parameters
    ----------
    sent
        Of each client the pairs it sent, most important first: [m_k] int64.
    before
        [R]: what holds for pairs that nobody sent.
    """
    total, senders = torch.zeros_like(before), torch.zeros_like(before)
    for index in sent:
        total[index] += torch.arange(len(index), 0, -1) / len(index)
        senders[index] += 1
    return torch.where(senders > 0, total / senders.clamp_min(1), before)
