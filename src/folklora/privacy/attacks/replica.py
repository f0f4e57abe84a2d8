"""The attacker's differentiable copy of a client: what gradient would these inputs have caused?

Texts are the embeddings of their tokens, put in the place of what the backbone's embedding layer gives; pictures are
pixels in [0, 1] of the size that the model sees. All is float32 and twice differentiable, through the frozen backbone,
all adapters and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.causal import CausalLM, Dialogue
from folklora.backbones.decoder import LOGITS
from folklora.backbones.image_text import Example, ImageText
from folklora.backbones.pictures import Pixels, lay_out_pictures
from folklora.backbones.task import Task
from folklora.training.network import Embeddings, one_client
from folklora.training.stacks import Plugging


class Replica:
    """See the module's text.

    Parameters
    ----------
    task, adapter
        As the recipe makes them.
    form
        "text" or "image".
    """

    def __init__(self, task: Task, adapter: LowRank, form: str) -> None:
        self.task: Any = task
        self.adapter = adapter
        self.form = form
        self.backbone: Any = task.backbone
        self.device = task.backbone.device

    @cached_property
    def embeddings(self) -> Embeddings:
        """The layer that turns token ids into vectors."""
        return Embeddings(self.backbone)

    @property
    def vectors(self) -> Tensor:
        """[vocabulary, d] float32: what the embedding layer gives for each token."""
        return self.embeddings.vectors

    def gradients(
        self,
        before: Tensors,
        names: Sequence[str],
        inputs: Tensor,
        labels: Tensor,
        lengths: Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
        *,
        create_graph: bool = True,
    ) -> Tensors:
        """Of the batch's mean loss, with respect to the client's tensors ``names``, in the shapes they travel in.

        Parameters
        ----------
        before
            The client's whole model, at its own rank.
        inputs
            Texts: [count, longest, d]; pictures: [count, 3, height, width].
        labels
            [count] int64, or a distribution over the classes, [count, classes]. A language model learns its inputs.
        lengths, prompts
            Texts: how many tokens each has, and how many of them are the prompt (causal-lm).
        create_graph
            Whether the result is to be differentiated again.
        """
        leaves = {name: before[name].detach().to(self.device, torch.float32).requires_grad_() for name in names}
        model = {**{name: t.detach().to(self.device, torch.float32) for name, t in before.items()}, **leaves}
        loss = self.loss(model, inputs, labels, lengths, prompts)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, allow_unused=True)
        pairs = zip(names, found, leaves.values(), strict=True)
        return {name: torch.zeros_like(leaf) if slope is None else slope for name, slope, leaf in pairs}

    def exact(self, before: Tensors, names: Sequence[str], examples: Sequence[Any], labels: Tensor) -> Tensors:
        """The same of real examples, as the task encodes them: the float32 gradient of one step."""
        leaves = {name: before[name].detach().to(self.device, torch.float32).requires_grad_() for name in names}
        if not leaves:
            return {}
        model = {**{name: t.detach().to(self.device, torch.float32) for name, t in before.items()}, **leaves}
        stacks, plugged = self._stacks(model)
        layout = self.task.lay_out([list(examples)], "never")
        loss = plugged.penalised(self.task.losses(layout, labels, stacks, plugged, torch.float32)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        pairs = zip(names, found, leaves.values(), strict=True)
        return {name: torch.zeros_like(leaf) if slope is None else slope for name, slope, leaf in pairs}

    def loss(
        self,
        model: Tensors,
        inputs: Tensor,
        labels: Tensor,
        lengths: Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
    ) -> Tensor:
        """The batch's mean loss, a scalar; arguments as in `gradients`."""
        stacks, plugged = self._stacks(model)
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
            if self.form == "image":
                losses: Tensor = self.task.losses(self._pictures(inputs), labels, stacks, plugged, torch.float32)
                return plugged.penalised(losses).sum()
            assert lengths is not None
            with self.embeddings.replaced(inputs):
                if isinstance(self.task, CausalLM):
                    nats = self._mean_nats(inputs, lengths, prompts or [1] * len(lengths), plugged)
                    return plugged.penalised(nats[None]).sum()
                layout = self.task.lay_out([[[self.backbone.pad_token] * length for length in lengths]], "never")
                losses = self.task.losses(layout, labels, stacks, plugged, torch.float32)
                return plugged.penalised(losses).sum()

    def features(self, pixels: Tensor, *, slope: bool = False) -> Tensor:
        """[count, width]: what the frozen backbone sees in pictures; ``slope``: differentiable in them."""
        with torch.set_grad_enabled(slope):
            found: Tensor = self.task.features(self._pictures(pixels))
        return found

    def _stacks(self, model: Tensors) -> tuple[Tensors, Plugging]:
        """The model as a stack of one client, and what plugs it in; slopes go back to the model."""
        stacks, plug = one_client(self.adapter, model, self.device)
        return stacks, Plugging(plug)

    # -- inputs in the place of the real ones --------------------------------------------------------------------------

    def _pictures(self, pixels: Tensor) -> Any:
        """A batch that holds these pixels, [0, 1], as numbers rather than bytes; of a frozen tower the embeddings."""
        height, width = pixels.shape[-2:]
        blank = Pixels(torch.zeros(3, height, width, dtype=torch.uint8).numpy(), self.backbone.tokens)
        batch = replace(lay_out_pictures([[blank] * len(pixels)]), pixels=255 * pixels)
        if not isinstance(self.task, ImageText):
            return batch
        if "image" in self.backbone.adapted:
            return replace(self.task.lay_out([[Example(blank)] * len(pixels)]), pictures=batch)
        layout = self.task.lay_out([[Example(torch.zeros(self.task.width).numpy())] * len(pixels)])
        return replace(layout, pictures=self.backbone.embed_pictures(batch, None, torch.float32))

    def _mean_nats(self, inputs: Tensor, lengths: Sequence[int], prompts: Sequence[int], plugged: Any) -> Tensor:
        """Of the response tokens, which are unknown as well: the likelier a token, the nearer its vector is."""
        examples = [Dialogue([0] * length, prompt) for length, prompt in zip(lengths, prompts, strict=True)]
        layout = self.task.lay_out([examples], "never")
        hidden = self.backbone.hidden(layout.batch, plugged(layout.batch), torch.float32)
        states = hidden.reshape(-1, hidden.shape[-1])[layout.sources.to(hidden.device)]
        wanted = self.likely(inputs.reshape(-1, inputs.shape[-1])[(layout.sources + 1).to(inputs.device)])
        rows = max(1, LOGITS // wanted.shape[1])
        parts = zip(states.split(rows), wanted.split(rows), strict=True)
        nats = [self.backbone.nats(some, tokens, torch.float32) for some, tokens in parts]
        return torch.cat(nats).mean()

    def likely(self, vectors: Tensor) -> Tensor:
        """[N, vocabulary]: a distribution over the tokens by squared distance, sharp at the distance of neighbours."""
        return torch.softmax(-torch.cdist(vectors, self.vectors).square() / self._spread, dim=1)

    @cached_property
    def _spread(self) -> float:
        """A twentieth of the usual squared distance from a token to its nearest."""
        some = self.vectors[:: max(1, len(self.vectors) // 512)]
        nearest = torch.cdist(some, self.vectors).topk(2, largest=False).values[:, 1]
        return max(float(nearest.square().median()) / 20, 1e-12)


def padded(texts: Sequence[Tensor]) -> Tensor:
    """[count, longest, d] of texts [length, d], zeros behind the short ones."""
    return pad_sequence(list(texts), batch_first=True)
