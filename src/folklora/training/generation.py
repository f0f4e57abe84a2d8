"""Text from each client's own model, many clients and prompts in one batch.

Rows are prompts, padded on the left, with a cache of keys and values behind them; each step gives every row one token.
A row that is done leaves the batch with its part of the cache, and prompts that wait take its place, like continuous
batching. A client's rows are consecutive, so that its adapter is one group of rows as everywhere else.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.lowrank import LowRank
from folklora.backbones.batch import Batch, TokenIds
from folklora.backbones.causal import CausalLM
from folklora.backbones.conversation import Turns
from folklora.backbones.task import Plug
from folklora.errors import BackboneError, RecipeError
from folklora.randomness import numpy_generator
from folklora.training.prediction import Plugged, Question, stacked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes
    ----------
    temperature
        What logits are divided by before one is drawn; 0: the likeliest token, without chance.
    top_p
        Only the likeliest tokens that together have at least this probability are drawn from.
    seed
        Where the numbers of a prompt follow from, with the client and the prompt's place among the client's.

    Raises
    ------
    RecipeError
        If ``temperature`` or ``top_p`` is not a number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.temperature) or math.isnan(self.top_p):
            raise RecipeError("--temperature and --top-p; allowed: numbers")


GREEDY = Sampling()

LOST = -1
"""In place of a token where a model gives no finite numbers; its answer ends there."""

_CACHED = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layers that need nothing of earlier tokens but keys and values."""


def _keeps_a_state(model: Any) -> bool:
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return bool(getattr(model, "_is_stateful", False)) or not _CACHED.issuperset(kinds or ())


def refuse_speechless(task: Any) -> None:
    """Raises BackboneError if nothing can be generated with a task."""
    if not isinstance(task, CausalLM):
        raise BackboneError('the model writes no text; allowed: model.task = "causal-lm"')
    if task.backbone.run(_keeps_a_state, None, torch.float32):
        raise BackboneError(
            f"model.name: {task.backbone.model_type} keeps a state in place of keys and values, and answers for many "
            "clients are generated with keys and values only; allowed: a transformer"
        )


