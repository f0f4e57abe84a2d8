"""A conversation with one client's own model, out of a run or a member's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from folklora.backbones.causal import CausalLM
from folklora.data.columns import why_not_text
from folklora.errors import DataError, RunError
from folklora.federation.run import ClientModel, client_model, recipe_of
from folklora.randomness import derive
from folklora.training.generation import (
    LOST,
    Sampling,
    prompt_tokens,
    refuse_speechless,
    room,
    stream,
    whole_length,
)
from folklora.training.prediction import Question

log = logging.getLogger(__name__)

INCOMPLETE = "\ufffd"
"""What the first bytes of a character are decoded as, until its last one is there."""


class Conversation:
    """What was said so far, and the model that goes on from there.

    Attributes
    ----------
    turns
        (role, content) of each turn that is remembered; the oldest are forgotten when the model has no room for them.
    keeps
        Whether earlier turns are remembered at all: without a chat template, or where ``model.template`` stands in its
        place, there is no way to write them down.
    """

    def __init__(self, model: ClientModel, *, max_new_tokens: int = 256, sampling: Sampling | None = None) -> None:
        refuse_speechless(model.setup.task)
        task = model.setup.task
        assert isinstance(task, CausalLM)
        self.task = task
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        self.keeps = task.conversations.chat_template is not None
        self.turns: list[tuple[str, str]] = []
        self.said = 0

    def say(self, text: str) -> Iterator[str]:
        """The model's answer in pieces, as they come; together with the question it is then part of the conversation.

        Raises
        ------
        DataError
            If the text is empty or not valid Unicode, or the tokenizer's chat template refuses it.
        RunError
            If the model gives no finite numbers.
        """
        if problem := why_not_text(text):
            raise DataError(f"the prompt is {problem}; allowed: a text")
        own = self.model
        question = Question(own.client, own.rank, own.tensors, [self._prompt(text)])
        seed = derive(self.sampling.seed, "chat", own.client, self.said)
        sampling = Sampling(self.sampling.temperature, self.sampling.top_p, seed)
        ids: list[int] = []
        shown = ""
        adapter = own.setup.method.adapter
        for _, _, token in stream(self.task, adapter, [question], self.max_new_tokens, sampling=sampling):
            if token == LOST:
                raise RunError(f"client {own.client}: its model diverged and gives no finite number")
            ids.append(token)
            answer = self.task.decode(ids)
            if not answer.endswith(INCOMPLETE) and len(answer) > len(shown):
                yield answer[len(shown) :]
                shown = answer
        answer = self.task.decode(ids)
        if len(answer) > len(shown):
            yield answer[len(shown) :]
        self.said += 1
        if self.keeps:
            self.turns += [("user", text), ("assistant", answer)]

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def _prompt(self, text: str) -> list[int]:
        """The conversation up to this text, as tokens; what it has no room for is forgotten, the oldest first."""
        while True:
            chat = [*self.turns, ("user", text)]
            prompt = prompt_tokens(self.task, chat, self.max_new_tokens)
            whole = whole_length(self.task, chat)
            if len(prompt) >= whole:
                return prompt
            if not self.turns:
                why = room(self.task, self.max_new_tokens)
                log.warning("the prompt has %d tokens, all but the last %d are cut: %s", whole, len(prompt), why)
                return prompt
            self.turns = self.turns[2:]
            log.warning("the conversation is longer than the model has room for: its oldest question is forgotten")


def open_conversation(
    path: str | Path,
    client: str,
    *,
    tuned: bool = False,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
) -> Conversation:
    """A conversation with the model that a client ended with; see `folklora.federation.run.client_model`.

    Raises
    ------
    RunError
        If the run's models write no text, or there is no such client or model.
    """
    task = recipe_of(path).model.task
    if task != "causal-lm":
        raise RunError(f'{path}: model.task = "{task}" writes no text; allowed: a run with model.task = "causal-lm"')
    return Conversation(
        client_model(path, client, tuned=tuned, rows=False), max_new_tokens=max_new_tokens, sampling=sampling
    )
