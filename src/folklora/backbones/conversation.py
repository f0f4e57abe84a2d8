"""Conversations as tokens: the prompt, and the response that is learnt.

Of a conversation the last turn is the response and all that stands before it the prompt. The loss is on the response
only, and of several assistant turns on the last one only: an example is then what generation is asked for and what an
answer is compared with, and templates that write earlier turns differently (without their reasoning, say) stay right.
Who wants every turn learnt makes an example of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from folklora.errors import BackboneError, DataError, first_line

Turns = Sequence[tuple[str, str]]
"""(role, content) of each turn."""

PLAIN = "{}\n"
"""What stands around a prompt where neither the recipe nor the tokenizer says."""

FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
"""Put before a chat template: templates that write the day's date would give other tokens tomorrow. The line break is
the block's own, and the template begins on a line as it does alone."""

MARKER = "folklora-answer"
"""A response that no template has in what it writes around one."""


class ConversationTokenizer:
    """A tokenizer, with its chat template or a plain one.

    Parameters
    ----------
    template
        Text with one "{}", the prompt's place. Goes before the tokenizer's chat template; only a single question and
        its answer fit into it.
    end_tokens
        What else ends a response, beside the tokenizer's own: the model's configuration knows.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, end_tokens: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.chat_template: str | None = None
        if template is None and getattr(tokenizer, "chat_template", None):
            self.chat_template = FIXED_DATE + _own_template(tokenizer)
        self.template = PLAIN if template is None else template
        self._further_ends = tuple(end_tokens)

    def prompt(self, chat: Turns) -> list[int]:
        """Tokens of all that stands before the response, which may be in ``chat`` or yet to come."""
        if self.chat_template is None:
            return self.start_tokens + self._ids(self._plain_prompt(chat))
        return self._ids(self._opening(chat))

    def response(self, chat: Turns) -> list[int]:
        """Tokens of the response, its end token included where the tokenizer has one."""
        if self.chat_template is None:
            ids = self._following(self._plain_prompt(chat), chat[-1][1])
        else:
            before, all_ = self._opening(chat), self._rendered(chat, complete=True)
            if not all_.startswith(before):
                raise BackboneError(
                    "model.name: the tokenizer's chat template does not write a conversation as its prompt and then "
                    'the response; give model.template, a text with one "{}", in its place'
                )
            ids = self._following(before, all_[len(before) :])
            last = max((i for i, token in enumerate(ids) if token in self.end_tokens), default=None)
            if last is not None:
                return ids[: last + 1]  # what a template writes behind it, a line break, is nobody's to learn
        return ids + list(self.end_tokens[:1])

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a response, the one that is learnt first; empty where the tokenizer has none."""
        found: list[int] = []
        if self.chat_template is not None:
            found += self._template_ends()
        if self.tokenizer.eos_token_id is not None:
            found.append(int(self.tokenizer.eos_token_id))
        return tuple(dict.fromkeys([*found, *self._further_ends]))

    @cached_property
    def start_tokens(self) -> list[int]:
        """What the tokenizer puts before a text of its own accord: often a beginning-of-sequence token."""
        with_special, bare = self.tokenizer("a")["input_ids"], self._ids("a")
        for start in range(len(with_special) - len(bare) + 1):
            if with_special[start : start + len(bare)] == bare:
                return list(with_special[:start])
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response: up to its first end token, without special tokens and outer white space."""
        end = next((i for i, token in enumerate(ids) if token in self.end_tokens), len(ids))
        text: str = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        return text.strip()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _following(self, before: str, text: str) -> list[int]:
        """Tokens of a text where it stands behind another: alone, some tokenizers would put a space before it."""
        alone, both = self._ids(before), self._ids(before + text)
        # Where the two share a token, what generation begins with is the other text alone.
        return both[len(alone) :] if both[: len(alone)] == alone else self._ids(text)

    def _opening(self, chat: Turns) -> str:
        """All that stands before what the last turn says.

        Some templates write more there than their generation prompt has, an empty block of thoughts (Qwen3) or who
        speaks: that is given, and no part of the response. A space is left to the word behind it.
        """
        turns = _before(chat)
        before = self._rendered(turns)
        marked = self._rendered([*turns, ("assistant", MARKER)], complete=True)
        head, found, _ = marked[len(before) :].partition(MARKER)
        head = head.rstrip(" ")
        if not (marked.startswith(before) and found and head.strip()):
            return before
        # A response may bring thoughts of its own in place of the empty block.
        told = marked if len(turns) == len(chat) else self._rendered(chat, complete=True)
        return before + head if told.startswith(before + head) else before

    def _plain_prompt(self, chat: Turns) -> str:
        turns = _before(chat)
        if [role for role, _ in turns] != ["user"]:
            raise DataError(
                f"a conversation of the roles {', '.join(role for role, _ in chat)} needs a chat template, which the "
                "tokenizer has not (or model.template stands in its place); allowed: a prompt and its response"
            )
        return self.template.replace("{}", turns[0][1])

    def _rendered(self, chat: Turns, *, complete: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=not complete
            )
        except Exception as error:  # a template is a program, and may end as any other
            raise DataError(
                f"the tokenizer's chat template refuses a conversation of the roles "
                f"{', '.join(role for role, _ in chat)}: {first_line(error)}; "
                "allowed: the turns that it takes, or model.template"
            ) from None
        return text

    def _template_ends(self) -> list[int]:
        """The special token that the template writes behind a response."""
        text = self._rendered([("user", "question"), ("assistant", MARKER)], complete=True)
        _, found, tail = text.rpartition(MARKER)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return [token for token in self._ids(tail) if token in special][:1] if found else []


def _before(chat: Turns) -> Turns:
    """The turns before the response."""
    return chat[:-1] if chat[-1][0] == "assistant" else chat


def _own_template(tokenizer: Any) -> str:
    """The tokenizer's chat template; of several the one named default."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # there are several, and none has that name
        template = None
    if not isinstance(template, str):
        raise BackboneError("the tokenizer's chat template is no text; allowed: one text, or model.template")
    return template
