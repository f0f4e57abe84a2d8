"""A file of requests, many clients' in one: read to its end before anything is answered, answered in one go.

A line is a JSON object with the client and what its model is asked: ``{"client": "3", "text": "my card is lost"}``.
What that is called follows from the run's task; see `FIELDS`. Pictures are files in the folder of the requests, or
below it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from folklora.data.columns import Columns, either, listed, short
from folklora.data.pictures import opened
from folklora.data.readers import json_lines
from folklora.errors import DataError, RunError
from folklora.federation.answers import Precision, Request, refuse_length, respond
from folklora.federation.files import reported, write_whole
from folklora.federation.run import client_models, clients_of, recipe_of
from folklora.recipe import Recipe

CLIENT = "client"

FIELDS: Mapping[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("classification", "text"): (("text",), ()),
    ("classification", "image"): (("image",), ()),
    ("image-text", "image"): (("image",), ("texts",)),
    ("image-text", "caption"): (("image", "texts"), ()),
    ("causal-lm", "chat"): (("prompt",), ()),
}
"""(task, form of its examples) -> what a request must have beside its client, and what it may have."""


def predict_requests(
    path: str | Path,
    requests: str | Path,
    out: str | Path | None = None,
    *,
    precision: Precision = "float32",
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """The answers to a file of requests, in its order; each has the client, what was asked and what was said.

    Parameters
    ----------
    path
        A run directory, or the folder that a member keeps of a network run.
    out
        A new file for the answers, one a line.
    precision
        What the models compute in.
    max_new_tokens
        Of an answer, at most; default: the recipe's ``eval.max_new_tokens``.

    Raises
    ------
    DataError
        If a line is not what it must be; nothing is answered then.
    RunError
        If ``out`` exists or cannot be written, or as `client_models`.
    """
    if out is not None and os.path.lexists(out):
        raise _taken(out)
    recipe = recipe_of(path)
    refuse_length(recipe, max_new_tokens)
    asked = read_requests(Path(requests), recipe, clients_of(path))
    if out is not None:
        _refuse_unwritable(Path(out))
    models = client_models(path, list(dict.fromkeys(request.client for request in asked)), rows=False)
    found = [
        {CLIENT: request.client, **_renamed(answer, models[request.client].setup.recipe)}
        for request, answer in zip(asked, respond(models, asked, precision, max_new_tokens), strict=True)
    ]
    if out is not None:
        _write_new(Path(out), lines_of(found).encode())
    return found


def _taken(out: str | Path) -> RunError:
    return RunError(f"{out} already exists; nothing was overwritten; allowed: a new file")


def _refuse_unwritable(out: Path) -> None:
    """Raises RunError where its folder takes no file; better now than when all is answered."""
    with reported(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()


def _write_new(out: Path, data: bytes) -> None:
    """Whole or not at all; of two that write at once, the second is refused."""
    with reported(out):
        try:
            os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            raise _taken(out) from None
        try:
            write_whole(out, data)
        except BaseException:
            out.unlink(missing_ok=True)
            raise


def lines_of(answers: Sequence[Mapping[str, Any]]) -> str:
    """A line each."""
    return "".join(json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in answers)


def _renamed(answer: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What was asked by the name that it has in a request."""
    return {"prompt" if (name, recipe.model.task) == ("text", "causal-lm") else name: v for name, v in answer.items()}


def read_requests(file: Path, recipe: Recipe, clients: Sequence[str]) -> list[Request]:
    """The requests of a file, whole.

    Raises
    ------
    DataError
        With the first line that is none, what is wrong with it, and what is allowed.
    """
    try:
        rows = list(json_lines(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; allowed: a JSONL file of requests") from None
    musts, mays = FIELDS[recipe.model.task, recipe.form]
    names = (CLIENT, *musts, *mays)
    values = {name: [row.get(name) for _, row in rows] for name in names}
    columns = Columns(str(file), [place for place, _ in rows], values, file.parent)
    found, known = [], frozenset(clients)
    for at, (place, row) in enumerate(rows):
        _refuse_fields(f"{file}: {place}", row, names, (CLIENT, *musts))
        client = columns.name(at, CLIENT)
        if client not in known:
            raise columns.blame(at, CLIENT, f"no client {client!r}; allowed: {listed(clients)}")
        if "image" in musts:
            texts = _texts(columns, at) if "texts" in row else ()
            found.append(Request(client, name=columns.string(at, "image"), texts=texts))
        else:
            found.append(Request(client, columns.string(at, musts[0])))
    if "image" not in musts:
        return found
    pictures = opened(columns, "image", range(len(found)))
    return [replace(request, picture=picture) for request, picture in zip(found, pictures, strict=True)]


def _refuse_fields(where: str, row: Mapping[str, Any], known: Sequence[str], musts: Sequence[str]) -> None:
    """What is in one, and what is not."""
    others = [name for name in row if name not in known]
    missing = [name for name in musts if name not in row]
    if others or missing:
        problem = f"unknown {short(others[0])}" if others else f"no {short(missing[0])}"
        wanted = ", ".join(repr(name) for name in musts)
        mays = [repr(name) for name in known if name not in musts]
        raise DataError(f"{where}: {problem}; allowed: {wanted}{f', and perhaps {either(mays)}' if mays else ''}")


def _texts(columns: Columns, at: int) -> tuple[str, ...]:
    """A list of texts, one at least and none of them empty."""
    value = columns.values["texts"][at]
    if not isinstance(value, list) or not value:
        raise columns.blame(at, "texts", f"{short(value)}; allowed: a list of texts to choose from")
    own = Columns(columns.file, [columns.places[at]] * len(value), {"texts": value}, columns.folder)
    return tuple(own.string(i, "texts") for i in range(len(value)))
