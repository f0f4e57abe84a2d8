"""Fed-SB: a core between the singular vectors of the first step of full fine-tuning. arXiv 2502.15436 (Singhal et al.).

1. ``y = W0 x + s B R A x`` (this code's C is R). A and B are frozen and common; R trains and travels; the mean of the
  R_k is the mean of the updates, exactly [paper].
2. The frame comes from the gradient G of the frozen weights: ``DW1 = -eta sign(G)``, the first step AdamW would take on
  W0 itself [paper]. Its singular value decomposition, cut at rank r, is ``U Sigma V^T``: B = U, A = V^T, R = Sigma
  [code: a randomised decomposition; here the exact one, in float64].
3. The authors take G on pooled examples [code: 50 to 170]. Here nobody has them: each client sends, once, the gradient
  of the mean loss on at most ``gradient_examples`` of its training examples, dense (d_out x d_in numbers a layer: by
  far the largest message of a run). The server's mean, weighted by those examples, is the pooled gradient [recon].
  U, V^T and Sigma come back, once. All of it counts as bytes. The sign is that of the mean, so a client whose message
  is lost or refused is missing from it, and that is all. Where a client's loss is no mean over examples (of response
  tokens, of pairs against each other), clients still count by examples [recon].
4. Under a zero head every gradient is zero. ``gradient_head = "random"``: all use one Gaussian head from the seed, std
  0.02, as the authors' BERT classifier starts [code]; ``"own"``: each the linear discriminant of its own class
  statistics [recon]. One head sketched by all would cost another exchange before the gradient. What the head starts
  from in training is another matter (``head_start``). A task without a head of its own has a gradient as it is, and
  needs neither.
5. The authors set alpha = r, so s = 1 [code]. Here R = Sigma / s: whatever the recipe's alpha, ``s B R A`` starts as
  the rank-r part of DW1 [recon]. ``core_start = "zero"`` keeps the frame and starts from the backbone [recon].
6. The authors' eta is the learning rate of the first warm-up step, train.lr / number of warm-up steps [code: below 1e-6
  at their defaults].

A gradient of few examples can be inverted into them: what is sent once is less private than what is sent each round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from folklora.adapters.lowrank import Tensors, gaussian, orthonormal, select
from folklora.data.statistics import refuse_unknown, take
from folklora.errors import MessageError, MethodError
from folklora.methods.base import Method, blank, refuse_other_prefixes
from folklora.methods.contract import Client, Message, State
from folklora.methods.discriminant import linear_discriminant
from folklora.methods.fedit import FedITOptions
from folklora.methods.svd import principal

_COUNT = "count/gradient"


class FedSBOptions(FedITOptions):
    of_a_head: ClassVar[dict[str, Any]] = {**FedITOptions.of_a_head, "gradient_head": "random"}
    gradient_head: Literal["random", "own"] = Field("random", description="the head the first gradient is taken under")
    gradient_examples: int = Field(64, ge=1, le=1_000_000, description="of each client, at most")
    eta: float = Field(1e-6, gt=0, le=1, description="size of the first step")
    core_start: Literal["sigma", "zero"] = "sigma"


class FedSB(Method):
    """Mean of R in a frame made of everybody's first gradient; the head travels too [recon]."""

    name = "fedsb"
    title = "Fed-SB (core R travels)"
    paper = "arXiv:2502.15436"
    core = True
    has_global_model = True
    trains = frozenset({"C", "head", "norm"})
    travels = frozenset({"C", "norm"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})
    options_type = FedSBOptions
    options: FedSBOptions

    def initial_factors(self, client: str, rank: int) -> Tensors:
        """A frame to stand on until the welcome brings the real one: orthonormal, from the seed, with R = 0."""
        return {
            name: torch.zeros(shape) if name.startswith("C/") else orthonormal(shape, self.generator(name))
            for name, shape in self.adapter.shapes(rank).items()
        }

    # -- the first gradient --------------------------------------------------------------------------------------

    def sketch_numbers(self) -> int:
        return super().sketch_numbers() + 1 + sum(site.d_in * site.d_out for site in self.context.sites)

    @property
    def once(self) -> str | None:
        return " and ".join(filter(None, ("weight gradients", super().once)))

    @property
    def beside_training(self) -> tuple[str, str] | None:
        return "bases of weight gradients", "a method whose bases need no data, such as 'loraxs' or 'ffa'"

    def sketch(self, client: Client) -> Message:
        """``gradient/<site>`` [d_out, d_in], ``count/gradient`` [1], and class statistics if the head wants them."""
        most = self.options.gradient_examples
        gradients = client.data.weight_gradients(self._gradient_head(client), most)
        statistics = super().sketch(client)
        return Message(
            {
                **(statistics.tensors if statistics else {}),
                **{f"gradient/{site.name}": gradients[f"grad/{site.name}"] for site in self.context.sites},
                _COUNT: torch.tensor([min(most, client.examples)], dtype=torch.int32),
            }
        )

    def _gradient_head(self, client: Client) -> Tensors:
        if not self.context.head:
            return {}
        if self.options.gradient_head == "own":
            weight, bias = linear_discriminant(self.statistics(client))
        else:
            shape = (self.context.classes, self.context.width)
            weight = gaussian(shape, self.generator("gradient_head"), 0.02)
            bias = torch.zeros(len(weight))
        return {"head/weight": weight, "head/bias": bias}

    def check_sketch(self, message: Message) -> None:
        sketched = self.options.head_statistics
        refuse_other_prefixes(message, {"gradient/", "count/"} | ({"statistics/"} if sketched else set()))
        if sketched:
            self.read_statistics(message)
        self._read_gradients(message)

    def _read_gradients(self, message: Message) -> tuple[int, Tensors]:
        """How many examples, and each site's gradient [d_out, d_in] float64.

        Raises
        ------
        MessageError
            For what is missing, unknown, misshapen or not finite, or a count outside of what was agreed.
        """
        own = {name: t for name, t in message.tensors.items() if not name.startswith("statistics/")}
        refuse_unknown(own, {_COUNT, *(f"gradient/{site.name}" for site in self.context.sites)})
        count = int(take(own, _COUNT, (1,), integer=True))
        if not 1 <= count <= self.options.gradient_examples:
            raise MessageError(f"{_COUNT} = {count}; allowed: 1 to {self.options.gradient_examples}")
        sites = self.context.sites
        return count, {site.name: take(own, f"gradient/{site.name}", (site.d_out, site.d_in)) for site in sites}

    def begin(self, sketches: Mapping[str, Message]) -> State:
        """``start/A``, ``start/B``, ``start/C`` of every site, beside what the head starts from."""
        if not sketches:
            raise MethodError("no client sent a gradient, and the frame of Fed-SB is made of nothing else")
        state = super().begin(sketches)
        examples = 0
        sums = {site.name: torch.zeros(site.d_out, site.d_in, dtype=torch.float64) for site in self.context.sites}
        for message in sketches.values():
            count, gradients = self._read_gradients(message)
            examples += count
            for name, gradient in gradients.items():
                sums[name] += count * gradient
        (rank,) = set(self.context.ranks.values())
        for site in self.context.sites:
            step = -self.options.eta * torch.sign(sums[site.name] / examples)
            u, sigma, vt = principal(step, rank)
            core = torch.diag(sigma) / self.adapter.scale(rank)
            state[f"start/A/{site.name}"] = vt.float().contiguous()
            state[f"start/B/{site.name}"] = u.float().contiguous()
            state[f"start/C/{site.name}"] = (core if self.options.core_start == "sigma" else 0 * core).float()
        return state

    def typical_sketch(self, client: str, counts: Tensor) -> Message | None:
        statistics = super().typical_sketch(client, counts)
        gradients = {f"gradient/{site.name}": torch.zeros(site.d_out, site.d_in) for site in self.context.sites}
        count = torch.zeros(1, dtype=torch.int32)
        return Message({**(statistics.tensors if statistics else {}), **gradients, _COUNT: count})

    def typical_welcome(self, client: str) -> Message | None:
        head = super().typical_welcome(client)
        frame = blank(self.adapter.shapes(self.context.ranks[client]))
        return Message({**(head.tensors if head else {}), **frame})

    def settle(self, client: Client, message: Message) -> None:
        factors = select(message.tensors, frozenset(self.adapter.factors))
        client.tensors.update(factors)
        head = {name: tensor for name, tensor in message.tensors.items() if name not in factors}
        super().settle(client, Message(head))
