"""Low-rank changes to the frozen weights that every client must make, and the log that brings the absent up to date.

FLoRA and FedEx-LoRA end a round by adding ``up @ down`` to the frozen weight of each site, everywhere. On the wire
these are factors; at a client they add up in ``base/<site>`` [d_out, d_in]. The server keeps the changes of past rounds
and sends each client those it has not confirmed: a message accepted in some round proves that its sender had received
everything before it. Who received more than the server knows (its upload was refused, a reply came twice) skips what is
not newer than its own ``version`` note. Where the missing factors weigh as much as the dense sum, that is sent instead.
Changes travel as float32 whatever ``message.dtype`` is: what rounding took from one would be missing from a client's
base for good, and bases would drift apart.

Names in the state (what travels is called the same, without ``log/``)::

    log/up/<round>/<site>      [d_out, R]   the change of one round, while it may still be sent
    log/down/<round>/<site>    [R, d_in]
    log/base/<site>            [d_out, d_in], all changes so far; sent as base/<round>/<site>
    log/round                  of the latest change
    log/heard                  [N] int64, clients in the order of the context: the latest change each has for certain
    log/cut                    [L] int64, of each site: the latest change that is in the log no more
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from folklora.adapters.lowrank import LowRank, Site, Tensors, kind
from folklora.errors import MessageError
from folklora.methods.contract import Client, Context, Message, State

VERSION = "version"
"""The client's note: the round of the latest change it has made."""

LARGEST = 1e30
"""Norm of one client's update: far beyond anything trained, and sums of many still fit float32."""

CHANGES = frozenset({"up", "down", "base"})
"""Kinds that only the log sends."""

Changes = Mapping[str, tuple[Tensor, Tensor]]
"""Site -> (up [d_out, R], down [R, d_in]), all scalings included."""


