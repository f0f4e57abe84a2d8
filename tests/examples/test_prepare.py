"""What prepare_data.py writes: three parts without a row, a passage, a speech or a picture in common."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import prepare_data
import pytest

PARTS = ("", "pretraining", "heldout")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def disjoint(parts: list[set]) -> bool:
    return all(parts) and len(set.union(*parts)) == sum(map(len, parts))


def said(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"], row["response"]]


def test_no_instruction_passage_or_response_is_in_two_parts(raw: Path, prepared: Path) -> None:
    whole = lines(raw / "dolly15k" / "dolly15k.jsonl")
    found = [lines(prepared / part / "dolly.jsonl") for part in PARTS]
    assert sum(map(len, found)) == len(whole)
    told = [" ".join(text for row in rows for text in (*said(row), row.get("context", ""))) for rows in found]
    for passage in {row["context"] for row in whole} - {""}:
        assert sum(passage in text for text in told) == 1
    for row in whole:
        assert sum(row["response"] in text for text in told) == 1
    assert set(found[0][0]) == {"prompt", "context", "response", "category"}


def test_no_speech_of_one_part_is_a_prompt_in_another(raw: Path, prepared: Path) -> None:
    found = [lines(prepared / part / "shakespeare.jsonl") for part in PARTS]
    speeches = [{line.partition(": ")[2] or line for row in rows for text in said(row) for line in text.split("\n\n")}
                for rows in found]  # fmt: skip
    assert disjoint(speeches)
    order = [row["text"] for row in lines(raw / "tinyshakespeare" / "by_role.jsonl")]
    for row in found[0]:
        at = order.index(row["response"])
        before = row["prompt"].split("\n\n")
        assert [each.partition(": ")[2] for each in before] == order[at - len(before) : at]


def test_pictures_go_one_way_and_an_emoji_with_all_its_skin_tones(raw: Path, prepared: Path) -> None:
    for name, rows in (("emoji", 120), ("fashion", 200)):
        files = [np.load(prepared / part / f"{name}.npz", allow_pickle=False) for part in PARTS]
        assert disjoint([{image.tobytes() for image in file["image"]} for file in files])
        assert all(file["image"].shape[1:] == (36, 36, 3) for file in files)
        counts = [len(file["image"]) for file in files]
        if name == "emoji":
            assert disjoint([{str(text).partition(",")[0] for text in file["caption"]} for file in files])
            counts[0] *= 2  # the federation's, below
        assert sum(counts) == rows


def test_the_federation_has_an_emoji_in_one_skin_tone(prepared: Path) -> None:
    federated, pretraining = (np.load(prepared / part / "emoji.npz", allow_pickle=False) for part in PARTS[:2])
    assert not any("skin tone" in str(text) for text in federated["caption"])
    assert sum("skin tone" in str(text) for text in pretraining["caption"]) == len(pretraining["caption"]) / 2


def test_fashion_pictures_keep_their_pixels_and_labels(raw: Path, prepared: Path) -> None:
    data = gzip.decompress((raw / "fashion_mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    whole = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)
    label_of = {image.tobytes(): prepare_data.FASHION[i % 10] for i, image in enumerate(whole)}
    file = np.load(prepared / "fashion.npz", allow_pickle=False)
    for image, label in zip(file["image"], file["label"], strict=True):
        assert (image[..., :1] == image).all()
        assert label_of[image[4:-4, 4:-4, 0].tobytes()] == label
        assert image.sum() == image[4:-4, 4:-4].sum()


def test_comments_have_one_emotion_and_photographs_a_caption_each(raw: Path, prepared: Path) -> None:
    told = [line.split("\t") for line in (raw / "goemotions" / "train.tsv").read_text(encoding="utf-8").splitlines()]
    assert lines(prepared / "goemotions.jsonl") == [
        {"text": told[i][0], "label": label} for i, label in ((0, "joy"), (2, "neutral"), (3, "joy"))
    ]
    file = np.load(prepared / "photographs.npz", allow_pickle=False)
    assert file["label"].tolist() == [f"photo {i}" for i in range(5)]
    assert file["image"].shape == (5, 64, 64, 3)


def test_the_split_is_the_same_each_time(raw: Path, prepared: Path, tmp_path: Path) -> None:
    prepare_data.main(["--data", str(raw), "--to", str(tmp_path)])
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(files) == 19
    for file in files:
        assert (tmp_path / file).read_bytes() == (prepared / file).read_bytes()


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"dolly15k\.jsonl: No such file"):
        prepare_data.main(["--data", str(tmp_path), "--to", str(tmp_path / "to")])
