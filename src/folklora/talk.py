"""`folklora chat` at the terminal: what is typed or piped in, and answers as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import typer

from folklora.errors import DataError, FolkLoraError
from folklora.federation.chat import Conversation
from folklora.terminal import err, out, print_json, still

HELP = "/reset forgets what was said, /quit or Ctrl-D ends"


def talk(conversation: Conversation, prompt: str | None = None, *, as_json: bool = False) -> None:
    """Answer one prompt, or each line of standard input until it ends, or until Ctrl-C.

    With ``as_json`` all questions and answers are one document at the end: ``[{"prompt": ..., "answer": ...}]``. Where
    a question is refused, it holds those before.
    """
    said: list[dict[str, str]] = []
    stopped = False
    try:
        for text in [prompt] if prompt is not None else _questions(conversation):
            answer = _shown(conversation.say(text), quiet=as_json)
            said.append({"prompt": text, "answer": answer})
    except KeyboardInterrupt:
        stopped = True
        err.print()
    except FolkLoraError:
        if as_json and said:
            print_json(said)
        raise
    if as_json:
        print_json(said)
    if stopped:
        raise typer.Exit(130)


def _questions(conversation: Conversation) -> Iterator[str]:
    """What was typed, but for commands and empty lines."""
    if sys.stdin.isatty():
        err.print(HELP)
    if not conversation.keeps:
        err.print(
            "note: each question stands alone: the tokenizer has no chat template, or model.template takes its place",
            soft_wrap=True,
        )
    for line in _lines():
        match line.strip():
            case "/quit":
                return
            case "/reset":
                conversation.reset()
            case "":
                pass
            case text:
                yield text


def _lines() -> Iterator[str]:
    try:
        if sys.stdin.isatty():
            yield from _typed()
        else:
            yield from sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 text: {error.reason}") from None


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  # being there is enough: `input` then edits lines and remembers them

    while True:
        try:
            if out.is_terminal:
                yield input("> ")
            else:
                err.print("> ", end="")
                yield input()
        except EOFError:
            err.print()
            return


def _shown(pieces: Iterable[str], *, quiet: bool) -> str:
    """The whole answer; unless ``quiet``, its pieces appear as they come, and nothing in them moves the terminal."""
    answer = ""
    for piece in pieces:
        answer += piece
        if not quiet:
            sys.stdout.write(still(piece))
            sys.stdout.flush()
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return answer