class ResidualLog:
    """Both ends of the log: the server's state and the client's ``base``."""

    def __init__(self, context: Context) -> None:
        self.sites = context.sites
        self.clients = context.clients

    # -- at the client -------------------------------------------------------------------------------------------

    def zeros(self) -> Tensors:
        """``base/<site>`` before anything happened."""
        return {f"base/{site.name}": torch.zeros(site.d_out, site.d_in) for site in self.sites}

    def receive(self, client: Client, message: Message) -> Tensors:
        """Make the changes that are new to this client; what else the message holds is returned."""
        news: dict[str, dict[int, Tensors]] = {}
        rest: Tensors = {}
        for name, tensor in message.tensors.items():
            if kind(name) not in CHANGES:
                rest[name] = tensor
                continue
            part, when, site = name.split("/", 2)
            news.setdefault(site, {}).setdefault(int(when), {})[part] = tensor
        version = latest = self.version(client)
        for site, changes in news.items():
            for round in sorted(round for round in changes if round > version):
                change = changes[round]
                old = client.tensors[f"base/{site}"]
                new = change["base"] if "base" in change else merged(old, change["up"], change["down"])
                client.tensors[f"base/{site}"] = new
                latest = max(latest, round)
        client.notes[VERSION] = torch.tensor([latest])
        return rest

    def check(self, adapter: LowRank, message: Message) -> None:
        """Refuse factors whose product could overflow everybody's frozen weights.

        Raises
        ------
        MessageError
            Naming the site.
        """
        for site in self.sites:
            a, b = (message.tensors[f"{factor}/{site.name}"].double() for factor in "AB")
            size = adapter.scale(len(a)) * float(torch.linalg.norm(b) * torch.linalg.norm(a))
            if not size <= LARGEST:
                raise MessageError(f"the update of {site.name} is of size {size:.3g}; allowed: at most {LARGEST:g}")

    def version(self, client: Client) -> int:
        return int(client.notes.get(VERSION, 0))

    # -- at the server -------------------------------------------------------------------------------------------

    def extend(self, state: State, round: int, senders: Iterable[str], changes: Changes) -> State:
        """The state after this round's change; ``senders`` are those whose messages made it."""
        state = {**state, "log/heard": self._heard(state).clone()}
        for client in senders:
            state["log/heard"][self.clients.index(client)] = self.latest(state)
        for name, (up, down) in changes.items():
            if up.shape[1] == 0:
                continue
            up, down = up.float().contiguous(), down.float().contiguous()
            state[f"log/base/{name}"] = merged(self.total(state)[f"base/{name}"], up, down)
            state |= {f"log/up/{round}/{name}": up, f"log/down/{round}/{name}": down}
            state["log/round"] = torch.tensor([round])
        return self._pruned(state)

    def _pruned(self, state: State) -> State:
        """Without the changes that everybody has, and those that will never be sent: dense weighs less."""
        oldest = int(self._heard(state).min())
        cut = self._cut(state).clone()
        kept = dict(state)
        for i, site in enumerate(self.sites):
            weight = 0
            for round in reversed(self._logged(state, site)):
                weight += _weight(site, state[f"log/up/{round}/{site.name}"].shape[1])
                if round <= oldest or weight >= site.d_in * site.d_out:
                    cut[i] = max(int(cut[i]), round)
                    del kept[f"log/up/{round}/{site.name}"], kept[f"log/down/{round}/{site.name}"]
        return {**kept, "log/cut": cut}

    def missing(self, state: State, client: str) -> Tensors:
        """What this client has not confirmed: ``up/<round>/<site>`` and ``down/<round>/<site>``, or
        ``base/<round>/<site>``."""
        tensors: Tensors = {}
        latest = self.latest(state)
        heard, place = self._heard(state), self.clients.index(client)
        since = int(heard[place]) if place < len(heard) else 0  # who joins late has none
        for site, cut in zip(self.sites, self._cut(state).tolist(), strict=True):
            if since < cut:
                tensors[f"base/{latest}/{site.name}"] = state[f"log/base/{site.name}"]
                continue
            for round in self._logged(state, site):
                if round > since:
                    for part in ("up", "down"):
                        tensors[f"{part}/{round}/{site.name}"] = state[f"log/{part}/{round}/{site.name}"]
        return tensors

    def latest(self, state: State) -> int:
        """The round of the latest change; 0 before the first."""
        return int(state.get("log/round", 0))

    def total(self, state: State) -> Tensors:
        """``base/<site>`` of a client that has received everything."""
        return {name: state.get(f"log/{name}", zero) for name, zero in self.zeros().items()}

    def _heard(self, state: State) -> Tensor:
        return state.get("log/heard", torch.zeros(len(self.clients), dtype=torch.int64))

    def _cut(self, state: State) -> Tensor:
        return state.get("log/cut", torch.zeros(len(self.sites), dtype=torch.int64))

    def _logged(self, state: State, site: Site) -> list[int]:
        """Rounds in the log, the oldest first."""
        prefix, suffix = "log/up/", f"/{site.name}"
        names = (name for name in state if name.startswith(prefix) and name.endswith(suffix))
        rounds = (name.removeprefix(prefix).removesuffix(suffix) for name in names)
        return sorted(int(round) for round in rounds if round.isdigit())

    def message(self, tensors: Tensors) -> Message:
        """A reply in which changes travel as they are."""
        return Message(tensors, {}, {name: "float32" for name in tensors if kind(name) in CHANGES})

    # -- before anything runs ------------------------------------------------------------------------------------

    def typical(self, round: int, rank: int) -> Tensors:
        """Tensors of the size that a client gets after a round whose change has this rank, if it missed no other."""
        tensors: Tensors = {}
        for site in self.sites if rank else ():
            if _weight(site, rank) >= site.d_in * site.d_out:
                tensors[f"base/{round}/{site.name}"] = torch.zeros(site.d_out, site.d_in)
            else:
                tensors[f"up/{round}/{site.name}"] = torch.zeros(site.d_out, rank)
                tensors[f"down/{round}/{site.name}"] = torch.zeros(rank, site.d_in)
        return tensors


def merged(base: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``base + up @ down``; the same bits at the server and at a client that adds the same factors."""
    return (base.double() + up.double() @ down.double()).float()


def _weight(site: Site, rank: int) -> int:
    """Numbers in a change of this rank."""
    return rank * (site.d_in + site.d_out)
