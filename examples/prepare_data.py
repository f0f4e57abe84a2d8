"""The files that the recipes and the two pretrainings read, made from the raw data sets.

    python examples/prepare_data.py --data ../shared/data --to examples/data

Every set is split once, by a SHA-256 of what a row is about, so that nothing a checkpoint was pretrained on is
fine-tuned or tested on again:

    examples/data/NAME               half of it: the federation's
    examples/data/pretraining/NAME   nine twentieths: the checkpoints'
    examples/data/heldout/NAME       one twentieth: what the checkpoints' quality is stated on

Rows that share a text or a picture go the same way: a passage with several questions (dolly), an emoji in its five skin
tones (emoji; the federation has it in one), neighbouring speeches, which quote each other as prompts (shakespeare).
GSM8K and SGD come with splits of their own: their training parts are for pretraining. GSM8K's test part is the recipe's
(``gsm8k-test.jsonl``), and what a checkpoint's quality is stated on, too. Two sets no checkpoint has seen: GoEmotions'
comments with one emotion, and photographs, victims of `benchmarks/privacy.py`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PLACES = {"federated": "", "pretraining": "pretraining", "heldout": "heldout"}
"""Part -> its folder below the target."""

FASHION = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SIDE = 36
BLOCK = 24
"""Speeches that go the same way together, and are each other's prompts."""
BEFORE = 2
"""Speeches before one that are its prompt."""

Row = dict[str, Any]


def part_of(key: str | bytes) -> str:
    """Where a row goes: the same in every run and on every machine."""
    digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "federated" if share < 0.5 else "pretraining" if share < 0.95 else "heldout"


# -- text --------------------------------------------------------------------------------------------------------------


def dolly(raw: Path) -> Iterator[tuple[str, Row]]:
    """Instructions by category; rows about the same passage, or with the same instruction, go together."""
    for row in read_lines(raw / "dolly15k" / "dolly15k.jsonl"):
        columns = {"prompt": row["instruction"], "context": row["context"], "response": row["response"]}
        yield part_of(row["context"] or row["instruction"]), {**columns, "category": row["category"]}


def shakespeare(raw: Path) -> Iterator[tuple[str, Row]]:
    """Every speech as the answer to those before it. Who speaks it is not told: a role's own model knows."""
    speeches = read_lines(raw / "tinyshakespeare" / "by_role.jsonl")
    for start in range(0, len(speeches), BLOCK):
        block = speeches[start : start + BLOCK]
        part = part_of("\n\n".join(speech["text"] for speech in block))
        for i, speech in enumerate(block[1:], 1):
            before = "\n\n".join(f"{each['role']}: {each['text']}" for each in block[max(0, i - BEFORE) : i])
            yield part, {"prompt": before, "response": speech["text"], "role": speech["role"]}


def gsm8k(raw: Path, split: str) -> list[Row]:
    """Sums told as stories; the answer ends in "#### <number>"."""
    rows = read_lines(raw / "gsm8k" / f"{split}.jsonl")
    return [{"prompt": row["question"], "response": row["answer"]} for row in rows]


def sgd(raw: Path, split: str) -> list[Row]:
    """Dialogues with an assistant that books and looks up."""
    role = {"U": "user", "S": "assistant"}
    return [
        {"messages": [{"role": role[turn[0]], "content": turn[1]} for turn in row["turns"]]}
        for row in read_lines(raw / "sgd" / f"{split}.jsonl")
    ]


def goemotions(raw: Path) -> list[Row]:
    """Comments that all raters gave one and the same emotion."""
    folder = raw / "goemotions"
    names = (folder / "labels.txt").read_text(encoding="utf-8").split()
    lines = (line.split("\t") for line in (folder / "train.tsv").read_text(encoding="utf-8").split("\n") if line)
    return [{"text": text, "label": names[int(labels)]} for text, labels, _ in lines if "," not in labels]


