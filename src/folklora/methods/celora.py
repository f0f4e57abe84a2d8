"""CE-LoRA: tri-matrix adapters, and a mix of cores of its own for every client. arXiv 2503.23869 (IEEE TMM 2026).

1. ``y = W0 x + s B C A x``. A ~ N(0, 1e-3^2), B = 0, C = I; A, B, C and the head all train [code].
2. Only C travels [paper]; A, B, the head (and LayerNorms) never leave the client.
3. Once, each client fits a Gaussian mixture per class on frozen features and sends it [paper, code: 3 components,
  diagonal].
4. Data similarity: optimal transport between the clients' mixtures [paper: GMM + OT; distances to similarities: recon].
5. Model similarity: linear CKA of the cores [paper names CKA; averaging over layers: recon].
6. ``S = lambda S_data + (1 - lambda) S_model``; client i gets ``sum_j softmax_j(S_ij / T) C_j``, itself included
   [lambda, T, softmax: recon].

Examples without labels are all of one class, whose mixture is that of all features of the client [recon].

Where ranks differ, cores are mixed zero-padded and truncated on the way down [recon]; what is mixed is ``s_k C_k``, so
that the scaling alpha / rank of each client is respected [recon].

Up to a thousand clients data similarity is exact and everything N x N is kept to be shown. Beyond, clients are points
of linear optimal transport (`folklora.methods.embedding`) [recon], nothing N x N is ever held
(`folklora.methods.mixing`), and rounds of more than a thousand clients are mixed in float32.

Ours beside the published: ``basis = "frozen"`` (A, B orthonormal, from the seed, common to all and never trained; C
starts at zero; then the mean of cores is exact) and ``basis = "aligned"`` (each core is rotated to the receiver's by
orthogonal Procrustes before mixing), ``similarity = "uniform" | "size"`` (plain and example-weighted means), a
differentially private sketch, mixtures read off the class statistics (``components = 0``), and sketches that are asked
for again while data change (``refresh``).

What clients say of their data and how alike they are, 3 and 4, is in `folklora.methods.data_similarity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from folklora.adapters.lowrank import Tensors, gaussian, kind, orthonormal
from folklora.methods.aggregation import weighted_mean
from folklora.methods.cka import gram_rows
from folklora.methods.contract import Client, Message, State
from folklora.methods.data_similarity import DataSimilarity, held_whole
from folklora.methods.mixing import Embedded, Mixing
from folklora.methods.renewal import TAKEN, Renewal, renewals


class CELoRA(DataSimilarity):
    """CE-LoRA and its variants; see the module's text."""

    name = "celora"
    title = "CE-LoRA (core C travels)"
    paper: ClassVar[str | None] = "arXiv:2503.23869"
    core = True
    mixed_ranks = True
    travels = frozenset({"C"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})

    # -- factors -------------------------------------------------------------------------------------------------

    def initial_factors(self, client: str, rank: int) -> Tensors:
        frozen = self.options.basis == "frozen"
        factors: Tensors = {}
        for name, shape in self.adapter.shapes(rank).items():
            match name[0], frozen:
                case "A", True:
                    factors[name] = self._common_basis(name, shape)[:rank]
                case "B", True:
                    factors[name] = self._common_basis(name, shape)[:, :rank].contiguous()
                case "C", True:
                    factors[name] = torch.zeros(shape)
                case "A", False:
                    factors[name] = gaussian(shape, self.generator(name), self.options.init_std)
                case "B", False:
                    factors[name] = torch.zeros(shape)
                case "C", False:
                    factors[name] = torch.eye(rank)
        return factors

    def _common_basis(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # Drawn at the largest rank and cut: clients of different rank then share their leading directions.
        most = max(self.context.ranks.values())
        full = (most, shape[1]) if name.startswith("A/") else (shape[0], most)
        return orthonormal(full, self.generator(name))

    def trained(self, round: int) -> frozenset[str]:
        return self.trains - {"A", "B"} if self.options.basis == "frozen" else self.trains

    # -- the round -----------------------------------------------------------------------------------------------

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        cores = self._scaled_cores(messages)  # [K, L, r, r]
        others = [{n: t for n, t in m.tensors.items() if not n.startswith("C/")} for m in messages.values()]
        mean = weighted_mean(others, self.weights(messages))  # a shared head, or nothing
        state = {**state, **{f"global/{name}": tensor for name, tensor in mean.items()}}
        mixing = self._mixing(state, messages, cores)
        if self._mixes_for_newcomers:
            state |= self._last_cores(state, messages, cores)
        if self.options.common_core:
            # One core for all, at the largest rank of all: whoever did not take part gets it too.
            common = torch.einsum("j,jlpq->lpq", self._shares(messages).to(cores.dtype), cores)
            state |= {f"common/C/{s.name}": core.float() for s, core in zip(self.context.sites, common, strict=True)}
        else:
            state |= self._kept(state, messages, self._mix(mixing, messages, cores))
        if "renewal/new" in state:  # they have been told
            state["renewal/new"] = state["renewal/new"].clone()
            state["renewal/new"][self._where(messages)] = False
        return state | self._shown(state, messages, mixing)

    def _kept(self, state: State, messages: Mapping[str, Message], mixed: Tensor) -> State:
        """A row of cores for each client, at its own scale and zero beyond its rank; absent clients keep theirs."""
        where = self._where(messages)
        scales = torch.tensor([self.adapter.scale(self.context.ranks[client]) for client in messages])
        count = len(self.context.clients)
        rows = state.get("mixed/C", torch.zeros(count, *mixed.shape[1:])).clone()
        known = state.get("mixed/known", torch.zeros(count, dtype=torch.bool)).clone()
        rows[where] = (mixed / scales.to(mixed.dtype)[:, None, None, None]).float()
        known[where] = True
        return {"mixed/C": rows, "mixed/known": known}

    def _shown(self, state: State, messages: Mapping[str, Message], mixing: Mixing | None) -> State:
        """Pictures want N x N; clients that were absent keep the row they had."""
        count = len(self.context.clients)
        if not held_whole(count):
            return {}
        matrices: State = {}
        if mixing is not None:
            if mixing.model is not None:
                matrices["similarity/model"] = mixing.model_similarity(mixing.everybody, mixing.everybody)
            matrices["similarity/mixed"] = mixing.similarity(mixing.everybody, mixing.everybody)
        weights = self._weights(messages, mixing)
        where = self._where(messages)
        shown: State = {}
        for name, matrix in {"weights": weights, **matrices}.items():
            full = state.get(name, torch.eye(count)).clone()
            if name == "weights":
                full[where] = 0.0
            full[where[:, None], where] = matrix.float()
            shown[name] = full
        return shown

    def origin(self, state: State) -> Tensors:
        widest = max(self.context.ranks, key=lambda client: self.context.ranks[client])
        s = self.adapter.scale(self.context.ranks[widest])
        cores = {f"common/{n}": s * t for n, t in self.initial(widest).items() if n.startswith("C/")}
        return {**super().origin(state), **cores}

    @property
    def averages(self) -> bool:
        options = self.options
        if options.refresh and options.start != "zero":  # who was heard is who was told
            return False
        return options.common_core and options.similarity == "size" and super().averages

    def _scaled_cores(self, messages: Mapping[str, Message]) -> Tensor:
        """``s_k C_k`` of all layers, zero-padded to the largest rank of all clients: [K, L, r, r]."""
        most = max(self.context.ranks.values())
        dtype = torch.float64 if held_whole(len(messages)) else torch.float32
        cores = torch.zeros(len(messages), len(self.context.sites), most, most, dtype=dtype)
        for row, (client, message) in zip(cores, messages.items(), strict=True):
            rank = self.context.ranks[client]
            layers = torch.stack([message.tensors[f"C/{site.name}"] for site in self.context.sites]).to(dtype)
            row[:, :rank, :rank] = self.adapter.scale(rank) * layers
        return cores

    def _mixing(self, state: State, messages: Mapping[str, Message], cores: Tensor) -> Mixing | None:
        """Who listens to whom among those who took part; None where similarity plays no part."""
        if self.options.similarity in {"uniform", "size"}:
            return None
        lam = {"data": 1.0, "model": 0.0, "both": self.options.lambda_}[self.options.similarity]
        where = self._where(messages)
        data: Tensor | Embedded | None = None
        if lam > 0 and "similarity/data" in state:
            data = state["similarity/data"][where[:, None], where].to(cores.dtype)
        elif lam > 0:
            points = state["similarity/points"][where].to(cores.dtype)
            data = Embedded(points, state["similarity/placed"][where], float(state["similarity/scale"]))
        model = gram_rows(cores, cores.dtype) if lam < 1 else None
        return Mixing(self.options.temperature, lam, data, model, cores.shape[1])

    def _shares(self, messages: Mapping[str, Message]) -> Tensor:
        """[K] float64: everybody's row, where similarity plays no part."""
        if self.options.similarity == "size":
            return self.weights(messages)
        return torch.full((len(messages),), 1 / len(messages), dtype=torch.float64)

    def _weights(self, messages: Mapping[str, Message], mixing: Mixing | None) -> Tensor:
        """[K, K] rows that sum to one."""
        if mixing is None:
            return self._shares(messages).expand(len(messages), -1)
        return mixing.weights(mixing.everybody)

    def _mix(self, mixing: Mixing | None, messages: Mapping[str, Message], cores: Tensor) -> Tensor:
        """``sum_j w_ij C_j``, [K, L, r, r]; every C_j turned towards C_i first where cores are aligned."""
        if self.options.basis != "aligned":
            assert mixing is not None
            return mixing.mix(cores.flatten(1)).view_as(cores)
        mixed = torch.empty_like(cores)
        for i in range(len(cores)):
            w = self._shares(messages) if mixing is None else mixing.weights(slice(i, i + 1))[0]
            mixed[i] = torch.einsum("j,jlpq->lpq", w.to(cores.dtype), procrustes(cores, cores[i]))
        return mixed

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        """As in the base class; None for similarity among more than a thousand clients, whose matrix nobody holds."""
        if self.options.similarity in {"uniform", "size"}:
            return self._weights(messages, None)
        if not held_whole(len(messages)):
            return None
        return self._weights(messages, self._mixing(state, messages, self._scaled_cores(messages)))

    @property
    def counts_examples(self) -> bool:
        return self.options.similarity == "size" or bool(self.shared(1) - {"C"})

    @property
    def must_read(self) -> tuple[str, str] | None:
        options, found = self.options, super().must_read
        if options.scaffold or options.fedopt != "none":
            return found
        if len(set(self.context.ranks.values())) > 1:
            return f"adapter.rank = {sorted(set(self.context.ranks.values()))}", "one rank for all"
        if options.refresh:
            return f"method.refresh = {options.refresh}", "refresh = 0"
        if options.basis == "aligned":
            return 'method.basis = "aligned"', 'basis = "private" or "frozen"'
        if options.similarity == "model" or (options.similarity == "both" and options.lambda_ < 1):
            return f'method.similarity = "{options.similarity}"', 'similarity = "data", "uniform" or "size"'
        return None

    def blind_mixing(self, state: State, clients: Sequence[str], weights: Tensor) -> Tensor:
        unread = dict.fromkeys(clients, Message())
        if self.options.common_core:
            return weights if self.options.similarity == "size" else self._shares(unread)
        dtype = torch.float64 if held_whole(len(clients)) else torch.float32
        mixing = self._mixing(state, unread, torch.empty(len(clients), len(self.context.sites), 0, 0, dtype=dtype))
        return self._weights(unread, mixing)

    def reply(self, state: State, client: str) -> Message | None:
        tensors = {name.removeprefix("global/"): t for name, t in state.items() if name.startswith("global/")}
        rank, position = self.context.ranks[client], self._position[client]
        if f"common/C/{self.context.sites[0].name}" in state:
            for site in self.context.sites:
                core = state[f"common/C/{site.name}"]
                tensors[f"C/{site.name}"] = core[:rank, :rank].contiguous() / self.adapter.scale(rank)
        elif position < len(state.get("mixed/known", ())) and bool(state["mixed/known"][position]):
            rows = state["mixed/C"][position, :, :rank, :rank]
            tensors |= {f"C/{s.name}": core.clone() for s, core in zip(self.context.sites, rows, strict=True)}
        new = state.get("renewal/new", torch.empty(0, 0))
        if position < len(new) and bool(new[position].any()):
            tensors |= renewals(state, new[position])
        return Message(tensors) if tensors else None

    def receive(self, client: Client, message: Message) -> None:
        renewal = Renewal.of(message.tensors, self.context.classes)
        told = {name: t for name, t in message.tensors.items() if kind(name) not in {"start", "new"}}
        client.tensors.update(told)
        if renewal is None or torch.equal(client.notes.get(TAKEN, torch.empty(0)), renewal.bias):
            return
        epochs = self.rounds() * self.context.local_epochs
        head = renewal.head(client, self.context, chosen=self.options.start == "auto", epochs=epochs)
        client.tensors.update(head)
        client.notes[TAKEN] = renewal.bias.clone()

    # -- who joins late ------------------------------------------------------------------------------------------

    @property
    def asks_newcomers(self) -> bool:
        return super().asks_newcomers or (self._mixes_for_newcomers and self.options.uses_data)

    @property
    def newcomer_lacks(self) -> str | None:
        lacks = super().newcomer_lacks
        if lacks is None and self.options.basis != "frozen":
            return "cores: those of the others mean nothing without their own A and B"
        return lacks

    def _last_cores(self, state: State, messages: Mapping[str, Message], cores: Tensor) -> State:
        """``s_k C_k`` as each client last sent it, [N, L, r, r]; zero where it never did."""
        count = len(self.context.clients)
        last = state.get("newcomers/C", torch.zeros(count, *cores.shape[1:])).clone()
        last[self._where(messages)] = cores.float()
        return {"newcomers/C": last}

    def newcomer(self, state: State, client: str, sketch: Message | None) -> tuple[Message | None, Message | None]:
        """The last cores of the others by the newcomer's data similarity to them: ``sum_j softmax_j(S_j / T) C_j`` over
        all who ever sent one [recon]. Where data play no part, or say nothing, that is their mean.

        Bases that stay home make others' cores meaningless: then only the head is there.
        """
        welcome, reply = super().newcomer(state, client, sketch)
        if not self._mixes_for_newcomers:
            if reply is None or self.options.basis == "frozen":
                return welcome, reply
            heads = {name: tensor for name, tensor in reply.tensors.items() if not name.startswith("C/")}
            return welcome, Message(heads) if heads else None
        if "newcomers/C" not in state:
            return welcome, reply
        known = state["mixed/known"]
        shares = torch.softmax(self._similarity_to(state, sketch)[known] / self.options.temperature, dim=0)
        mixed = torch.einsum("j,jlpq->lpq", shares, state["newcomers/C"][known].double())
        rank = self.context.ranks[client]
        mixed = (mixed[:, :rank, :rank] / self.adapter.scale(rank)).float()
        cores = {f"C/{s.name}": core.clone() for s, core in zip(self.context.sites, mixed, strict=True)}
        return welcome, Message({**(reply.tensors if reply else {}), **cores})

    def insight(self, state: State) -> Tensors:
        names = ("similarity/data", "similarity/model", "similarity/mixed", "weights")
        return {name: state[name] for name in names if name in state}


def procrustes(cores: Tensor, reference: Tensor) -> Tensor:
    """Each core rotated as near the reference as an orthogonal R can bring it: ``min_R ||R C_j - C_ref||_F`` [recon].

    Parameters
    ----------
    cores
        [N, L, r, r].
    reference
        [L, r, r].
    """
    u, _, v = torch.linalg.svd(reference @ cores.transpose(-1, -2))
    rotated: Tensor = (u @ v) @ cores
    return rotated
