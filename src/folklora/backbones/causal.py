"""The task "answer this": instruction tuning of a causal language model, judged by its loss on the responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors
from folklora.backbones.batch import Batch
from folklora.backbones.classification import mean_pooled
from folklora.backbones.conversation import ConversationTokenizer, Turns
from folklora.backbones.decoder import CausalBackbone
from folklora.backbones.metric import LOSS, Score
from folklora.backbones.task import Plug
from folklora.errors import DataError, ExampleError

__all__ = ["CausalBackbone", "CausalLM", "Dialogue", "Dialogues"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialogue:
    """A prompt and its response as tokens.

    Attributes
    ----------
    tokens
        Both, one behind the other, the response's end token included.
    prompt
        How many of them are the prompt: at least one, and fewer than all.
    """

    tokens: list[int]
    prompt: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Dialogues:
    """Dialogues of K clients as one batch, and the N response tokens in it.

    Attributes
    ----------
    sources
        [N]: where, in the flattened tokens, the state lies that predicts each of them.
    wanted
        [N]: which token it is.
    owners
        [N]: the number of its sequence.
    """

    batch: Batch
    sources: Tensor
    wanted: Tensor
    owners: Tensor

    @property
    def clients(self) -> int:
        return self.batch.clients

    @property
    def sequences(self) -> int:
        return self.batch.sequences

    @property
    def sequence_offsets(self) -> tuple[int, ...]:
        return self.batch.sequence_offsets


class CausalLM:
    """What an example, a loss and an answer are when a model continues prompts; see `folklora.backbones.task`.

    Attributes
    ----------
    max_length
        Tokens of a prompt and its response together.
    """

    metric = LOSS
    answer_width = 2

    def __init__(
        self, backbone: CausalBackbone, classes: int = 1, *, template: str | None = None, max_length: int = 128
    ) -> None:
        self.backbone = backbone
        self.classes = classes
        self.conversations = ConversationTokenizer(backbone.tokenizer, template, backbone.end_tokens)
        self.max_length = min(max_length, backbone.max_length)

    @property
    def width(self) -> int:
        return self.backbone.width

    def head_shapes(self) -> Shapes:
        return {}

    def refuse_layout(self, packed: str, batch_size: int) -> None:
        self.backbone.refuse_packing(packed)

    # -- texts and tokens --------------------------------------------------------------------------------------------

    def encode(self, chats: Sequence[Turns]) -> list[Dialogue]:
        """Tokens of each conversation, cut at ``max_length``; how many were cut is logged.

        First the prompt is cut, from the left and down to a quarter of the tokens; then the response, from the right.
        One token of each is always left.

        Raises
        ------
        DataError
            If the tokenizer cannot write a conversation, or nothing of its response is left to learn.
        """
        found, prompts_cut, responses_cut, cut = [], 0, 0, 0
        for index, chat in enumerate(chats):
            try:
                prompt, response = self._prompt(chat), self.conversations.response(chat)
            except DataError as error:
                raise ExampleError(index, str(error)) from None
            if not response:
                raise ExampleError(
                    index,
                    "its response has no tokens, and the tokenizer has no token that ends one; allowed: a response "
                    "with text",
                )
            kept = response[: self.max_length - min(len(prompt), max(1, self.max_length // 4))]
            left = self._cut(prompt, self.max_length - len(kept))
            found.append(Dialogue(left + kept, len(left)))
            prompts_cut += len(left) < len(prompt)
            responses_cut += len(kept) < len(response)
            cut += len(left) + len(kept) < len(prompt) + len(response)
        if cut:
            log.warning(
                "%d of %d examples are longer than %d tokens: %d prompts cut on the left, %d responses on the right",
                *(cut, len(found), self.max_length, prompts_cut, responses_cut),
            )
        return found

    def encode_prompt(self, chat: Turns, room: int = 0) -> list[int]:
        """Tokens of what stands before the response, as in `encode`.

        Cut from the left so that one more token fits into ``max_length``, and ``room`` more into the model's positions.
        ``chat`` may end with a response, which is left out, or with a user's turn.
        """
        return self._cut(self._prompt(chat), max(1, min(self.max_length - 1, self.backbone.max_length - room)))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """What ends a response in generation; may be empty."""
        return self.conversations.end_tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, up to the first end token."""
        return self.conversations.decode(ids)

    def _prompt(self, chat: Turns) -> list[int]:
        # The first token of a text is predicted from nothing, so something must stand before a response.
        fallback = [*self.conversations.start_tokens, *self.end_tokens, self.backbone.pad_token]
        return self.conversations.prompt(chat) or fallback[:1]

    def _cut(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) <= room:
            return prompt
        # Models lean on the token that all their texts began with.
        start = prompt[:1] if room > 1 and prompt[:1] == self.conversations.start_tokens[:1] else []
        return start + prompt[len(prompt) - room + len(start) :]

    # -- losses and answers ------------------------------------------------------------------------------------------

    def lay_out(self, groups: Sequence[Sequence[Dialogue]], packed: str = "auto", *, mixed: bool = True) -> Dialogues:
        """One batch; packed where the architecture allows and ``packed`` does."""
        batch = self.backbone.batch([[example.tokens for example in group] for group in groups], packed, mixed=mixed)
        prompts = torch.tensor([example.prompt for group in groups for example in group])
        counts = torch.tensor([len(example) for group in groups for example in group]) - prompts
        owners = torch.repeat_interleave(torch.arange(batch.sequences), counts)
        within = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        sources = (batch.first + prompts - 1)[owners] + within
        return Dialogues(batch, sources, batch.tokens.reshape(-1)[sources + 1], owners)

    def losses(
        self, layout: Dialogues, labels: Tensor, stacks: Tensors, plugged: Plug, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Mean nats of each client's response tokens: [K]."""
        nats = self._nats(layout, plugged, dtype)
        owners = layout.batch.sequence_clients()[layout.owners]
        counts = torch.bincount(owners, minlength=layout.clients).to(nats.device)
        return nats.new_zeros(layout.clients).index_add(0, owners.to(nats.device), nats) / counts

    def counted(self, examples: Sequence[Dialogue]) -> int:
        """Tokens of all responses."""
        return sum(len(example) - example.prompt for example in examples)

    def answers(self, layout: Dialogues, stacks: Tensors, plugged: Plug, dtype: torch.dtype = torch.float32) -> Tensor:
        """[S, 2]: the nats of each response, and its tokens."""
        nats = self._nats(layout, plugged, dtype)
        owners = layout.owners.to(nats.device)
        sums = nats.new_zeros(layout.sequences).index_add(0, owners, nats)
        return torch.stack([sums, torch.bincount(owners, minlength=layout.sequences).float()], dim=1)

    def _nats(self, layout: Dialogues, plugged: Plug, dtype: torch.dtype | None) -> Tensor:
        hidden = self.backbone.hidden(layout.batch, plugged(layout.batch), dtype)
        states = hidden.reshape(-1, hidden.shape[-1])[layout.sources.to(hidden.device)]
        return self.backbone.nats(states, layout.wanted.to(hidden.device), dtype)

    def features(self, layout: Dialogues) -> Tensor:
        """[S, width]: the mean of the last hidden states over prompt and response."""
        return mean_pooled(self.backbone.hidden(layout.batch, None, torch.float32), layout.batch)

    def score(self, answers: np.ndarray, labels: np.ndarray) -> Score:
        """Nats of all response tokens; beside them the perplexity, e to the nats of a token."""
        nats, tokens = float(answers[:, 0].sum(dtype=np.float64)), round(float(answers[:, 1].sum(dtype=np.float64)))
        return Score(nats, tokens, {"perplexity": _exp(nats / tokens)} if tokens else {})


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
