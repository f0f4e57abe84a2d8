"""SCAFFOLD, for any method whose clients share one model: control variates against drift. arXiv 1910.06378 (ICML 2020).

Over the tensors that train in a round and travel; c is the server's control variate, c_k client k's, both 0 at first:

1. Every local step takes ``g_k(y) + c - c_k`` for the gradient [paper], added after clipping [recon].
2. After training from x to y_k in steps of size lr: ``c_k+ = c_k - c + (x - y_k) / (sum of lr)`` [paper, option II]:
  the mean gradient on the way.
3. The client sends y_k and ``dc = c_k+ - c_k``; the server takes plain means over those who took part, of the models
  too, since clients count alike in c [paper]: ``c <- c + |S| / N mean(dc)``. It sends c with the model.
4. In the paper's full participation c is the mean of all c_k. It stays so for good only if c_k moves where c moved: the
  server says with its reply which round it last heard of the client, and a client takes c_k+ over once it knows that
  its message counted [recon]. Otherwise one lost message would bend every later round.

Step 2 is true of plain gradient steps only, so momentum and AdamW are refused [paper: SGD]. Weight decay and clipping
are then part of the gradient that c_k estimates. A tensor that stays home has no common drift, and no control variate
[recon]. Clients count alike, so FedAWA, whose weights are learned, does not combine; nor does what averages other
tensors than those that train (RAVAN's products), or not all of them (owners of pairs) [recon]. What a narrow
``message.dtype`` or ``message.top_k`` loses of dc adds up in c, unless ``message.error_feedback`` makes up for it.

On the wire: ``control/<name>`` beside each tensor both ways, and the number ``heard`` down. At the client, in its
notes: ``control/c/<name>``, ``control/own/<name>`` (c_k), and dc with its round until it is acknowledged
(``control/sent/<name>``, ``control/round``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind
from folklora.errors import MethodError
from folklora.methods.base import Method, blank
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.options import Options
from folklora.methods.work import Trained, Work


class Scaffold(Method):
    """Stands before the method it is combined with, in one class; see `folklora.methods.build`."""

    takes_means = False  # it remembers who was heard

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if context.optimizer != "sgd" or context.momentum:
            raise MethodError(
                f"method.scaffold = true reads gradients off the way a client went, train.optimizer = "
                f'"{context.optimizer}" with train.momentum = {context.momentum:g}; allowed: "sgd" with momentum = 0'
            )
        if len(set(context.ranks.values())) > 1:
            raise MethodError(
                f"method.scaffold = true adds control variates up, adapter.rank has "
                f"{sorted(set(context.ranks.values()))}; allowed: one rank for all"
            )

    # -- at the client -------------------------------------------------------------------------------------------

    def work(self, round: int, client: Client) -> tuple[Work, ...]:
        works = super().work(round, client)
        return tuple(self._corrected(client, each) if each.branch == "" else each for each in works)

    def _corrected(self, client: Client, work: Work) -> Work:
        c, own = _of(client.notes, "control/c/"), _of(client.notes, "control/own/")
        # Adding c - c_k = 0 is adding nothing, and costs a matrix: so not before the server has said anything.
        correction = {n: c[n] - own.get(n, 0.0) for n in c if n in work.trained}
        return replace(work, terms=replace(work.terms, correction=correction))

    def learned(self, round: int, client: Client, results: Mapping[str, Trained]) -> None:
        c, trained = _of(client.notes, "control/c/"), results[""]
        notes = {n: t for n, t in client.notes.items() if not n.startswith("control/sent/")}
        for name, x in client.tensors.items():
            if kind(name) in self.drifting(round):
                way = (x.double() - trained.tensors[name].double()) / trained.way(name)
                notes[f"control/sent/{name}"] = (way - c[name].double() if name in c else way).float()
        notes["control/round"] = torch.tensor(round)
        client.notes = notes
        super().learned(round, client, results)

    def send(self, round: int, client: Client) -> Message | None:
        message = super().send(round, client)
        return None if message is None else _with(message, _of(client.notes, "control/sent/"))

    def known(self, round: int, client: str, told: Tensors, message: Message) -> Tensors:
        increments = {n: torch.zeros_like(t) for n, t in message.tensors.items() if kind(n) == "control"}
        return {**super().known(round, client, told, _without(message)), **increments}

    def receive(self, client: Client, message: Message) -> None:
        notes = dict(client.notes)
        notes |= {f"control/c/{name}": tensor for name, tensor in _of(message.tensors, "control/").items()}
        if "control/round" in notes and message.numbers.get("heard") == int(notes["control/round"]):
            for name, dc in _of(notes, "control/sent/").items():
                notes[f"control/own/{name}"] = notes.get(f"control/own/{name}", torch.zeros_like(dc)) + dc
                del notes[f"control/sent/{name}"]
            del notes["control/round"]
        client.notes = notes
        super().receive(client, _without(message))

    # -- at the server -------------------------------------------------------------------------------------------

    def expected(self, round: int, state: State, client: str) -> Shapes:
        shapes = super().expected(round, state, client)
        kinds = self.drifting(round)
        return {**shapes, **{f"control/{name}": shape for name, shape in shapes.items() if kind(name) in kinds}}

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        super().check_update(round, state, client, _without(message))

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        clients = self.context.clients
        models = {client: _without(message) for client, message in messages.items()}
        after = dict(super().server(round, state, models))
        told = [_of(message.tensors, "control/") for message in messages.values()]
        for name in told[0]:
            moved = torch.stack([dc[name].double() for dc in told]).sum(0) / len(clients)
            after[f"control/{name}"] = (moved + state.get(f"control/{name}", torch.zeros(())).double()).float()
        heard = state.get("heard", torch.zeros(len(clients), dtype=torch.int64)).clone()
        heard[[clients.index(client) for client in messages]] = round
        after["heard"] = heard
        return after

    def weights(self, messages: Mapping[str, Message]) -> Tensor:
        return torch.full((len(messages),), 1 / len(messages), dtype=torch.float64)

    @property
    def counts_examples(self) -> bool:
        return False

    def reply(self, state: State, client: str) -> Message | None:
        message = super().reply(state, client)
        place = self.context.clients.index(client)
        if message is None or place >= len(state.get("heard", ())):  # who joins late does not train
            return message
        heard = float(state["heard"][place])
        return replace(_with(message, _of(state, "control/")), numbers={**message.numbers, "heard": heard})

    def typical_reply(self, round: int, client: str) -> Message | None:
        message = super().typical_reply(round, client)
        if message is None:
            return None
        controls = blank({name: s for name, s in self.expected(round, {}, client).items() if kind(name) == "control"})
        return Message({**message.tensors, **controls}, {**message.numbers, "heard": 0.0}, message.encodings)

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        model = super().global_model(state, client, tensors)
        return None if model is None else {n: tensor for n, tensor in model.items() if kind(n) != "control"}


def _of(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with(message: Message, controls: Tensors) -> Message:
    return replace(message, tensors={**message.tensors, **{f"control/{name}": t for name, t in controls.items()}})


def _without(message: Message) -> Message:
    return replace(message, tensors={n: tensor for n, tensor in message.tensors.items() if kind(n) != "control"})
