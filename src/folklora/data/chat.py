"""Conversations: from prompt and response columns, or from a column of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from folklora.data.columns import Columns, either, short, why_not_text
from folklora.errors import DataError, first_line

Chat = tuple[tuple[str, str], ...]
"""(role, content) of each turn; roles are system, user and assistant, and the last turn is the assistant's."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
SPELLINGS = (("role", "content"), ("from", "value"))
MESSAGES = 'a list of {"role", "content"} or {"from", "value"}'


def from_columns(columns: Columns, row: int, prompt: str, response: str, context: str | None) -> Chat:
    """A question and its answer; a context that is not empty stands before the question, a blank line between them.

    Before it, for a prompt that is too long loses its beginning: better a part of the context than what is asked.
    """
    question = columns.string(row, prompt)
    if context is not None and why_not_text(columns.values[context][row]) not in ("missing", "empty"):
        question = f"{columns.string(row, context)}\n\n{question}"
    return (("user", question), ("assistant", columns.string(row, response)))


def from_messages(columns: Columns, row: int, column: str) -> Chat:
    """The turns of a list of messages; where a cell cannot hold a list, of the same as JSON.

    A system's turn comes first and may be empty, all others have content; before the last turn, the assistant's, there
    is a user's. Keys of a message beside its role and content are not read.
    """

    def wrong(problem: str, allowed: str) -> DataError:
        return columns.blame(row, column, f"{problem}; allowed: {allowed}")

    messages = columns.values[column][row]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise wrong(f"not JSON: {first_line(error)}", MESSAGES) from None
    if not isinstance(messages, list) or not messages:
        raise wrong("missing" if messages in (None, []) else f"{short(messages)} is no list", MESSAGES)
    turns = []
    for number, message in enumerate(messages, start=1):
        keys = _spelling(message)
        if keys is None:
            raise wrong(f"message {number}: {short(message)}", MESSAGES)
        role, content = (message.get(key) for key in keys)
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(f"message {number}: role {short(role)}", either(ROLES))
        role = ROLES[role]
        if role == "system" and number > 1:
            raise wrong(f"message {number}: role 'system'", "a system's message first, if there is one")
        problem = why_not_text(content)
        if problem and not (role == "system" and problem == "empty"):
            raise wrong(f"message {number}: content is {problem}", "a non-empty string")
        turns.append((role, content))
    if turns[-1][0] != "assistant" or "user" not in [role for role, _ in turns]:
        roles = ", ".join(role for role, _ in turns[-3:])
        raise wrong(f"ends with the roles {roles}", "a user's message and last an assistant's, the response")
    return tuple(turns)


def _spelling(message: Any) -> tuple[str, str] | None:
    """The keys of a message's role and content; None where it has no role."""
    if isinstance(message, Mapping):
        for keys in SPELLINGS:
            if keys[0] in message:
                return keys
    return None
