"""The examples are scripts beside the package: their folder comes onto the path as when one of them is run."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
collect_ignore_glob = [] if EXAMPLES.exists() else ["test_*.py"]  # a source distribution has none
sys.path.insert(0, str(EXAMPLES))

WORDS = ("red", "green", "blue", "cat", "dog", "sun", "rain", "tea", "cup", "box", "road", "song", "three", "stone")


def sentence(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, 8)) + f" {generator.integers(1000)}"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ../shared/data, with little in it: two questions a passage, an emoji in two skin tones."""
    folder = tmp_path_factory.mktemp("raw")
    draw = np.random.default_rng(1)
    passages = [sentence(draw) for _ in range(100)]
    write_lines(
        folder / "dolly15k" / "dolly15k.jsonl",
        [
            {"category": category, "instruction": sentence(draw), "context": context, "response": sentence(draw)}
            for context in ["", *passages]
            for category in ("closed_qa", "summarization")
        ],
    )
    roles = draw.choice(["ROMEO", "JULIET", "Nurse"], 1440)
    speeches = [{"role": str(role), "text": sentence(draw)} for role in roles]
    write_lines(folder / "tinyshakespeare" / "by_role.jsonl", speeches)
    for name, part in (("train", 12), ("test", 6)):
        rows = [{"question": sentence(draw), "answer": f"{sentence(draw)}\n#### {i}"} for i in range(part)]
        write_lines(folder / "gsm8k" / f"{name}.jsonl", rows)
    for name in ("train", "dev"):
        turns = [["U", sentence(draw), [], []], ["S", sentence(draw), [], []]] * 2
        write_lines(folder / "sgd" / f"{name}.jsonl", [{"id": "1", "services": [], "turns": turns}] * 8)

    names = [f"{WORDS[i % 14]} {WORDS[i // 14]}" for i in range(60)]
    captions = [name + tone for name in names for tone in ("", ", dark skin tone")]
    about = {"group": "Objects", "subgroup": "thing", "char": "x"}
    write_lines(folder / "twemoji" / "index.jsonl", [{"image": "", "caption": text, **about} for text in captions])
    np.savez(folder / "twemoji" / "rgb36.npz", images=draw.integers(0, 256, (len(captions), 36, 36, 3), np.uint8))
    (folder / "fashion_mnist").mkdir()
    for kind, array in (
        ("images-idx3", draw.integers(0, 256, (200, 28, 28), np.uint8)),
        ("labels-idx1", np.arange(200, dtype=np.uint8) % 10),
    ):
        head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / "fashion_mnist" / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    comments = [f"{sentence(draw)}\t{labels}\tid" for labels in ("0", "1,2", "2", "0")]
    (folder / "goemotions").mkdir()
    (folder / "goemotions" / "train.tsv").write_text("\n".join([*comments, ""]), encoding="utf-8")
    (folder / "goemotions" / "labels.txt").write_text("joy\nanger\nneutral\n", encoding="utf-8")
    about = [{"captions": [f"photo {i} ", "another"]} for i in range(5)]
    write_lines(folder / "coco_mini_by" / "index.jsonl", about)
    np.savez(folder / "coco_mini_by" / "center64.npz", images=draw.integers(0, 256, (5, 64, 64, 3), np.uint8))
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import prepare_data

    to = tmp_path_factory.mktemp("prepared")
    prepare_data.main(["--data", str(raw), "--to", str(to)])
    return to


@pytest.fixture(scope="session")
def taught(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `distil_shared_depth.py` is given to learn from and be probed on: a BERT of four layers, forty rows."""
    import torch
    from transformers import BertConfig, BertModel

    folder, small = tmp_path_factory.mktemp("teacher"), tiny_model("bert")
    shutil.copytree(small, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(small)
    config.num_hidden_layers = 4
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    draw = np.random.default_rng(2)
    with (folder / "banking.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "category"))
        writer.writerows((sentence(draw), f"label {i % 4}") for i in range(40))
    return ["--teacher", str(folder), "--banking", str(folder / "banking.csv")]
