"""What `benchmarks/sequential.py` trains on and with: the chain, the model, its scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sasrec
import sequences
import torch
from sasrec import SASRec, Training, scores, train
from sequences import PADDING, Sequences, badges, markov
from sklearn.metrics import ndcg_score


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Sequences:
    """A chain of four items."""
    monkeypatch.setattr(sequences, "SYMBOLS", 4)
    monkeypatch.setattr(sequences, "CONCENTRATION", 0.5)
    return markov()


def test_the_chain_has_the_entropy_it_says(few: Sequences) -> None:
    """The plug-in entropy of what follows each pair, which 300,000 events of 64 numbers give to a few thousandths."""
    counts = np.zeros((4, 4, 4))
    for rows in (few.train, few.validation, few.test):
        np.add.at(counts, (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]), 1)
    shares = counts / counts.sum(-1, keepdims=True)
    assert few.entropy == pytest.approx(-(counts * np.log(shares)).sum() / counts.sum(), abs=0.004)
    # It is stationary: all places have the same items.
    first, last = (np.bincount(few.train[:, place], minlength=4) / len(few.train) for place in (0, -1))
    np.testing.assert_allclose(first, last, atol=0.04)


def test_more_chance_is_more_entropy(few: Sequences) -> None:
    found = [markov(chance).entropy for chance in (0.1, 0.5, 0.9, 1.0)]
    assert found[0] == few.entropy
    assert sorted(found) == found
    assert found[-1] == pytest.approx(np.log(4))


def test_a_smaller_share_is_part_of_a_larger(few: Sequences) -> None:
    quarter, half = ({tuple(row) for row in few.part(share, 3).tolist()} for share in (0.25, 0.5))
    assert len(few.part(0.25, 3)) == 1000
    assert quarter <= half


def test_badges_are_read_by_fold_and_cut_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "sequences.tsv"
    long = " ".join(["1"] * 9 + ["3"] * sequences.LENGTH)
    lines = ["fold\titems\ttimes", f"1\t{long}\t0", "2\t2 1\t0", "3\t1\t0", "4\t2 2 3\t0", "5\t1 2\t0"]
    path.write_text("\n".join(lines) + "\n")
    found = badges(path)
    assert found.symbols == 3
    assert found.train.shape == (3, sequences.LENGTH)
    assert (found.train[0] == 2).all()
    assert found.train[1].tolist() == [1, 0] + [PADDING] * (sequences.LENGTH - 2)
    assert found.validation[0, :4].tolist() == [1, 1, 2, PADDING]


def test_a_user_of_two_folds_is_in_the_first_alone(tmp_path: Path) -> None:
    path = tmp_path / "sequences.tsv"
    lines = ["fold\titems\ttimes", "5\t3 3\t0 7", "5\t1 2\t0 9", "4\t2 2\t0 1", "1\t1 2\t0 9", "1\t1 2\t0 8", "2\t2\t0"]
    path.write_text("\n".join([*lines, "3\t1\t0", "4\t1 2\t0 9"]) + "\n")
    found = badges(path)
    assert [len(each) for each in (found.train, found.validation, found.test)] == [4, 1, 1]
    assert found.test[0, :2].tolist() == [2, 2]


def test_no_score_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = SASRec(7, 3, 32, 0.0).eval()
    items = torch.randint(7, (5, 20))
    changed = items.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 7
    with torch.no_grad():
        before, after = model(items), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12], after[:, 12])


def test_scores_are_those_of_scikit_learn() -> None:
    torch.manual_seed(0)
    model = SASRec(30, 1, 16, 0.0)
    rows = np.random.default_rng(0).integers(30, size=(40, sequences.LENGTH))
    rows[:7, 20:] = PADDING
    found = scores(model, rows)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[:, :-1]).clamp(min=0)).flatten(0, 1).double().numpy()
    wanted = rows[:, 1:].ravel()
    logits, wanted = logits[wanted != PADDING], wanted[wanted != PADDING]
    assert found["ndcg"] == pytest.approx(ndcg_score(np.eye(30)[wanted], logits, k=sasrec.TOP), abs=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == wanted).mean())
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert found["loss"] == pytest.approx(-logs[np.arange(len(wanted)), wanted].mean(), rel=1e-5)


def test_training_learns_and_gives_the_look_it_scored(few: Sequences) -> None:
    given = Training(steps=40, batch=16, looks=2, warmup=4)
    model, found, step = train(few, 0.25, 1, 16, 0, given)
    again, same, _ = train(few, 0.25, 1, 16, 0, given)
    assert found == same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert step in (20, 40)
    assert scores(model, few.validation) == found
    assert few.entropy is not None
    assert few.entropy < found["loss"] < np.log(4)
