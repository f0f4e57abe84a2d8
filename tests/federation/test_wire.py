"""What travels, and that every byte of it is counted: against a recording of the wire and against the shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from folklora.backbones.metric import Score
from folklora.federation.codec import decode
from folklora.federation.engine import Asked, Upload
from folklora.federation.inspect import inspect
from folklora.federation.local import LocalEngine
from folklora.federation.setup import Setup
from folklora.quantization import BLOCK

WIDTH, RANK, CLASSES = 32, 4, 4
SITES = [f"encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
KINDS = {
    "A": {f"A/{site}": (RANK, WIDTH) for site in SITES},
    "B": {f"B/{site}": (WIDTH, RANK) for site in SITES},
    "C": {f"C/{site}": (RANK, RANK) for site in SITES},
    "head": {"head/weight": (CLASSES, WIDTH), "head/bias": (CLASSES,)},
}
TRAVELS = {  # by round: odd, even
    "local": ("", ""),
    "sketch": ("", ""),
    "fedit": ("A B head", "A B head"),
    "ffa": ("B head", "B head"),
    "fedsa": ("A", "A"),
    "rolora": ("B head", "A head"),
    "celora": ("C", "C"),
    "folklora": ("C", "C"),
}
ONCE = {"celora": {"mixture"}, "sketch": {"statistics"}, "folklora": {"statistics"}}
BACK_ONCE = {"sketch", "folklora"}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def shapes(kinds: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for kind in kinds.split() for name, shape in KINDS[kind].items()}


def size(kinds: str, dtype: str = "float32", *, examples: bool) -> int:
    """Bytes of a message, from the layout that the codec documents."""
    if not kinds:
        return 0
    total = 4 + 4 + 2 + 2 + (1 + len("examples") + 8 if examples else 0)
    for name, shape in shapes(kinds).items():
        count = 1
        for side in shape:
            count *= side
        whole = dtype == "int8" and len(shape) == 1  # vectors are spared
        scales = -(-count // BLOCK) * 4 if dtype == "int8" and not whole else 0
        total += 1 + len(name) + 2 + 4 * len(shape) + count * (4 if whole else SIZES[dtype]) + scales
    return total


class Recorded(LocalEngine):
    """The local engine with an ear on the wire."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.once_up: dict[str, bytes] = {}
        self.once_down: dict[str, bytes] = {}
        self.up: list[tuple[int, str, bytes]] = []
        self.down: list[tuple[int, str, bytes]] = []
        self.current = 1  # the round whose start a delivery belongs to
        self.has: dict[str, bytes] = {}

    def sketches(self, clients: Sequence[str], round: int = 0) -> Iterator[tuple[str, bytes | None]]:
        for client, data in super().sketches(clients, round):
            if data is not None:
                self.once_up[client] = data
            yield client, data

    def settle(self, client: str, data: bytes) -> None:
        self.once_down[client] = data
        super().settle(client, data)

    def receive(self, client: str, data: bytes) -> None:
        self._arrived(client, data)
        super().receive(client, data)

    def train(self, round: int, clients: Sequence[str]) -> Iterator[Upload]:
        for upload in super().train(round, clients):
            if upload.data is not None:
                self.up.append((round, upload.client, upload.data))
            yield upload

    def scores(self, clients: Sequence[str], questions: Sequence[Asked]) -> list[dict[str, Score]]:
        for split, replies in questions:
            for client in clients:
                if (data := replies.get(client)) is not None:
                    self._arrived(client, data)
            if split == "validation":
                self.current += 1
        return super().scores(clients, questions)

    def _arrived(self, client: str, data: bytes) -> None:
        if self.has.get(client) != data:
            self.down.append((self.current, client, data))
        self.has[client] = data


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in TRAVELS]
    + [(name, dtype) for name in ("fedit", "folklora") for dtype in ("float16", "bfloat16", "int8")],
)
def test_names_and_bytes_on_the_wire(name: str, dtype: str, tiny_recipe: Any, play: Callable[..., Any]) -> None:
    recipe = tiny_recipe(f"method.name={name}", f"message.dtype={dtype}")
    played = play(recipe, Recorded)
    engine, lines = played.engine, played.lines
    for round, client, data in engine.up:
        kinds = TRAVELS[name][(round + 1) % 2]
        message = decode(data)
        assert {n: tuple(t.shape) for n, t in message.tensors.items()} == shapes(kinds)
        assert message.numbers == {"examples": len(played.setup.data.splits[client].train)}
        assert len(data) == size(kinds, dtype, examples=True)
    for line in lines[1:]:
        sent = {client: len(data) for round, client, data in engine.up if round == line["round"]}
        assert line["bytes_up_clients"] == sent
        assert line["bytes_up"] == sum(sent.values())
        assert line["bytes_up"] == 4 * size(TRAVELS[name][(line["round"] + 1) % 2], dtype, examples=True)
    back = " ".join(sorted(set(" ".join(TRAVELS[name]).split()), key="ABC head".find))
    for number, line in enumerate(lines[1:], start=1):
        # RoLoRA's server keeps the factor of the round before too; both go down once both are known.
        kinds = TRAVELS[name][0] if number == 1 else back
        assert line["bytes_down"] == 4 * size(kinds, dtype, examples=False)
        assert sum(line["bytes_down_clients"].values()) == line["bytes_down"]
    for _, _, data in engine.down:
        message = decode(data)
        assert not message.numbers
        assert {n.partition("/")[0] for n in message.tensors} <= set(back.split())
    assert len({(client, data) for _, client, data in engine.down}) == len(engine.down)

    prefixes = {n.partition("/")[0] for data in engine.once_up.values() for n in decode(data).tensors}
    assert prefixes == ONCE.get(name, set())
    assert lines[0]["bytes_up_clients"] == {client: len(data) for client, data in engine.once_up.items()}
    assert lines[0]["bytes_down_clients"] == {client: len(data) for client, data in engine.once_down.items()}
    assert bool(engine.once_down) == (name in BACK_ONCE)
    for data in engine.once_down.values():
        assert {n: tuple(t.shape) for n, t in decode(data).tensors.items()} == KINDS["head"]

    row = played.row
    assert row["rounds"] == (0 if name == "sketch" else 2)
    turns = max(1, 4 * row["rounds"])
    assert row["bytes_up_per_client_round"] == sum(len(data) for _, _, data in engine.up) / turns
    assert row["bytes_down_per_client_round"] == sum(len(data) for _, _, data in engine.down) / turns
    assert row["bytes_once_per_client"] == sum(line["bytes_up"] + line["bytes_down"] for line in lines[:1]) / 4

    predicted = inspect(recipe)["method"]
    for key in ("rounds", "bytes_up_per_client_round", "bytes_down_per_client_round"):
        assert predicted[key] == row[key]


