"""What of an upload travels: differences, parts of them, and a memory that loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.adapters.lowrank import Site, Tensors
from folklora.errors import MessageError, RecipeError
from folklora.federation.codec import decode, encode
from folklora.federation.compression import REFERENCE, Compression, Uplink, checksum
from folklora.federation.engine import Upload
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup
from folklora.methods import build
from folklora.methods.base import Method
from folklora.methods.contract import Context, Message
from folklora.recipe import Recipe
from folklora.sections import MessageSection

Play = Callable[..., Any]
SITE = Site("layer", 24, 20)
SHAPES = {"A/layer": (4, 24), "B/layer": (20, 4)}


def section(dtype: str = "float32", top_k: float = 1.0, error_feedback: bool = False) -> MessageSection:
    return MessageSection.model_validate({"dtype": dtype, "top_k": top_k, "error_feedback": error_feedback})


def method(name: str = "fedit", clients: int = 5) -> Method:
    context = Context(
        seed=0, ranks={str(i): 4 for i in range(clients)}, sites=(SITE,), alpha=4.0, dropout=0.0, classes=2, width=3,
        head={"head/weight": (2, 3), "head/bias": (2,)}, norms={}, rounds=9, learning_rate=1e-2,
        batch_size=1, local_epochs=1, optimizer="adamw",
        weight=lambda site: torch.zeros(20, 24),
    )  # fmt: skip
    return build(name, {"head": "private"}, context)


def draw(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


# -- both ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("top_k", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("told", [False, True])
def test_the_server_reads_reference_plus_difference(dtype: str, top_k: float, told: bool) -> None:
    """Computed here with the codec alone, for a client that was told something and one that was not."""
    fedit = method()
    compression = Compression(section(dtype, top_k, True), fedit)
    uplink = Uplink(compression, "0")
    reply = Message(draw(1)) if told else None
    if reply:
        uplink.received(decode(encode(reply, dtype)))
    reference = decode(encode(reply, dtype)).tensors if reply else {n: fedit.initial("0")[n] for n in SHAPES}
    sent = draw(2)
    data = uplink.encode(1, Message(sent, {"examples": 3.0}))
    difference = {n: sent[n] - reference[n] for n in SHAPES}
    numbers = {"examples": 3.0, REFERENCE: float(checksum(reference))}
    assert data == encode(Message(difference, numbers), f"{dtype}@{top_k}" if top_k < 1 else dtype)
    assert len(data) == compression.bytes_up(Message(draw(9), {"examples": 1.0}))
    read = compression.read(1, "0", data, SHAPES, [None, reply])
    arrived = decode(data, shapes=SHAPES).tensors
    assert read.numbers == {"examples": 3.0}
    for name in SHAPES:
        assert torch.equal(read.tensors[name], reference[name] + arrived[name])
        kept = int((arrived[name] != 0).sum())
        assert kept <= -(-top_k * difference[name].numel() // 1)
        lost = sent[name] - read.tensors[name]
        assert torch.equal(uplink.pending[name], lost)
    assert uplink.memory == {}
    uplink.accepted()
    # What was lost is in the next difference, to the bit.
    again = decode(uplink.encode(2, Message(sent, {"examples": 3.0})), shapes=SHAPES)
    meant = {n: sent[n] + uplink.memory[n] - reference[n] for n in SHAPES}
    expected = decode(encode(Message(meant, again.numbers), compression.up), shapes=SHAPES).tensors
    assert all(torch.equal(again.tensors[n], expected[n]) for n in SHAPES)


def test_without_differences_an_upload_is_what_it_was() -> None:
    for dtype in ("float32", "int8", "int4"):
        compression = Compression(section(dtype), method())
        uplink = Uplink(compression, "0")
        uplink.received(Message(draw(1)))
        message = Message(draw(2), {"examples": 3.0})
        data = uplink.encode(1, message)
        assert data == encode(message, dtype)
        read = compression.read(1, "0", data, SHAPES, [])
        assert read.numbers == message.numbers
        assert not any(uplink.record().values())
        assert not uplink.reply


def test_a_reference_that_is_not_the_servers_is_found_out() -> None:
    compression = Compression(section(top_k=0.5), method())
    uplink = Uplink(compression, "0")
    uplink.received(Message(draw(1)))
    data = uplink.encode(1, Message(draw(2), {"examples": 3.0}))
    compression.read(1, "0", data, SHAPES, [Message(draw(1))])
    for said in ([], [Message(draw(3))], [Message({"A/layer": draw(1)["A/layer"]})]):
        with pytest.raises(MessageError, match="relative to something else"):
            compression.read(1, "0", data, SHAPES, said)
    plain = encode(Message(draw(2), {"examples": 3.0}))
    with pytest.raises(MessageError, match="'reference' is missing"):
        compression.read(1, "0", plain, SHAPES, [])
    with pytest.raises(MessageError, match="unknown number 'reference'"):
        Compression(section(), method()).read(
            1, "0", encode(Message(draw(2), {"examples": 1.0, REFERENCE: 1.0}), "int8"), SHAPES, []
        )


def test_a_sum_that_overflows_is_refused_on_both_sides() -> None:
    compression = Compression(section(error_feedback=True), method())
    uplink = Uplink(compression, "0")
    big = Message({name: torch.full(shape, 3e38) for name, shape in SHAPES.items()})
    uplink.received(big)
    numbers = {"examples": 1.0, REFERENCE: float(checksum(big.tensors))}
    with pytest.raises(MessageError, match="overflows"):
        compression.read(1, "0", encode(Message(big.tensors, numbers)), SHAPES, [big])
    with pytest.raises(MessageError, match="NaN or Inf"):
        uplink.encode(1, Message({name: -t for name, t in big.tensors.items()}, {"examples": 1.0}))


class Indexed(Method):
    """Sends some rows of a matrix, and which."""

    name = "indexed"
    title = "Indexed"


def test_memory_of_rows_that_an_index_names_follows_the_index() -> None:
    context = method().context
    compression = Compression(section(top_k=0.3, error_feedback=True), Indexed(Indexed.options_type(), context))
    uplink = Uplink(compression, "0")
    uplink.received(Message({"A/layer": torch.zeros(4, 24)}))

    def send(rows: list[int]) -> Tensor:
        index = torch.tensor(rows, dtype=torch.int32)
        data = uplink.encode(1, Message({"A/layer": draw(1)["A/layer"], "index/layer": index}, {"examples": 1.0}))
        uplink.accepted()
        shapes = {"A/layer": (4, 24), "index/layer": (4,)}
        found = decode(data, shapes=shapes)
        assert torch.equal(found.tensors["index/layer"], index)
        return found.tensors["A/layer"]

    first = send([0, 1, 2, 3])
    assert not torch.equal(send([3, 1, 2, 0]), first)  # the same rows in another order of preference: remembered
    assert torch.equal(send([0, 1, 2, 5]), first)  # other rows: nothing of the old ones is added


def test_what_counts_from_zero_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "known", lambda self, round, client, told, message: {})
    compression = Compression(section(top_k=0.2, error_feedback=True), method())
    uplink = Uplink(compression, "0")
    uplink.received(Message(draw(1)))
    data = uplink.encode(1, Message(draw(2), {"examples": 1.0}))
    uplink.accepted()
    assert uplink.memory == {}
    read = compression.read(1, "0", data, SHAPES, [Message(draw(1))]).tensors
    for name, tensor in read.items():
        where = tensor != 0
        assert torch.equal(tensor[where], draw(2)[name][where])


# -- convergence -------------------------------------------------------------------------------------------------------


def distance(wire: MessageSection, rounds: int = 60) -> float:
    """How far FedIT ends from the optimum of ``sum_k ||x - t_k||^2 / 2``, the mean of the t_k, relative to it.

    Downloads are exact here: feedback mends what uploads lose. Steps shrink, as feedback's theory wants them to.
    """
    fedit = method()
    compression = Compression(wire, fedit)
    compression.down = "float32"
    targets = {str(k): draw(10 + k) for k in range(5)}
    uplinks = {k: Uplink(compression, k) for k in targets}
    held = {k: {n: fedit.initial(k)[n] for n in SHAPES} for k in targets}
    state: Mapping[str, Tensor] = {}
    for round in range(1, rounds + 1):
        rate = 3 / (10 + round)
        messages = {}
        for k, uplink in uplinks.items():
            reply = fedit.reply(dict(state), k)
            if reply is not None:
                held[k] = decode(encode(reply)).tensors
                uplink.received(Message(held[k]))
            moved = {n: x - rate * (x - targets[k][n]) for n, x in held[k].items()}
            data = uplink.encode(round, Message(moved, {"examples": 1.0}))
            messages[k] = compression.read(round, k, data, SHAPES, [None, reply])
            uplink.accepted()
        state = fedit.server(round, dict(state), messages)
    best = {n: sum(t[n] for t in targets.values()) / 5 for n in SHAPES}
    gap = sum(float((state[f"global/{n}"] - best[n]).square().sum()) for n in SHAPES) ** 0.5
    return gap / sum(float(t.square().sum()) for t in best.values()) ** 0.5


@pytest.mark.parametrize(("dtype", "top_k"), [("int8", 1.0), ("int4", 1.0), ("float32", 0.1), ("int8", 0.1)])
def test_feedback_reaches_the_uncompressed_mean_and_nothing_else_does(dtype: str, top_k: float) -> None:
    without, with_ = distance(section(dtype, top_k)), distance(section(dtype, top_k, True))
    assert with_ < 0.2 * without
    assert with_ < (0.15 if top_k < 1 else 0.01)
    assert without > (0.01 if (dtype, top_k) == ("int8", 1.0) else 0.1)


def test_the_toy_itself_converges() -> None:
    assert distance(section()) < 5e-3


# -- whole runs --------------------------------------------------------------------------------------------------------

HARD = ("message.dtype=int8", "message.top_k=0.1", "message.error_feedback=true")


def memories(engine: LocalEngine) -> dict[str, Tensors]:
    return {client: dict(member.outlet.uplink.memory) for client, member in engine.members.items()}


def same(one: Mapping[str, Tensors], other: Mapping[str, Tensors]) -> bool:
    return one.keys() == other.keys() and all(
        one[c].keys() == other[c].keys() and all(torch.equal(t, other[c][n]) for n, t in one[c].items()) for c in one
    )


class Watched(LocalEngine):
    """Keeps each client's memory after every round, and may lose or damage uploads."""

    def __init__(self, setup: Setup, harm: str = "", client: str = "1", at: int = 2) -> None:
        super().__init__(setup)
        self.harm, self.client, self.at = harm, client, at
        self.history: list[dict[str, Tensors]] = []
        self.sent: list[tuple[int, str, int]] = []

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        self.history.append(memories(self))
        for upload in super().train(round, clients):
            self.sent.append((round, upload.client, len(upload.data or b"")))
            if self.harm and (upload.client, round) == (self.client, self.at):
                if self.harm == "lost":
                    continue
                upload = replace(upload, data=(upload.data or b"")[:-3])
            yield upload


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_an_upload_that_did_not_count_leaves_the_memory_as_it_was(harm: str, tiny_recipe: Any, play: Play) -> None:
    played = play(tiny_recipe("method.name=fedit", "train.rounds=3", *HARD), lambda setup: Watched(setup, harm))
    first, second, third = (each["1"] for each in played.engine.history)
    assert not first
    assert second
    assert same({"": second}, {"": third})
    assert not same({"": third}, {"": played.engine.members["1"].outlet.uplink.memory})
    for other in ("0", "2", "3"):
        assert not same({"": played.engine.history[1][other]}, {"": played.engine.history[2][other]})
    assert [list(line["failed"]) for line in played.lines] == [[], [], ["1"], []]


