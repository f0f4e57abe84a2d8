"""A frozen causal language model with sockets for adapters, and how surprised it is by given tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from folklora.adapters.layers import Bank
from folklora.backbones import lowbit
from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import Batch
from folklora.backbones.frozen import Settings, Wishes, adaptable, choose_targets, settled
from folklora.backbones.loading import config_of, tokenizer_of
from folklora.backbones.slopes import felt
from folklora.errors import BackboneError

PACKABLE = frozenset(
    {"cohere", "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2"}
    | {"phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"}
)
"""Decoders that take position ids and a mask per pair of tokens as they are, unless they look through a window only."""

LOGITS = 2**26
"""Numbers of a [tokens, vocabulary] matrix that is made at a time: 256 MB in float32."""


class CausalBackbone(Backbone):
    """A decoder with its language-model head; sites are named as in the whole model, and the head is none of them.

    Attributes
    ----------
    vocabulary
        Rows of the head: tokens that it can predict.
    end_tokens
        Tokens that end a text, by the model's own configuration.
    """

    def __init__(self, model: Any, tokenizer: Any, **settings: Unpack[Settings]) -> None:
        head = model.get_output_embeddings()
        self._body = _name_of(model, model.get_decoder())
        self._head = _name_of(model, head)
        super().__init__(model, tokenizer, **settings)
        self.vocabulary, self.width = head.weight.shape
        self.packable = self.model_type in PACKABLE and not _looks_through_window(self.config)
        self.end_tokens = _end_tokens(model, self.vocabulary)
        highest = max(tokenizer.get_vocab().values())
        if highest >= self.vocabulary:
            raise BackboneError(
                f"model.name: the tokenizer has tokens up to {highest}, and the model {self.vocabulary} of them; "
                "allowed: the tokenizer that the model was trained with"
            )

    @classmethod
    def load(cls, name: str, *, quantize: str = "none", **wishes: Unpack[Wishes]) -> CausalBackbone:
        """Load a language model by folder or hub id.

        Raises
        ------
        BackboneError
            If it cannot be found or read, or is none.
        """
        from transformers import AutoModelForCausalLM

        settings = settled(wishes)
        _refuse_encoders(name)
        model = lowbit.pretrained(name, AutoModelForCausalLM, quantize, torch.device(settings["device"]))
        return cls(
            model,
            tokenizer_of(name),
            **settings,
        )

    def targets(self, model: nn.Module, targets: str) -> list[str]:
        return choose_targets([name for name in adaptable(model) if name != self._head], targets, self.model_type)

    def attention(self, model: Any) -> str:
        return "sdpa" if model._supports_sdpa else "eager"

    def refuse_packing(self, packed: str) -> None:
        if packed == "always" and not self.packable:
            raise BackboneError(
                f'train.packed = "always": this {self.model_type} has no packed path; allowed: "auto" or "never" '
                f"(packed: {', '.join(sorted(PACKABLE))}, unless attention looks through a window)"
            )

    def hidden(self, batch: Batch, bank: Bank | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The last hidden states [rows, L, d], in the compute ``dtype`` (default: the training dtype)."""
        batch = batch.to(self.device)
        arguments: dict[str, Tensor] = {"input_ids": batch.tokens}
        # Padding comes behind a row's only sequence, so no token of it looks there: no mask is the fastest one.
        if batch.packed:
            arguments["position_ids"] = batch.positions
            arguments["attention_mask"] = _mask(batch, dtype or self.dtype)

        def states(model: Any) -> Tensor:
            found: Tensor = model.get_submodule(self._body)(**arguments, use_cache=False).last_hidden_state
            return found

        return self.run(states, bank, dtype)

    def nats(self, states: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``-log p`` of the ``wanted`` tokens [N] after the last hidden ``states`` [N, d]: [N] float32."""
        shell = _with_states_given(self._model(dtype or self.dtype), self._body.split("."))

        def logits(states: Tensor) -> Tensor:
            found: Tensor = shell(inputs_embeds=states[None], use_cache=False).logits[0]
            return found

        rows = max(1, LOGITS // self.vocabulary)
        if len(states) <= rows:
            return F.cross_entropy(felt(logits(states).float()), wanted, reduction="none")
        found: Tensor = _Nats.apply(states, wanted, logits, rows)
        return found

    def tokens_digest(self) -> bytes:
        return super().tokens_digest() + (getattr(self.tokenizer, "chat_template", None) or "").encode()


class _Nats(torch.autograd.Function):
    """Cross-entropy of many tokens in a big vocabulary, without ever holding all their logits.

    The head is frozen, so all that the way back needs of a token is the slope of its own loss in its own state: it is
    made while its logits are there, and they are not made twice.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, logits: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        sloped = ctx.needs_input_grad[0]
        nats, slopes = [], []
        for some, tokens in zip(states.split(rows), wanted.split(rows), strict=True):
            with torch.set_grad_enabled(sloped):
                own = some.detach().requires_grad_(sloped)
                each = F.cross_entropy(felt(logits(own).float()), tokens, reduction="none")
                if sloped:
                    slopes += torch.autograd.grad(each.sum(), own)
            nats.append(each.detach())
        ctx.save_for_backward(torch.cat(slopes) if sloped else None)
        return torch.cat(nats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return grad[:, None].to(slopes.dtype) * slopes, None, None, None


class _Given(nn.Module):
    """In the place of a model's body: gives back what it is given, and nothing of what a body may give beside it."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _States(last_hidden_state=inputs_embeds)


class _States(SimpleNamespace):
    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


def _with_states_given(model: nn.Module, body: list[str]) -> nn.Module:
    """The model with no body: all that it does to the last hidden states (scales, caps) stays, whatever it is.

    A shallow copy: the weights are the model's own.
    """
    shell = copy.copy(model)
    first, *rest = body
    inner = _with_states_given(model.get_submodule(first), rest) if rest else _Given()
    shell._modules = {**model._modules, first: inner}
    return shell


def _mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """[rows, 1, L, L], to be added to attention's scores: what a token sees is its own sequence up to itself."""
    segments = batch.segments
    seen = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _looks_through_window(config: Any) -> bool:
    if (kinds := getattr(config, "layer_types", None)) is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _end_tokens(model: Any, vocabulary: int) -> tuple[int, ...]:
    found: list[int] = []
    for config in (getattr(model, "generation_config", None), model.config):
        ends = getattr(config, "eos_token_id", None)
        found += ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(token for token in dict.fromkeys(found) if 0 <= token < vocabulary)


def _name_of(model: nn.Module, wanted: object) -> str:
    found = [name for name, module in model.named_modules() if module is wanted and name]
    if not found:
        raise BackboneError(
            f"model.name: {type(model).__name__} has no decoder with a head for words; allowed: a causal language model"
        )
    return found[0]


def _refuse_encoders(name: str) -> None:
    from transformers.models.auto import modeling_auto as auto

    kind = config_of(name).model_type
    # Encoders can be asked to generate too (BERT as a decoder), but only they can fill a mask.
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise BackboneError(
            f'model.task = "causal-lm": model.name = "{name}" is a {kind}, which does not continue texts; allowed: '
            "a decoder with a language-model head, such as llama, qwen3, mistral or gpt2"
        )
