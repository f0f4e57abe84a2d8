"""The errors a user can act on.

Every class below is *the user's* mistake or the user's world (a typing error in a recipe, a broken row, a full disk, a
malformed message): the command line prints its message as one line and exits with code 2. Anything else that is raised
is our mistake and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: str) -> str:
    """Text that may come from anywhere, as one line that a terminal only shows: what cannot be printed is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FolkLoraError(Exception):
    """Base of all errors that name what is wrong, where, and what is allowed; the message is one line."""

    def __init__(self, message: str) -> None:
        # What it quotes (a key, a path, another library's words) may hold line breaks.
        super().__init__(one_line(message))


class RecipeError(FolkLoraError):
    """A recipe has an unknown key, a wrong type, or an impossible combination."""


class DataError(FolkLoraError):
    """A data source cannot be read, a row is broken, or a split is impossible."""


class ExampleError(DataError):
    """An example that a model cannot take; who knows where it is from says so (`folklora.data.table.encoded`).

    Attributes
    ----------
    index
        Of the example, from 0 on.
    problem
        What is wrong with it, and what is allowed.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"example {index + 1}: {problem}")
        self.index = index
        self.problem = problem


class BackboneError(FolkLoraError):
    """A backbone cannot be found, does not verify, or cannot do what the recipe asks."""


class MethodError(FolkLoraError):
    """A federated method is unknown or cannot run under this recipe."""


class MessageError(FolkLoraError):
    """A message that came over the wire is malformed, oversized or not what was agreed."""


class RunError(FolkLoraError):
    """A run directory cannot be written, is corrupted, or does not hold what is asked of it."""


class FederationError(FolkLoraError):
    """A federation's folder, keys or certificates, or the connection to it, are not what is needed."""


class PlanError(FolkLoraError):
    """Measured runs do not say how well others would do, or nothing is within the budget."""


class AttackError(FolkLoraError):
    """An attack is unknown, or cannot be made on this task, method or run."""


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """In words: there is no such thing, which one may be meant, and which there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no such {what}{hint} (allowed: {', '.join(known)})"


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