def prompt_tokens(task: CausalLM, chat: Turns, max_new_tokens: int) -> list[int]:
    """A prompt as `CausalLM.encode_prompt` makes it, cut so that the answer has room, if not more than the half."""
    return task.encode_prompt(chat, min(max_new_tokens, task.backbone.max_length // 2))


def prompts_tokens(task: CausalLM, chats: Sequence[Turns], max_new_tokens: int) -> list[list[int]]:
    """`prompt_tokens` of each; how many were cut is logged."""
    found = [prompt_tokens(task, chat, max_new_tokens) for chat in chats]
    if cut := sum(len(ids) < whole_length(task, chat) for ids, chat in zip(found, chats, strict=True)):
        log.warning("%d of %d prompts are cut on the left: %s", cut, len(found), room(task, max_new_tokens))
    return found


def whole_length(task: CausalLM, chat: Turns) -> int:
    """Tokens of a prompt that is not cut."""
    return len(task.conversations.prompt(chat))


def room(task: CausalLM, max_new_tokens: int) -> str:
    """What leaves a prompt no more room, in words."""
    answer = f"{max_new_tokens} tokens (max_new_tokens) of an answer in the model's {task.backbone.max_length}"
    return f"it must fit into model.max_length = {task.max_length}, and beside {answer}"


def generate(
    task: CausalLM,
    adapter: LowRank,
    questions: Sequence[Question],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    tokens: int = 8192,
    dtype: torch.dtype = torch.float32,
    plugged: Plugged | None = None,
) -> dict[str, list[list[int] | None]]:
    """What each client's model says to each of its prompts, as token ids without the one that ends it.

    None where the model gives no finite numbers: it diverged, and has nothing to say. The answer to a prompt does not
    depend on what else is in the batch, but for the rounding of sums.

    Parameters
    ----------
    questions
        Of one client each; their examples are prompts, as `prompt_tokens` makes them.
    max_new_tokens
        Where an answer ends at the latest; it also ends where the model has no more positions.
    tokens
        About how many tokens are in the cache at once, over all prompts in the batch.
    dtype, plugged
        As in `folklora.training.prediction.predict`.

    Raises
    ------
    BackboneError
        If a prompt leaves the model no position for an answer, or of `refuse_speechless`.
    """
    answers: dict[str, list[list[int] | None]] = {q.client: [[] for _ in q.examples] for q in questions}
    made = stream(
        task, adapter, questions, max_new_tokens, sampling=sampling, tokens=tokens, dtype=dtype, plugged=plugged
    )
    for client, prompt, token in made:
        so_far = answers[client][prompt]
        if token == LOST:
            answers[client][prompt] = None
        elif so_far is not None:
            so_far.append(token)
    return answers


def stream(
    task: CausalLM,
    adapter: LowRank,
    questions: Sequence[Question],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    tokens: int = 8192,
    dtype: torch.dtype = torch.float32,
    plugged: Plugged | None = None,
) -> Iterator[tuple[str, int, int]]:
    """As `generate`, each token as soon as it is there: (client, number of the prompt, token or, at last, `LOST`)."""
    refuse_speechless(task)
    waiting = deque(_rows(task, questions, max_new_tokens, sampling))
    live = _Live(task, questions, dtype, plugged or partial(stacked, task, adapter))
    while waiting or live.rows:
        room = tokens - sum(row.most for row in live.rows)
        if waiting and (not live.rows or room >= max(tokens // 4, waiting[0].most)):
            admitted = [waiting.popleft()]
            room -= admitted[0].most
            while waiting and waiting[0].most <= room:
                room -= waiting[0].most
                admitted.append(waiting.popleft())
            rows, logits = admitted, live.admit(admitted)
        else:
            rows, logits = live.rows, live.step()
        for row, token in zip(rows, _choose(logits, rows, sampling), strict=True):
            if token in task.end_tokens:
                row.done = True
            elif token == LOST:
                row.done = True
                yield questions[row.question].client, row.number, LOST
            else:
                row.made.append(token)
                row.done = len(row.prompt) + len(row.made) == row.most
                yield questions[row.question].client, row.number, token
        live.release()


@dataclass
class _Row:
    """One prompt and its answer so far."""

    question: int
    number: int
    prompt: TokenIds
    most: int  # tokens, the prompt's included
    chance: np.random.Generator
    made: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the newest."""
        return len(self.prompt) + len(self.made) - 1


def _rows(task: CausalLM, questions: Sequence[Question], max_new_tokens: int, sampling: Sampling) -> Iterator[_Row]:
    """Client after client; of a client the long prompts first, so that those admitted together are of like length."""
    limit = task.backbone.max_length
    for k, question in enumerate(questions):
        for i in sorted(range(len(question.examples)), key=lambda i: -len(question.examples[i])):
            prompt: Any = question.examples[i]
            if not 0 < len(prompt) < limit:
                raise BackboneError(
                    f"client {question.client}: a prompt of {len(prompt)} tokens; allowed: 1 to {limit - 1}, "
                    "so that the model has a position left for an answer"
                )
            most = min(len(prompt) + max_new_tokens, limit)
            yield _Row(k, i, prompt, most, numpy_generator(sampling.seed, "generate", question.client, i))


class _Live:
    """The rows that are being written, and the cache behind them, aligned at its right end."""

    def __init__(self, task: CausalLM, questions: Sequence[Question], dtype: torch.dtype, plugged: Plugged) -> None:
        self.task = task
        self.questions = questions
        self.dtype = dtype
        self.plugged = plugged
        self.rows: list[_Row] = []
        self.cache: Any = None
        self.owners: tuple[list[int], Plug] | None = None

    def admit(self, rows: list[_Row]) -> Tensor:
        """Read the prompts of new rows and put them behind the others: the logits of their first tokens."""
        from transformers import DynamicCache

        cache = DynamicCache()  # not of the model's layers: one that slides would lose what a longer row still sees
        logits = self._forward(rows, [row.prompt for row in rows], cache)
        if self.rows:
            _join(self.cache, cache)
        else:
            self.cache = cache
        self.rows = self.rows + rows
        return logits

    def step(self) -> Tensor:
        """The logits of every row's next token."""
        return self._forward(self.rows, [row.made[-1:] for row in self.rows], self.cache)

    def release(self) -> None:
        """Let the rows go that are done, with their part of the cache."""
        kept = [i for i, row in enumerate(self.rows) if not row.done]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if self.rows:
            self.cache.batch_select_indices(torch.tensor(kept, device=self.task.backbone.device))
            _narrow(self.cache, max(row.cached for row in self.rows))

    @torch.no_grad()
    def _forward(self, rows: Sequence[_Row], tokens: Sequence[TokenIds], cache: Any) -> Tensor:
        """Run the rows' newest tokens, which `tokens` are, on top of the cache: [rows, vocabulary] float32."""
        device = self.task.backbone.device
        owners = [(k, len(list(group))) for k, group in groupby(rows, key=lambda row: row.question)]
        lengths = torch.tensor([len(row.prompt) + len(row.made) for row in rows])
        batch = _left_padded(tokens, lengths, [count for _, count in owners], self.task.backbone.pad_token).to(device)
        width = cache.get_seq_length() + batch.row_length
        bank = self._plug([k for k, _ in owners])(batch)
        inputs = {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "attention_mask": (torch.arange(width) >= width - lengths[:, None]).long().to(device),
            "logits_to_keep": 1,
        }

        def call(model: Any) -> Tensor:
            known = inspect.signature(model.forward).parameters
            taken = {name: value for name, value in inputs.items() if name in known}
            logits: Tensor = model(**taken, past_key_values=cache, use_cache=True).logits
            return logits[:, -1].float()

        return self.task.backbone.run(call, bank, self.dtype)

    def _plug(self, owners: list[int]) -> Plug:
        """What plugs in the clients of these questions; made anew when others are asked for than the last time."""
        if self.owners is None or self.owners[0] != owners:
            self.owners = owners, self.plugged([self.questions[k] for k in owners])[1]
        return self.owners[1]


def _left_padded(tokens: Sequence[TokenIds], lengths: Tensor, counts: Sequence[int], pad_token: int) -> Batch:
    """The newest tokens of some rows as a batch, one row each, aligned right; client k has ``counts[k]`` rows.

    ``lengths`` are those of the whole rows: a row's last token has the position before it.
    """
    width = max(map(len, tokens))
    padded = torch.tensor([[pad_token] * (width - len(row)) + list(row) for row in tokens])
    own = torch.tensor([len(row) for row in tokens])
    real = torch.arange(width) >= width - own[:, None]
    numbers = torch.arange(len(tokens))[:, None]
    offsets = (0, *np.cumsum(counts).tolist())
    last = (numbers[:, 0] + 1) * width - 1
    return Batch(
        tokens=padded,
        positions=torch.where(real, lengths[:, None] - width + torch.arange(width), 0),
        segments=torch.where(real, numbers, -1),
        token_offsets=tuple(width * offset for offset in offsets),
        sequence_offsets=offsets,
        first=last - own + 1,
        last=last,
        packed=False,
    )


def _join(cache: Any, other: Any) -> None:
    """Put the rows of another cache behind those of the first; the narrower one is padded on the left."""
    width = max(cache.get_seq_length(), other.get_seq_length())
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            both = [getattr(layer, name) for layer in (mine, theirs)]
            setattr(mine, name, torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in both]))


def _narrow(cache: Any, width: int) -> None:
    """Forget what is left of the longest row."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -width:], layer.values[:, :, -width:]


def _choose(logits: Tensor, rows: Sequence[_Row], sampling: Sampling) -> list[int]:
    """The next token of each row, or `LOST`."""
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        tokens = draw(logits, torch.tensor([row.chance.random() for row in rows]), sampling)
    finite = torch.isfinite(logits.amax(dim=-1))  # what is not a number is its row's largest
    found: list[int] = torch.where(finite, tokens, LOST).tolist()
    return found


def draw(logits: Tensor, chances: Tensor, sampling: Sampling) -> Tensor:
    """Tokens [n] from logits [n, vocabulary], where numbers in [0, 1) fall among the cumulated probabilities."""
    logits = logits.double() - logits.amax(dim=-1, keepdim=True)  # before it is divided by next to nothing
    spread = torch.softmax(logits / sampling.temperature, dim=-1)
    probabilities, order = spread.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < sampling.top_p, probabilities, 0.0)
    kept[:, 0] = probabilities[:, 0]
    sums = kept.cumsum(dim=-1)
    wanted = chances.to(sums)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[-1] - 1)
    return order.gather(1, places)[:, 0]
