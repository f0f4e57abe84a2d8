"""What the round loop makes of an engine whose clients are far away: silent, late, unasked, gone at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Score
from folklora.errors import RunError
from folklora.federation.engine import Asked, Upload
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup

Play = Callable[..., Any]


class Gone(LocalEngine):
    """Some clients do not answer the last questions, or any question."""

    def __init__(self, setup: Setup, gone: Sequence[str], questions: int = 4) -> None:
        super().__init__(setup)
        self.gone, self.questions = gone, questions
        self.asked: list[int] = []

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        self.asked.append(len(questions))
        found = super().scores(clients, questions)
        if len(questions) < self.questions:
            return found
        return [{client: score for client, score in each.items() if client not in self.gone} for each in found]


def test_who_does_not_answer_at_the_end_is_listed_and_left_out(tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe("method.name=fedit")
    found, reference = play(recipe, lambda setup: Gone(setup, ["1"])), play(recipe)
    assert found.engine.asked == [1, 1, 4]  # a validation each, and the end in one exchange
    assert found.summary["missing"] == ["1"]
    assert found.summary["clients"] == {c: r for c, r in reference.summary["clients"].items() if c != "1"}
    for key, of in (("accuracy_mean", "accuracy"), ("accuracy_tuned_mean", "accuracy_tuned")):
        accuracies = [result[of] for result in found.summary["clients"].values()]
        assert found.row[key] == pytest.approx(np.mean(accuracies))
    # What concerns no client in particular, and what was sent, is what it was.
    for key in ("accuracy_global", "rounds", "bytes_up_per_client_round", "bytes_down_per_client_round"):
        assert found.row[key] == reference.row[key]
    assert "missing" not in reference.summary


def test_when_nobody_answers_at_the_end_the_run_can_be_finished_later(tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe("method.name=fedit")
    reference = play(recipe)
    with pytest.raises(RunError, match="none of 4 clients answered .*; the run stands as round 2 left it"):
        play(recipe, lambda setup: Gone(setup, list("0123")))
    directory = RunDirectory.open(reference.directory.path.with_name("play-1"))
    setup = reference.setup
    rounds = Rounds(setup, directory, LocalEngine(setup), list(setup.data.splits), Silent())
    assert rounds.play()["clients"] == reference.summary["clients"]


def test_a_validation_without_answers_is_none(tiny_recipe: Any, play: Play) -> None:
    """The method learns only of those that answered; where nobody did, the round was not validated."""
    recipe = tiny_recipe("method.name=fedit", "train.rounds=3", "train.patience=1")

    class Mute(Gone):
        def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
            self.gone = {0: ["2"], 1: list("0123")}.get(len(self.asked), [])
            return super().scores(clients, questions)

    found = play(recipe, lambda setup: Mute(setup, [], 1))
    assert set(found.lines[1]["validation"]["clients"]) == {"0", "1", "3"}
    assert found.lines[2]["validation"] is None
    assert found.lines[2]["participants"] == list("0123")
    # Who did not answer is not known to have its reply: it is sent it again.
    size = found.lines[1]["bytes_down"] // 4
    assert found.lines[1]["bytes_down"] == 4 * size
    assert found.lines[2]["bytes_down"] == (1 + 4) * size


class Crowded(LocalEngine):
    """Beside what was asked for come uploads of other rounds, of clients that were not asked, and of nobody."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.kept: list[Upload] = []
        self.extra: dict[int, int] = {}

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        uploads = list(super().train(round, clients))
        unasked = [client for client in self.members if client not in clients]
        strangers = [replace(uploads[0], client=client) for client in (*unasked, "nobody")]
        early = [replace(upload, round=round + 1) for upload in uploads[:1]]
        crowd = [*self.kept, *early, *strangers]
        self.extra[round] = sum(len(upload.data or b"") for upload in crowd if upload.client != "nobody")
        yield from (*crowd, *uploads)
        self.kept = uploads