def test_bytes_are_those_of_the_encoded_uploads_and_as_predicted(tiny_recipe: Any, play: Play) -> None:
    from folklora.federation.inspect import inspect

    recipe = tiny_recipe("method.name=fedit", *HARD)
    played = play(recipe, Watched)
    for line in played.lines[1:]:
        assert line["bytes_up_clients"] == {c: size for r, c, size in played.engine.sent if r == line["round"]}
    predicted = inspect(recipe)["method"]
    for key in ("bytes_up_per_client_round", "bytes_down_per_client_round"):
        assert predicted[key] == played.row[key]
    plain = play(tiny_recipe("method.name=fedit"))
    assert played.row["bytes_up_per_client_round"] < 0.2 * plain.row["bytes_up_per_client_round"]
    assert played.row["bytes_down_per_client_round"] < 0.4 * plain.row["bytes_down_per_client_round"]


@pytest.mark.parametrize("name", ["fedit", "folklora"])
def test_a_run_that_was_killed_remembers(name: str, tiny_recipe: Any, play: Play) -> None:
    """Killed after each round, one of them with a refused upload; a head that travels starts from the welcome."""
    head = ("method.head=shared", "method.head_start=sketched")
    recipe: Recipe = tiny_recipe(f"method.name={name}", "train.rounds=3", *HARD, *head)

    class Interrupted(Exception): ...

    whole = play(recipe, lambda setup: Watched(setup, "damaged"))
    for stop in (0, 1, 2):

        class Interrupting(Silent):
            def line(self, metrics: Mapping[str, Any]) -> None:
                if metrics["round"] == self.stop:
                    raise Interrupted

        Interrupting.stop = stop  # type: ignore[attr-defined]
        before = sorted(whole.directory.path.parent.glob("play-*"))
        if stop:
            with pytest.raises(Interrupted):
                play(recipe, lambda setup: Watched(setup, "damaged"), progress=Interrupting())
            (path,) = set(whole.directory.path.parent.glob("play-*")) - set(before)
        else:
            path = _only_sketched(recipe, whole)
        resumed = Watched(whole.setup, "damaged")
        directory = RunDirectory.open(path)
        summary = Rounds(whole.setup, directory, resumed, list(whole.setup.data.splits), Silent()).play()
        assert same(memories(resumed), memories(whole.engine))
        assert all(memories(resumed).values())
        assert {k: v for k, v in summary["row"].items() if not k.startswith("seconds")} == whole.row


def _only_sketched(recipe: Recipe, whole: Any) -> Any:
    """A run that stopped before round 1: welcomes are out, nothing was trained."""
    path = whole.directory.path.with_name("sketched")
    directory = RunDirectory.create(path, recipe, (whole.directory.path / "partition.json").read_text())
    rounds = Rounds(whole.setup, directory, Watched(whole.setup), list(whole.setup.data.splits), Silent())
    rounds.begin()
    return path


@pytest.mark.parametrize("key", ["top_k=0", "top_k=1.5", "dtype=int5", "error_feedback=1"])
def test_bad_keys(key: str, tiny_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="message." + key.partition("=")[0]):
        tiny_recipe(f"message.{key}")