def as_chat(row: Row) -> Row:
    """What pretraining reads: the row as chat messages, a context behind the prompt."""
    if "messages" in row:
        return row
    prompt = "\n\n".join(filter(None, (row["prompt"], row.get("context"))))
    answer = {"role": "assistant", "content": row["response"]}
    return {"messages": [{"role": "user", "content": prompt}, answer]}


# -- pictures ----------------------------------------------------------------------------------------------------------


def emoji(raw: Path) -> Iterator[tuple[str, Row]]:
    """Pictures with their Unicode names; an emoji in all its skin tones goes one way.

    The federation has each in one tone only: clients split what they have, and a hand that was trained on in one tone
    would be tested on in another.
    """
    told: set[str] = set()
    with np.load(raw / "twemoji" / "rgb36.npz", allow_pickle=False) as file:
        images = file["images"]
    for image, row in zip(images, read_lines(raw / "twemoji" / "index.jsonl"), strict=True):
        name = ", ".join(piece for piece in row["caption"].split(", ") if "skin tone" not in piece) or row["caption"]
        columns = {"caption": row["caption"], "group": row["group"], "subgroup": row["subgroup"]}
        part = part_of(name)
        if part != "federated" or name not in told:
            yield part, {"image": image, **columns}
        told.add(name)


def fashion(raw: Path) -> Iterator[tuple[str, Row]]:
    """Fashion-MNIST's training pictures, on a black border and in three equal colours."""
    folder = raw / "fashion_mnist"
    images = read_idx(folder / "train-images-idx3-ubyte.gz")
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
    border = [((SIDE - size) // 2, (SIDE - size + 1) // 2) for size in images.shape[1:]]
    for image, label in zip(images, labels, strict=True):
        colours = np.repeat(np.pad(image, border)[..., None], 3, axis=-1)
        yield part_of(image.tobytes()), {"image": colours, "label": FASHION[label]}


def photographs(raw: Path) -> list[Row]:
    """COCO photographs under free licences, 64 x 64, each of a class of its own: its first caption."""
    folder = raw / "coco_mini_by"
    with np.load(folder / "center64.npz", allow_pickle=False) as file:
        images = file["images"]
    rows = read_lines(folder / "index.jsonl")
    return [{"image": i, "label": row["captions"][0].strip()} for i, row in zip(images, rows, strict=True)]


# -- files -------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, type 8, the number of axes, their lengths, the values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: not an IDX file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_arrays(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = rows[0] if rows else ()
    np.savez_compressed(path, **{name: np.stack([row[name] for row in rows]) for name in columns})


def parts(rows: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {part: [] for part in PLACES}
    for part, row in rows:
        found[part].append(row)
    return found


def prepare(raw: Path, to: Path) -> None:
    """Write all files; what is there already is written anew, with the same content."""
    for name, read in (("dolly", dolly), ("shakespeare", shakespeare)):
        for part, rows in parts(read(raw)).items():
            chosen = rows if part == "federated" else map(as_chat, rows)
            write_lines(to / PLACES[part] / f"{name}.jsonl", chosen)
    write_lines(to / "gsm8k-test.jsonl", gsm8k(raw, "test"))
    write_lines(to / "pretraining" / "gsm8k.jsonl", map(as_chat, gsm8k(raw, "train")))
    write_lines(to / "heldout" / "gsm8k.jsonl", map(as_chat, gsm8k(raw, "test")))
    write_lines(to / "pretraining" / "sgd.jsonl", sgd(raw, "train"))
    write_lines(to / "heldout" / "sgd.jsonl", sgd(raw, "dev"))
    write_lines(to / "goemotions.jsonl", goemotions(raw))
    write_arrays(to / "photographs.npz", photographs(raw))
    for name, pictures in (("emoji", emoji), ("fashion", fashion)):
        for part, rows in parts(pictures(raw)).items():
            write_arrays(to / PLACES[part] / f"{name}.npz", rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder with the raw sets")
    parser.add_argument("--to", type=Path, default=Path("examples/data"))
    chosen = parser.parse_args(arguments)
    try:
        prepare(chosen.data, chosen.to)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from None
    for path in sorted(chosen.to.rglob("*.*")):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
