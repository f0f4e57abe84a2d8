"""The student of several depths: what it begins as, what it walks, what is kept of its teacher, what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import distil_shared_depth as distil
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AlbertModel, AutoModel, BertModel

from folklora.backbones.frozen import Frozen
from folklora.backbones.loading import pretrained

CPU = torch.device("cpu")
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 4, 3]])


@pytest.fixture
def teacher(taught: list[str]) -> BertModel:
    return BertModel.from_pretrained(taught[1], add_pooling_layer=False).eval()


@pytest.fixture
def distilled(prepared: Path, taught: list[str], tmp_path: Path) -> Path:
    """A folder that the script has made in three steps."""
    to = tmp_path / "student"
    small = ["--tokens", "40", "--most", "2000", "--heldout", "5", "--steps", "3", "--device=cpu", "--threads=1"]
    distil.main([*small, *taught, "--data", str(prepared), "--to", str(to)])
    return to


def test_the_block_begins_as_the_last_layer(teacher: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        monkeypatch.setattr(distil, "PART", {})
        student = distil.make_student(teacher).eval()
        assert torch.allclose(distil.block_of(student)(x), teacher.encoder.layer[-1](x), atol=1e-6)
        embedded = student.encoder.embedding_hidden_mapping_in(student.embeddings(IDS))
        assert torch.allclose(embedded, teacher.embeddings(IDS), atol=1e-6)


def test_embeddings_of_words_stay_and_the_block_learns(distilled: Path, teacher: BertModel) -> None:
    student, start = AlbertModel.from_pretrained(distilled), distil.make_student(teacher)
    for part in ("word_embeddings", "position_embeddings"):
        assert torch.equal(getattr(student.embeddings, part).weight, getattr(teacher.embeddings, part).weight)
    ours, theirs = (dict(distil.block_of(each).named_parameters()) for each in (student, start))
    # The bias of all keys changes no attention: its gradient is nothing but rounding.
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name != "attention.key.bias")


def test_all_steps_are_the_stock_model_and_fewer_the_formula_and_the_librarys(distilled: Path) -> None:
    student = AlbertModel.from_pretrained(distilled, attn_implementation="eager").eval()
    model = pretrained(str(distilled), AutoModel, unused="pooler.")
    depth = Frozen(model).depth
    with torch.no_grad():
        assert torch.equal(distil.walk(student, IDS, 4), student(input_ids=IDS).last_hidden_state)
        block = distil.block_of(student)
        x = student.encoder.embedding_hidden_mapping_in(student.embeddings(IDS))
        for _ in range(2):
            x = x + 2 * (block(x) - x)
        assert torch.allclose(distil.walk(student, IDS, 2), x, atol=1e-5)
        with depth.walking(2):
            assert torch.allclose(model(input_ids=IDS).last_hidden_state, x, atol=1e-5)


def test_what_the_teacher_said_is_kept_and_gone_on_with(teacher: BertModel, tmp_path: Path) -> None:
    corpus = distil.Corpus({3: np.array([[2, 5, 3], [2, 6, 3]], np.int32), 4: np.array([[2, 7, 8, 3]] * 3, np.int32)})
    whole = distil.teach(teacher, corpus, tmp_path / "whole", CPU)
    assert whole.shape == (18, 32)
    with torch.no_grad():
        stock = teacher(input_ids=torch.tensor([[2, 6, 3]])).last_hidden_state[0]
    assert np.allclose(whole[3:6], stock.numpy(), atol=0.05)  # bfloat16 where the processor has it

    killed = tmp_path / "killed"
    killed.write_bytes((tmp_path / "whole").read_bytes()[: 2 * 32 * 7 + 5])
    distil.teach(teacher, corpus, killed, CPU)
    assert killed.read_bytes() == (tmp_path / "whole").read_bytes()


def test_texts_are_drawn_until_they_are_enough_and_cut() -> None:
    def tokenizer(texts: Sequence[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * min(len(text), max_length) for text in texts]}

    texts = ["x" * n for n in (3, 3, 5, 100)]
    everything = distil.Corpus.draw(tokenizer, texts, 1000, 0)
    assert {length: len(rows) for length, rows in everything.rows.items()} == {3: 2, 5: 1, distil.LONGEST: 1}
    assert distil.Corpus.draw(tokenizer, ["x" * 10] * 50, 95, 0).tokens == 100
    assert sum(batch.size for batch in everything.batches(6)) == everything.tokens


def test_the_probes_see_what_the_embeddings_tell() -> None:
    draw = np.random.default_rng(0)
    labels = [f"label {i % 3}" for i in range(300)]
    texts = [f"text {i}" for i in range(300)]
    told = F.one_hot(torch.arange(300) % 3, 8).float() + 0.1 * torch.from_numpy(draw.normal(size=(300, 8))).float()
    assert distil.probe(F.normalize(told, dim=-1), labels, texts) == {"nearest": 1.0, "linear": 1.0}
    noise = F.normalize(torch.from_numpy(draw.normal(size=(300, 8))).float(), dim=-1)
    found = distil.probe(noise, labels, texts)
    assert all(value < 0.7 for value in found.values())


def test_the_stated_cosine_is_that_of_the_stock_models(
    distilled: Path, teacher: BertModel, prepared: Path, taught: list[str]
) -> None:
    stated = json.loads((distilled / "quality.json").read_text())
    assert sorted(stated["heldout"]) == ["1 steps", "2 steps", "3 steps", "4 steps", "teacher", "texts"]
    assert not list(distilled.glob("*.f16"))
    student = AlbertModel.from_pretrained(distilled).eval()
    tokenizer = distil.tokenizer_of(str(distilled))
    texts = distil.read(prepared / "heldout")["gsm8k"]
    ids = distil.encode(tokenizer, texts)
    with torch.no_grad():
        means = [
            torch.stack([model(input_ids=torch.tensor([each])).last_hidden_state[0].mean(0) for each in ids])
            for model in (student, teacher)
        ]
        ours = distil.embed(ids, lambda rows: distil.walk(student, rows, 4), CPU)
    assert torch.allclose((ours * F.normalize(means[0], dim=-1)).sum(1), torch.ones(len(ids)), atol=1e-3)
    every = F.cosine_similarity(*means)
    value = stated["heldout"]["4 steps"]["cosine"]["gsm8k"]
    assert every.min() - 0.01 <= value <= every.max() + 0.01
    assert stated["heldout"]["texts"]["gsm8k"] == min(5, len(texts))


def test_without_rows_to_probe_it_does_not_begin(prepared: Path, taught: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.csv: No such file or directory; name Banking77's train\.csv"):
        distil.main(["--data", str(prepared), "--to", str(tmp_path / "x"), "--banking", "nowhere.csv", "--threads=1"])


@pytest.mark.parametrize(("flags", "drawn"), [([], {2, 3, 4}), (["--full-depth-alone"], {4})])
def test_depths_are_drawn_or_the_full_one_alone(
    flags: list[str],
    drawn: set[int],
    prepared: Path,
    taught: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk, walked = distil.walk, []

    def noted(student: AlbertModel, ids: torch.Tensor, steps: int) -> torch.Tensor:
        walked.append((student.training, steps))
        return walk(student, ids, steps)

    monkeypatch.setattr(distil, "walk", noted)
    small = [
        "--tokens",
        "40",
        "--most",
        "2000",
        "--heldout",
        "5",
        "--steps",
        "20",
        "--device=cpu",
        "--threads=1",
        *flags,
    ]
    distil.main([*small, *taught, "--data", str(prepared), "--to", str(tmp_path / "student")])
    assert {steps for training, steps in walked if training} == drawn
    assert json.loads((tmp_path / "student" / "quality.json").read_text())["depths"] == sorted(drawn)