def test_local_sends_nothing_at_all(tiny_recipe: Any, play: Callable[..., Any]) -> None:
    played = play(tiny_recipe("method.name=local"), Recorded)
    engine = played.engine
    assert [engine.up, engine.down, engine.once_up, engine.once_down] == [[], [], {}, {}]
    assert played.row["bytes_up_per_client_round"] == played.row["bytes_down_per_client_round"] == 0
    assert played.row["bytes_once_per_client"] == 0
    assert all(line["bytes_up"] == line["bytes_down"] == 0 for line in played.lines)


@pytest.mark.parametrize(("name", "every"), [("fedit", 1), ("fedit", 3), ("rolora", 1), ("celora", 1), ("celora", 3)])
def test_what_a_client_has_is_not_sent_again(name: str, every: int, tiny_recipe: Any, play: Callable[..., Any]) -> None:
    """With half of the clients in a round: the sum of all replies that told somebody something new."""
    settings = (f"method.name={name}", "train.participation=0.5", f"train.evaluate_every={every}")
    played = play(tiny_recipe(*settings, "train.rounds=6"), Recorded)
    down = sum(len(data) for _, _, data in played.engine.down)
    turns = 6 * 2
    assert played.row["bytes_down_per_client_round"] == pytest.approx(down / turns, rel=1e-12)
    in_rounds = sum(line["bytes_down"] for line in played.lines[1:])
    assert in_rounds <= down
    if name == "celora":
        # A client's own mix changes only when it takes part: nobody is sent anything else.
        assert played.row["bytes_down_per_client_round"] == size("C", examples=False)


def test_inspect_tells_what_a_run_would_hold(tiny_recipe: Any) -> None:
    found = inspect(tiny_recipe("method.name=celora"))
    assert found["classes"] == CLASSES
    assert found["test_examples"] == 60
    assert sum(sum(entry["examples"].values()) for entry in found["clients"].values()) == 240
    for entry in found["clients"].values():
        assert sum(entry["labels"].values()) == sum(entry["examples"].values())
        assert entry["rank"] == RANK
    per_site = {"A": RANK * WIDTH, "C": RANK * RANK, "B": WIDTH * RANK}
    head = CLASSES * WIDTH + CLASSES
    assert found["adapter"]["numbers"] == {kind: 4 * count for kind, count in per_site.items()} | {"head": head}
    assert found["model"]["adapted_layers"] == SITES
    assert found["memory"]["clients"] == 4 * found["adapter"]["bytes"]
