"""FedAF: clients that condense together, and soft labels. arXiv 2404.18962 (Wang et al., CVPR 2024).

Beside condensed data (`folklora.methods.condensed`), of each class c that client k has it sends

1. ``logits/mean``, v_kc: the mean logits of its real examples of c under the model it was sent. The server keeps V_c,
  their mean over the clients that have c [paper], of the last round in which anybody had it [recon]. In the paper V
  comes back before anybody condenses, in the same round; here it comes with the next model, one exchange a round, so
  made-up examples are pulled towards what the model before said, and in the first round towards nothing [recon].
2. ``soft/mean``, R_kc: the mean of softmax(logits / tau) of the same [paper].

A client condenses as in FedDM, and adds ``lam_loc`` times the sliced Wasserstein distance, squared, of its made-up
logits of class c to V_c, all of whose mass lies in one point; mean over its classes [recon]. Models are drawn by
re-sampling, ``w <- g w + (1 - g) w_init`` with a fresh start each step [paper; the start of a head: N(0, 0.02^2), of
B: zero: recon].

The server minimises cross-entropy ``+ lam_glob * (KL(R || T) + KL(T || R))``, R_c the mean of R_kc over the clients
that have c, T_c the same quantity of condensed examples, of those in a minibatch [recon]; mean over classes. No ball.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import Shapes, Tensors, gaussian, kaiming, kind
from folklora.errors import MessageError
from folklora.methods.condensation import Examples, Extra, between, class_means, with_maps
from folklora.methods.condensed import Condensed, CondensedOptions
from folklora.methods.contract import Client, Message, State
from folklora.methods.sliced import directions, sliced_wasserstein

LOGITS, SOFT = "logits/mean", "soft/mean"
DIRECTIONS = 64
LEAST = 1e-8
"""A probability below it counts as it: a KL divergence has no end otherwise."""


class FedAFOptions(CondensedOptions):
    temperature: float = Field(2.0, gt=0, le=1e3, description="tau of soft labels")
    lam_loc: float = Field(0.01, ge=0, le=1e6, description="weight of the distance to everybody's mean logits")
    lam_glob: float = Field(1.0, ge=0, le=1e6, description="weight of soft labels in the server's loss")
    resampling: float = Field(0.9, ge=0, le=1, description="g: how much of a drawn model is the server's")


class FedAF(Condensed):
    """Class-wise collaboration of clients that condense; a server that also learns soft labels."""

    name = "fedaf"
    title = "FedAF (condensed data and soft labels travel)"
    paper = "arXiv:2404.18962"
    options_type = FedAFOptions
    options: FedAFOptions

    # -- at the client -------------------------------------------------------------------------------------------

    def shared(self, round: int) -> frozenset[str]:
        return super().shared(round) | {"logits", "soft"}

    def upload_shapes(self, counts: Tensor) -> Shapes:
        shapes = super().upload_shapes(counts)
        classes = int((counts > 0).sum())
        both = dict.fromkeys((LOGITS, SOFT), (classes, self.context.classes))
        return {**shapes, **both} if shapes else {}

    def beside(self, client: Client, real: Examples) -> Tensors:
        with torch.no_grad():
            parts = [
                self.view(client.tensors, some.inputs, some.lengths.tolist())[1]
                for some in (real[rows] for rows in torch.arange(len(real.labels)).split(self.options.server_batch))
            ]
        logits, present = torch.cat(parts), real.labels.unique()
        soft = torch.softmax(logits / self.options.temperature, dim=1)
        means = (class_means(values, real.labels, self.context.classes)[present] for values in (logits, soft))
        return dict(zip((LOGITS, SOFT), means, strict=True))

    def draw(self, model: Tensors, generator: torch.Generator) -> Tensors:
        fresh: Tensors = {}
        for name in self.moving(model):
            match kind(name):
                case "A":
                    fresh[name] = kaiming(tuple(model[name].shape), generator)
                case "B":
                    fresh[name] = torch.zeros_like(model[name])
                case "head" if name.endswith("weight"):
                    fresh[name] = gaussian(tuple(model[name].shape), generator, 0.02)
                case "head":
                    fresh[name] = torch.zeros_like(model[name])
                case _:
                    fresh[name] = self.context.norms[name]
        drawn = between(model, fresh, self.options.resampling)
        return with_maps(drawn, self.context.width, generator) if self.options.space == "features" else drawn

    def pull(self, client: Client, generator: torch.Generator) -> Extra | None:
        wanted = client.notes.get(LOGITS)
        if wanted is None or not self.options.lam_loc:
            return None
        told = wanted.any(dim=1)  # a class that nobody had has a row of zeros

        def distance(logits: Tensor, labels: Tensor) -> Tensor:
            along = directions(DIRECTIONS, logits.shape[1], generator)
            classes = [label for label in labels.unique().tolist() if bool(told[label])]
            each = [sliced_wasserstein(logits[labels == label], wanted[label][None], along) for label in classes]
            return self.options.lam_loc * torch.stack(each).mean() if each else logits.new_zeros(())

        return distance

    def receive(self, client: Client, message: Message) -> None:
        tensors = dict(message.tensors)
        if (wanted := tensors.pop(LOGITS, None)) is not None:
            shape = (self.context.classes, self.context.classes)
            if tuple(wanted.shape) != shape:
                raise MessageError(f"{LOGITS} has shape {tuple(wanted.shape)}; allowed: {shape}")
            client.notes[LOGITS] = wanted
        client.tensors.update(tensors)

    # -- at the server -------------------------------------------------------------------------------------------

    def check_update(self, round: int, state: State, client: str, message: Message) -> None:
        super().check_update(round, state, client, message)
        if float(message.tensors[SOFT].min()) < -0.1:  # few bits may take a zero a little below it
            raise MessageError(f"{SOFT} holds negative numbers; allowed: probabilities")

    def server(self, round: int, state: State, messages: Mapping[str, Message]) -> State:
        state = super().server(round, state, messages)
        mean, known = self._over_owners(state, messages, LOGITS)
        before = state.get(LOGITS, torch.zeros_like(mean))
        return {**state, LOGITS: torch.where(known[:, None], mean, before)}

    def _over_owners(self, state: State, messages: Mapping[str, Message], name: str) -> tuple[Tensor, Tensor]:
        """[C, C]: each class's mean over the clients that have it; [C]: which anybody has."""
        rows = torch.cat([message.tensors[name].float() for message in messages.values()])
        owned = [torch.nonzero(self.counts(state, client) > 0).squeeze(1) for client in messages]
        labels, classes = torch.cat(owned), self.context.classes
        return class_means(rows, labels, classes), torch.bincount(labels, minlength=classes) > 0

    def fitting(self, state: State, messages: Mapping[str, Message]) -> dict[str, Any]:
        if not self.options.lam_glob:
            return {}
        soft, _ = self._over_owners(state, messages, SOFT)
        soft = soft.clamp(min=LEAST)
        wanted = (soft / soft.sum(1, keepdim=True)).log()

        def divergence(logits: Tensor, labels: Tensor) -> Tensor:
            classes = labels.unique()
            made = class_means(torch.softmax(logits / self.options.temperature, dim=1), labels, len(wanted))
            ours, theirs = made[classes].clamp(min=LEAST).log(), wanted[classes]
            both = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            both = both + F.kl_div(theirs, ours, log_target=True, reduction="batchmean")
            return self.options.lam_glob * both

        return {"extra": divergence}

    def reply(self, state: State, client: str) -> Message | None:
        message = super().reply(state, client)
        if message is None or LOGITS not in state:
            return message
        return Message({**message.tensors, LOGITS: state[LOGITS]})

    def typical_reply(self, round: int, client: str) -> Message | None:
        message = super().typical_reply(round, client)
        assert message is not None
        return Message({**message.tensors, LOGITS: torch.zeros(self.context.classes, self.context.classes)})