@pytest.mark.parametrize("name", ["fedit", "celora", "flora"])
def test_only_what_was_asked_for_in_this_round_counts(name: str, tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe(f"method.name={name}", "train.rounds=3", "train.participation=0.5")
    found, reference = play(recipe, Crowded), play(recipe)
    for client, member in found.engine.members.items():
        for tensor, other in zip(
            member.record().values(), reference.engine.members[client].record().values(), strict=True
        ):
            assert torch.equal(tensor, other)
    for line, plain in zip(found.lines[1:], reference.lines[1:], strict=True):
        round = line["round"]
        assert line.pop("ignored") == {"late": 1 if round == 1 else 3, "unasked": 3}
        assert line["bytes_up"] == plain["bytes_up"] + found.engine.extra[round]
        for key in set(plain) - {"bytes_up", "bytes_up_clients"}:
            assert line[key] == plain[key]
    assert found.summary["clients"] == reference.summary["clients"]


class Forgetful(LocalEngine):
    """Clients come back without their welcome, as over a network where it travels with the next order."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.told: list[tuple[str, bytes]] = []

    def settle(self, client: str, data: bytes) -> None:
        self.told.append((client, data))
        super().settle(client, data)

    def restore(self, records: Mapping[str, Tensors]) -> Sequence[str]:
        super().restore(records)
        return [client for client in records if client in ("0", "2")]


def test_a_welcome_is_told_again_and_counts_once(tiny_recipe: Any, play: Play) -> None:
    recipe = tiny_recipe("method.name=fedit", "method.head_start=sketched", "train.rounds=1")
    whole = play(recipe, Forgetful)
    once = whole.lines[0]["bytes_down"]
    welcomes = dict(whole.engine.told)
    assert list(welcomes) == list("0123")
    assert once == sum(map(len, welcomes.values()))
    again = Forgetful(whole.setup)
    rounds = Rounds(whole.setup, whole.directory, again, list(whole.setup.data.splits), Silent())
    rounds.play()
    assert again.told == [("0", welcomes["0"]), ("2", welcomes["2"])]
    assert whole.lines[0]["bytes_down"] == once


def test_a_sketch_that_does_not_come_fails_its_client_alone(tiny_recipe: Any, play: Play) -> None:
    class Deaf(LocalEngine):
        def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
            for client, data in reversed(list(super().sketches(clients, round))):
                if client != "1":
                    yield from [(client, data)] * (2 if client == "2" else 1)
            yield "nobody", data

    found = play(tiny_recipe("method.name=celora"), Deaf)
    assert found.lines[0]["failed"] == {"1": "did not answer"}
    assert found.lines[0]["ignored"] == {"duplicate": 1, "unasked": 1}
    assert set(found.lines[0]["bytes_up_clients"]) == {"0", "2", "3"}
    assert found.lines[1]["participants"] == list("0123")


def test_a_sketch_that_cannot_be_encoded_fails_its_client_alone(
    tiny_recipe: Any, play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    class Far(LocalEngine):
        """Class means of one client beyond what float16 holds."""

        def __init__(self, setup: Any) -> None:
            super().__init__(setup)
            data = self.members["1"].data
            features, labels = data.features("train")
            data.features = lambda split: (1e6 * features, labels)  # type: ignore[method-assign]

    found = play(tiny_recipe("method.name=sketch", "message.dtype=float16"), Far)
    assert found.lines[0]["failed"] == {"1": "did not answer"}
    assert set(found.lines[0]["bytes_up_clients"]) == {"0", "2", "3"}
    assert "client 1 has no sketch: tensor 'statistics/" in caplog.text


@pytest.mark.parametrize(("answers", "sent"), [(False, [0, 4, 8]), (True, [0, 4, 4])])
def test_who_was_silent_is_sent_its_reply_again(answers: bool, sent: list[int], tiny_recipe: Any, play: Play) -> None:
    """Nobody takes part in round 2, so round 3 has the same replies: whoever answered anything has its own."""

    class Down(LocalEngine):
        def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
            for upload in super().train(round, clients):
                if round != 2:
                    yield upload
                elif answers:
                    yield replace(upload, data=None, failure="out of memory")

    found = play(tiny_recipe("method.name=fedit", "train.rounds=3", "train.evaluate_every=3"), Down)
    size = len(found.rounds.last_reply)
    # The validation after round 3 brings round 3's.
    assert [line["bytes_down"] / size for line in found.lines[1:]] == sent
