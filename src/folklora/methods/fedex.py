"""FedEx-LoRA: average the factors, and put what that loses into the frozen weights. arXiv 2410.09432 (ACL 2025).

1. Client k trains A_k and B_k from the common ones and sends both [paper].
2. ``A_bar = sum_k p_k A_k``, ``B_bar = sum_k p_k B_k`` go back, as in FedIT [paper: plain means; weights p_k by
  examples: recon].
3. What the product of means misses of the mean of products goes into everybody's frozen weights [paper]:
  ``W0 <- W0 + s (sum_k p_k B_k A_k - B_bar A_bar)``. Aggregation is then exact;
  where ``message.dtype`` rounds A_bar and B_bar on their way down, exact but for that rounding.
4. The residual travels as factors, never dense [paper: rank at most K r, by Gram-Schmidt]. Since the A_k - A_bar sum to
  zero, ``sum_k p_k B_k A_k - B_bar A_bar = sum_{k<K} p_k (B_k - B_K) (A_k - A_bar)``: rank (K - 1) r, without any
  decomposition [recon].
5. ``residual_rank`` = r': the best approximation of that rank instead, by truncated SVD [paper], computed on the QR
  factors of step 4 so that nothing dense is built [recon]. What is cut off is lost for good, and
  ``aggregation_error`` shows it; 0 is FedIT.

Who was absent gets every residual it missed, or the dense sum where that is smaller (`folklora.methods.residuals`)
[recon]. The authors' code adds the residual transposed, which square layers do not notice; the formula above is the
paper's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import Tensors
from folklora.methods.base import Method
from folklora.methods.contract import Client, Context, Message, State
from folklora.methods.fedit import FedITOptions
from folklora.methods.options import Options
from folklora.methods.residuals import Changes, ResidualLog


class FedExOptions(FedITOptions):
    residual_rank: int | None = Field(None, ge=0, description="r' of the truncated residual; none given: all of it")


class FedExLoRA(Method):
    """Means of A and B, and the residual merged into the frozen weights [paper]."""

    name = "fedex"
    title = "FedEx-LoRA (residual merged into the weights)"
    paper = "arXiv:2410.09432"
    has_global_model = True
    takes_means = False
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal"})
    options_type = FedExOptions
    options: FedExOptions

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.log = ResidualLog(context)

    def initial(self, client: str) -> Tensors:
        return {**super().initial(client), **self.log.zeros()}

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        self.log.check(self.adapter, message)

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        state = super().server(round, state, messages)  # A_bar, B_bar, and the head's mean
        return self.log.extend(state, round, messages, self._residuals(state, messages))

    def _residuals(self, state: State, messages: Mapping[str, Message]) -> Changes:
        p = dict(zip(messages, self.weights(messages).tolist(), strict=True))
        # In the clients' order, so that the factors do not depend on who answered first.
        *others, last = [client for client in self.context.clients if client in messages]
        residuals = {}
        for site in self.context.sites:
            a = {client: message.tensors[f"A/{site.name}"].double() for client, message in messages.items()}
            b = {client: message.tensors[f"B/{site.name}"].double() for client, message in messages.items()}
            a_bar = state[f"global/A/{site.name}"].double()
            s = self.adapter.scale(len(a_bar))
            up = torch.cat([s * p[k] * (b[k] - b[last]) for k in others] or [b[last][:, :0]], dim=1)
            down = torch.cat([a[k] - a_bar for k in others] or [a_bar[:0]])
            residuals[site.name] = self._truncated(up, down)
        return residuals

    def _truncated(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        rank = self.options.residual_rank
        return (up, down) if rank is None or rank >= up.shape[1] else truncated(up, down, rank)

    def reply(self, state: State, client: str) -> Message | None:
        means = super().reply(state, client)
        return means and self.log.message({**means.tensors, **self.log.missing(state, client)})

    def receive(self, client: Client, message: Message) -> None:
        client.tensors.update(self.log.receive(client, message))

    def typical_reply(self, round: int, client: str) -> Message | None:
        ranks = self.context.ranks.values()
        rank = (len(ranks) - 1) * max(ranks)
        if self.options.residual_rank is not None:
            rank = min(rank, self.options.residual_rank)
        means = {name: torch.zeros(shape) for name, shape in self.expected(round, {}, client).items()}
        return self.log.message({**means, **self.log.typical(round, rank)})

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        model = super().global_model(state, client, tensors)
        if model is None:
            return None
        return {**{name: tensor for name, tensor in model.items() if name in tensors}, **self.log.total(state)}


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``up @ down`` of a lower rank (Eckart-Young), from factors alone.

    Parameters
    ----------
    up, down
        [d_out, R] and [R, d_in].

    Returns
    -------
    tuple
        [d_out, rank] and [rank, d_in], the singular values' roots in each.
    """
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, sigma, vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    return left.Q @ u[:, :rank] * root, root[:, None] * (vt[:rank] @ right.Q.T)
