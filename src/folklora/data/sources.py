"""Examples, from the embedded data set, a file, or a folder.

A source is read in two steps: a reader for each format yields plain columns with the place of every row, and one
validation, the same for all formats, turns them into a `Table`. Nothing is unpickled, no code of a data set runs, and
the network is never touched.

Labels may be strings, integers or booleans; the class of the integer 1 and of the string ``"1"`` is the same. Classes
are sorted by name, or by value if all of them are numbers, so their order does not depend on the order of rows;
``data.classes`` names them in an order of its own, and then no other may occur; pictures, whose labels are often
numbers, may have the place of a name in that order for a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from folklora.data import chat
from folklora.data.arrays import idx_files, read_idx, read_npz
from folklora.data.columns import Columns, either
from folklora.data.pictures import opened, read_class_folders
from folklora.data.readers import TABULAR, Reader, read_saved
from folklora.data.table import ONE_CLASS, Known, Table, fingerprint, limited, sort_names, tabulated
from folklora.errors import DataError
from folklora.sections import DataSection, Form

__all__ = ["EMBEDDED", "Table", "agreed_classes", "fingerprint", "load", "load_test", "sort_names"]

EMBEDDED = {"banking77": Path(__file__).with_name("banking77")}
"""Data sets inside the package; their columns are ``text`` and ``category``."""

PICTURES: tuple[Form, ...] = ("image", "caption")


def load(section: DataSection, seed: int, form: Form = "text") -> tuple[Table, Table | None]:
    """Read the examples and the common test set, if there is one.

    ``data.source`` is an embedded name; a ``.csv``, ``.tsv`` (both with a header and quotes as spreadsheets write
    them), ``.jsonl`` or ``.parquet`` file; a folder with ``train.*`` and perhaps ``test.*`` in one of these formats;
    or a Hugging Face folder written by ``save_to_disk``, with the splits ``train`` and perhaps ``test``. For pictures
    also an ``.npz`` file, a folder of class folders, or a folder with MNIST's files. The file ``data.test`` replaces
    the test set that a folder brings. ``data.limit`` applies to the examples, ``data.test_limit`` to the test set.

    Parameters
    ----------
    form
        What one example is, and so which columns are read: a text (``data.text``); a chat (``data.prompt`` and
        ``data.response``, or ``data.messages``); a picture (``data.image``); or a picture and its caption
        (``data.image``, ``data.caption``). Texts and pictures have labels, the others where ``data.label`` is set.

    Raises
    ------
    DataError
        One line naming the file, the row, the column and what is allowed.
    """
    columns_of = section
    if section.source in EMBEDDED and form == "text":
        columns_of = section.model_copy(update={"text": "text", "label": "category"})
    known = _known(section, form)
    with _readable():
        train, test = _read_source(columns_of, form)
    table = _table(train, columns_of, form, known, section.by, "limit", section.limit, seed)
    known = known or Known(table.classes, "those of the training examples")
    if section.test is not None:
        return table, _own_test(section, section.test, seed, form, known)
    if test is None:
        return table, None
    return table, _table(test, columns_of, form, known, None, "test_limit", section.test_limit, seed)


def load_test(section: DataSection, seed: int, form: Form = "text") -> Table | None:
    """The common test set where `section` says all about it, ``data.test`` and the classes: no other file is read.

    Raises
    ------
    DataError
        As `load`.
    """
    if section.test is None or agreed_classes(section, form) is None:
        return None
    return _own_test(section, section.test, seed, form, _known(section, form))


def agreed_classes(section: DataSection, form: Form = "text") -> tuple[str, ...] | None:
    """The classes, where `section` says them: ``data.classes``, or the one of examples without labels.

    Raises
    ------
    DataError
        Classes are named, but no label.
    """
    if _label(section, form) is None:
        if section.classes not in (None, ONE_CLASS):
            raise DataError("data.classes without data.label; allowed: both, or none where examples need no labels")
        return ONE_CLASS
    return section.classes


def _own_test(section: DataSection, source: str, seed: int, form: Form, known: Known | None) -> Table:
    # A file of the user's own has the recipe's columns, also beside an embedded source.
    with _readable():
        path = Path(source)
        if form in PICTURES and path.is_dir():
            found = read_class_folders(path, _image(section), section.label or "label", _wanted(section, form))
            columns = found[1] or found[0]  # beside a folder to test with, the other is to train with
        else:
            columns = _read_file(path, _wanted(section, form), form, f'data.test = "{source}"')
    return _table(columns, section, form, known, None, "test_limit", section.test_limit, seed)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; allowed: a readable file") from None


# What of the columns is an example


def _label(section: DataSection, form: Form) -> str | None:
    return section.label or ("label" if form in ("text", "image") else None)


def _image(section: DataSection) -> str:
    return section.image or "image"


def _wanted(section: DataSection, form: Form) -> list[str]:
    """The columns of an example and its label, each once."""
    names = {
        "text": [section.text],
        "chat": [section.messages] if section.messages else [section.prompt, section.response, section.context],
        "image": [_image(section)],
        "caption": [_image(section), section.caption or "caption"],
    }[form]
    return list(dict.fromkeys(name for name in [*names, _label(section, form)] if name is not None))


def _known(section: DataSection, form: Form) -> Known | None:
    classes = agreed_classes(section, form)
    return None if classes is None else Known(classes, "data.classes", numbered=form in PICTURES)


def _table(
    columns: Columns,
    section: DataSection,
    form: Form,
    known: Known | None,
    by: str | None,
    key: str,
    limit: int | None,
    seed: int,
) -> Table:
    if not len(columns):
        raise DataError(f"{columns.file}: no examples; allowed: at least one row")
    rows = range(len(columns))
    # Every text is checked, but pictures take long to open: only those that the limit leaves are.
    inputs = rows if form in PICTURES else [_spoken(columns, row, section, form) for row in rows]
    table = limited(tabulated(columns, inputs, _label(section, form), by, known), key, limit, seed)
    if form not in PICTURES:
        return table
    captions = section.caption or "caption"
    said = [columns.string(row, captions) for row in table.inputs] if form == "caption" else []
    pictures = opened(columns, _image(section), table.inputs)
    return replace(table, inputs=list(zip(pictures, said, strict=True)) if form == "caption" else pictures)


def _spoken(columns: Columns, row: int, section: DataSection, form: Form) -> Any:
    if form == "text":
        return columns.string(row, section.text)
    if section.messages:
        return chat.from_messages(columns, row, section.messages)
    return chat.from_columns(columns, row, section.prompt, section.response, section.context)


# Which files


def _read_source(section: DataSection, form: Form) -> tuple[Columns, Columns | None]:
    """The training columns and the test columns, if any; only training examples have the column ``data.by``."""
    path = EMBEDDED.get(section.source, Path(section.source))
    wanted = _wanted(section, form)
    grouping = [] if section.by is None or section.by in wanted else [section.by]
    if not path.is_dir():
        return _read_file(path, wanted + grouping, form, f'data.source = "{section.source}"'), None
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return read_saved(path, wanted, grouping)
    if (train := _split_file(path, "train", form)) is not None:
        test = _split_file(path, "test", form)
        columns = _read_file(train, wanted + grouping, form)
        return columns, None if test is None else _read_file(test, wanted, form)
    if form in PICTURES:
        label = section.label or "label"
        if (files := idx_files(path, "train")) is not None:
            test_files = idx_files(path, "test")
            columns = read_idx(files, _image(section), label, wanted + grouping)
            return columns, None if test_files is None else read_idx(test_files, _image(section), label, wanted)
        if any(child.is_dir() for child in path.iterdir()):
            return read_class_folders(path, _image(section), label, wanted + grouping)
    allowed = f"a train file ({either(_readers(form))}), or a folder written by datasets' save_to_disk"
    allowed += ", or class folders with pictures" if form in PICTURES else ""
    raise DataError(f"{path}: no training data in this folder; allowed: {allowed}")


def _readers(form: Form) -> dict[str, Reader]:
    return TABULAR | {".npz": read_npz} if form in PICTURES else TABULAR


def _split_file(folder: Path, split: str, form: Form) -> Path | None:
    files = [file for suffix in _readers(form) if (file := folder / f"{split}{suffix}").is_file()]
    if len(files) > 1:
        raise DataError(f"{folder}: {' and '.join(f.name for f in files)}; allowed: one file named {split}.*")
    return files[0] if files else None


def _read_file(path: Path, wanted: list[str], form: Form, key: str = "") -> Columns:
    readers = _readers(form)
    if not path.is_file():
        embedded = ", ".join(f'"{name}"' for name in EMBEDDED)
        allowed = f"a {either(readers)} file; for data.source also a folder or an embedded name ({embedded})"
        allowed += "; `make models` makes what the recipes here name"
        raise DataError(f"{key or path}: no such file; allowed: {allowed}")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; allowed: {either(readers)}")
    return reader(path, wanted)
