"""`folklora inspect --data`: the audit of one file as a page, pictures and JSON. Nothing leaves the machine.

::

    audit.json, audit.html, figures/*.png      the client's own
    release.json                               what may leave, and nothing else
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from folklora.data.audit.audit import Document
from folklora.data.audit.audit import audit as audit_of
from folklora.data.audit.reading import read_rows, read_rows_as
from folklora.data.audit.release import require_epsilon
from folklora.errors import DataError
from folklora.recipe import Recipe
from folklora.report.figures_data import DATA_PICTURES
from folklora.report.render import Card, Sheet, draw, fill, replace_file
from folklora.report.tables import NOTHING

JSON, PAGE, RELEASE = "audit.json", "audit.html", "release.json"


def audit_file(
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    text: str | None = None,
    items: str | None = None,
    label: str | None = None,
    epsilon: float | None = None,
    to: str | Path | None = None,
) -> Document:
    """Audit a file of examples; with a folder, write what the module's text lists. Returns the document.

    Parameters
    ----------
    recipe
        Whose columns are meant, as ``folklora join --data`` would read them; without one `text`, `items` and `label`
        say it (`folklora.data.audit.reading.read_rows`).
    epsilon
        Of the noise on what may leave (`folklora.data.audit.release`); None: no noise.

    Raises
    ------
    FolkLoraError
        The file cannot be read as that, or nothing can be written to the folder.
    """
    require_epsilon(epsilon)
    if to is not None and Path(to).exists() and not Path(to).is_dir():
        raise DataError(f"{to}: is no folder; allowed: a folder, new or not")
    if recipe is None:
        rows = read_rows(path, text=text, items=items, label=label)
    elif items is not None:
        raise DataError(f"--items {items} with a recipe, whose examples are texts; allowed: --text, or no recipe")
    else:
        rows = read_rows_as(path, recipe.data, recipe.form, text=text, label=label)
    document = audit_of(rows, epsilon=epsilon, weights="none" if recipe is None else recipe.audit.weights)
    if to is not None:
        write_data_audit(document, Path(to))
    return document


def write_data_audit(document: Document, folder: Path) -> Path:
    """Write the page of a document and all that is beside it; returns the page's path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}; allowed: a folder, new or not") from None
    images = draw(document, folder / "figures", DATA_PICTURES)
    replace_file(folder / JSON, _written(document))
    replace_file(folder / RELEASE, _written({"schema": document["schema"], **document["release"]}))
    return fill(
        folder / PAGE,
        "data_audit.html.j2",
        audit=document,
        images=images,
        lead=lead(document),
        facts=_facts(document),
        cards=_cards(document),
        measures=_measures(document),
        counts=_counts(document),
        groups=_groups(document),
    )


def _written(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode("utf-8", "backslashreplace")


def lead(document: Mapping[str, Any]) -> str:
    """The audit in one sentence."""
    told, copies = document["release"], document["duplicates"]["near"]["share"]
    beside = (
        f"; {copies:.1%} of the examples are copies of others, exact or near" if copies else "; there are no copies"
    )
    return f"Status: {told['status']} ({told['means']}){beside}."


def number(measure: Mapping[str, Any]) -> str:
    """A measure, or why there is none."""
    return f"not measurable: {measure['why']}" if measure["value"] is None else f"{measure['value']:.3g}"


def _facts(document: Mapping[str, Any]) -> list[str]:
    data, found = document["data"], document["profile"]
    what = "texts" if data["kind"] == "text" else "sequences of items"
    return [
        f"{found['examples']:,} {what}",
        f"column {data['column']}",
        f"{found['labels_in_all']} labels" if data["labelled"] else "no labels read",
    ]


def _cards(document: Mapping[str, Any]) -> list[Card]:
    found, told, copies = document["profile"], document["release"], document["duplicates"]
    unit = "words" if document["data"]["kind"] == "text" else "items"
    ratio = next(measure for measure in document["measures"] if measure["name"] == "Ratio to shuffled data")
    labels = found["effective_labels"]
    shown = "of what random order has; 1 is noise" if ratio["why"] is None else f"not measurable: {ratio['why']}"
    below = ratio["value"] is not None and ratio["value"] < 0
    cards = [
        Card("Status", told["status"], told["means"]),
        Card("Examples", f"{found['examples']:,}", f"{found['empty']:,} without a word" if found["empty"] else ""),
        Card("Copies", f"{copies['near']['share']:.1%}", f"{copies['exact']['share']:.1%} to the letter"),
        Card("Regularity", NOTHING if ratio["value"] is None or below else f"{ratio['value']:.2f}",
             "below 0: the texts are too short for it" if below else shown),
        Card("Vocabulary", f"{found['vocabulary']:,}", f"{found['tokens']:,} {unit} in all"),
    ]  # fmt: skip
    if labels["value"] is not None:
        remark = "so many equally frequent ones would be as varied"
        cards.append(Card("Effective labels", f"{labels['value']:.1f} of {found['labels_in_all']}", remark))
    return cards


def _measures(document: Mapping[str, Any]) -> Sheet:
    lines = [
        [each["name"], number(each), each["unit"] if each["value"] is not None else "", each["says"]]
        for each in document["measures"]
    ]
    return Sheet("Measures of order", ["measure", "value", "unit", "what it says"], lines, frozenset({0, 1, 2, 3}))


def _counts(document: Mapping[str, Any]) -> Sheet:
    found = document["profile"]
    unit = "words" if document["data"]["kind"] == "text" else "items"
    shown = {
        "0": "shortest",
        "0.05": "5 %",
        "0.25": "25 %",
        "0.5": "median",
        "0.75": "75 %",
        "0.95": "95 %",
        "1": "longest",
    }
    lines = [
        ["examples", f"{found['examples']:,}"],
        ["without a word", f"{found['empty']:,}"],
        [f"{unit} in all", f"{found['tokens']:,}"],
        [f"different {unit}", f"{found['vocabulary']:,}"],
        ["of these occur once", "—" if found["once"]["value"] is None else f"{found['once']['value']:.0%}"],
        [f"{unit} of an example, mean", number(found["mean_length"])],
        *([f"{unit} of an example, {words}", f"{found['lengths'][key]:,.0f}"] for key, words in shown.items()),
    ]
    if found["labels"] is not None:
        lines += [["labels", f"{found['labels_in_all']:,}"], ["effective labels", number(found["effective_labels"])]]
    return Sheet("Counts", ["what", "how many"], lines)


def _in_words(places: Sequence[str]) -> str:
    """``lines 3, 17``."""
    names = {place.partition(" ")[0] for place in places}
    if len(names) > 1:
        return ", ".join(places)
    return f"{names.pop()}s " + ", ".join(place.partition(" ")[2] for place in places)


def _groups(document: Mapping[str, Any]) -> Sheet:
    found = document["duplicates"]
    lines = []
    for group in found["groups"]:
        more = group["examples"] - len(group["places"])
        places = _in_words(group["places"]) + (f" and {more:,} more" if more else "")
        labels = NOTHING if group["labels"] is None else str(group["labels"])
        lines.append([f"{group['examples']:,}", f"{group['alike']:,}", labels, places])
    shown, in_all = len(found["groups"]), found["groups_in_all"]
    note = "A group is what near copies connect. Copies with several labels are likely to be mistakes."
    if in_all > shown:
        note += f" The largest {shown} of {in_all:,} groups are listed."
    header = ["examples", "at most alike to the letter", "different labels", "where"]
    return Sheet("Groups of copies", header, lines, frozenset({3}), note=note)
