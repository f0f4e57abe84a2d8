"""FedLPP: clients only ever hold a coarse copy of the server's adapter. arXiv 2406.10976 (EMNLP Findings 2024).

1. The server keeps S in full precision and sends ``D = Q(S)`` [abstract].
2. Q, by blocks: ``c = max|v|`` (1 where all are zero), each number to the nearest level of a grid times c. The grid is
  a normal-float one for 2 bits and more, {-1, 0, 1} for 1 and 1.5 [relatives' code: recon of the grids beyond 4 bits,
  see `folklora.quantization`]. ``bits`` and ``block`` are ours to choose [recon].
3. Client k trains from D in full precision to C_k, and returns it [abstract].
4. ``S <- S + server_rate (mean_k C_k - D)`` [abstract; weighted by examples: recon].

Before the first round a client holds D too: what it starts with is Q of the common start. Every matrix that travels is
coarse, the head's weight too, and a sketched head as well; vectors travel whole [recon]. With one number a block, or in
the limit of fine blocks, D is S and the method is FedIT. What the server's model is worth beside a client's is told by
a run's summary, by the task's metric: ``accuracy_global`` is S's (where no head stays home and the data has a common
test set), ``accuracy_mean`` is D's, the clients' after their last download, and ``accuracy_tuned_mean`` theirs after
training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor

from folklora.adapters.lowrank import Tensors, kind
from folklora.methods.aggregation import weighted_mean
from folklora.methods.base import Method
from folklora.methods.contract import Message, State
from folklora.methods.fedit import FedITOptions
from folklora.quantization import BLOCK, MOST_IN_BLOCK, rounded

GRIDS = {1.0: "ternary", 1.5: "ternary", 2.0: "nf2", 3.0: "nf3", 4.0: "nf4", 8.0: "nf8"}


class FedLPPOptions(FedITOptions):
    bits: float = Field(4.0, description="of a number that comes down; 1 and 1.5 are both ternary")
    block: int = Field(BLOCK, ge=1, le=MOST_IN_BLOCK, description="numbers that share a scale")
    server_rate: float = Field(1.0, gt=0, le=10, description="eta")

    @field_validator("bits")
    @classmethod
    def _there_is_a_grid(cls, bits: float) -> float:
        if bits not in GRIDS:
            raise ValueError(f"bits = {bits:g}; allowed: {', '.join(f'{known:g}' for known in GRIDS)}")
        return bits


class FedLPP(Method):
    """FedIT whose downloads are quantised and whose server is not."""

    name = "fedlpp"
    title = "FedLPP (coarse copies for clients)"
    paper = "arXiv:2406.10976"
    has_global_model = True
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})
    options_type = FedLPPOptions
    options: FedLPPOptions

    def coarse(self, tensors: Tensors) -> Message:
        """D: what clients see of the server's tensors, and how it travels without losing anything more."""
        grid, block = GRIDS[self.options.bits], self.options.block
        matrices = [name for name, tensor in tensors.items() if tensor.dim() > 1]
        seen = {name: rounded(tensors[name], grid, block) for name in matrices}
        return Message({**tensors, **seen}, {}, dict.fromkeys(matrices, f"{grid}/{block}"))

    def start(self) -> Tensors:
        """S before the first round; all clients start alike."""
        kinds = self.shared(1)
        common = super().initial(self.context.clients[0])
        return {name: tensor for name, tensor in common.items() if kind(name) in kinds}

    def initial(self, client: str) -> Tensors:
        return {**super().initial(client), **self.coarse(self.start()).tensors}

    def welcome(self, state: State, client: str) -> Message | None:
        return self._coarse_head(super().welcome(state, client))

    def typical_welcome(self, client: str) -> Message | None:
        return self._coarse_head(super().typical_welcome(client))

    def _coarse_head(self, message: Message | None) -> Message | None:
        return message if message is None or not self.options.head_travels else self.coarse(message.tensors)

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        mean = weighted_mean([message.tensors for message in messages.values()], self.weights(messages))
        full = self.full(state)
        sent = self.coarse(full).tensors
        rate = self.options.server_rate
        moved = {name: full[name].double() + rate * (c.double() - sent[name]) for name, c in mean.items()}
        return {**state, **{f"global/{name}": tensor.float() for name, tensor in moved.items()}}

    def full(self, state: State) -> Tensors:
        """S."""
        return {name.removeprefix("global/"): state.get(name, tensor) for name, tensor in self.origin(state).items()}

    def origin(self, state: State) -> Tensors:
        """S before the first round, not the coarse copies of it that clients hold."""
        return {f"global/{name}": state.get(f"start/{name}", tensor) for name, tensor in self.start().items()}

    def mixing(self, state: State, messages: Mapping[str, Message]) -> Tensor | None:
        """With a rate of 1 clients are meant to get the mean; what quantisation takes from it is the error."""
        return super().mixing(state, messages) if self.options.server_rate == 1 else None

    def reply(self, state: State, client: str) -> Message | None:
        common = super().reply(state, client)
        return None if common is None else self.coarse(common.tensors)

    def typical_reply(self, round: int, client: str) -> Message | None:
        return self.coarse({name: torch.zeros_like(tensor) for name, tensor in self.start().items()})

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        return {**tensors, **self.full(state)} if self.common_head else None
