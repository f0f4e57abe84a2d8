"""What the two ends take of what Flower's interface hands them; no process is started here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from folklora.errors import MessageError
from folklora.federation.flower.apps import FIELD, GridCarrier, client_app
from folklora.federation.flower.arrivals import Arrival, PatientGrid
from folklora.federation.orders import Order

RUN, HERE, THERE = 7, 1, 99


@pytest.fixture(autouse=True)
def task() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 5, RUN, HERE
    yield
    TaskIdentity._task_id = TaskIdentity._run_id = TaskIdentity._node_id = None


@dataclass
class Wire:
    """Flower's interface, as far as messages are pulled: objects that are there, and answers that are announced."""

    objects: dict[str, bytes] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    announced: list[tuple[Any, ObjectTree]] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    def offer(self, message: Message, *, late: bool = False) -> ObjectTree:
        message.metadata.__dict__["_message_id"] = message.object_id
        for name, each in get_all_nested_objects(message).items():
            if late:
                self.pending.add(name)
            self.objects[name] = each.deflate()
        return get_object_tree(message)

    def announce(self, message: Message, *, late: bool = False) -> None:
        tree = self.offer(message, late=late)
        self.announced.append((message_to_proto(message), tree))

    def PullObject(self, request: Any) -> PullObjectResponse:
        there = request.object_id in self.objects
        content = b"" if request.object_id in self.pending else self.objects.get(request.object_id, b"")
        return PullObjectResponse(object_found=there, object_available=bool(content), object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        found, self.announced = self.announced, []
        return PullAppMessagesResponse(
            messages_list=[message for message, _ in found], message_object_trees=[tree for _, tree in found]
        )


def order_message(number: int = 0) -> Message:
    message = Message(RecordDict({FIELD: ConfigRecord({"number": number})}), THERE, "query", ttl=60.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def answer_to(asked: Message, record: dict[str, Any]) -> Message:
    return Message(RecordDict({FIELD: ConfigRecord(record)}), reply_to=asked)


def pulled(wire: Wire, tree: ObjectTree) -> Message | None:
    return Arrival(tree).pull(wire, HERE, RUN)  # type: ignore[arg-type]


def test_a_flat_record_arrives_byte_for_byte() -> None:
    wire, data = Wire(), bytes(range(256)) * 300
    record = {"data": data, "loss": 0.1, "units": [1, 2], "totals": [0.5, 2.0], "status": "done"}
    sent = answer_to(order_message(), record)
    message = pulled(wire, wire.offer(sent))
    assert message is not None
    assert dict(message.content[FIELD]) == record
    assert wire.confirmed == [sent.object_id]


def test_an_error_is_a_message_without_a_record() -> None:
    wire = Wire()
    message = pulled(wire, wire.offer(Message(Error(3, "it broke"), reply_to=order_message())))
    assert message is not None
    assert message.error.reason == "it broke"


def test_what_is_not_there_yet_is_not_waited_for() -> None:
    wire = Wire()
    arrival = Arrival(wire.offer(answer_to(order_message(), {"data": b"x"}), late=True))
    assert arrival.pull(wire, HERE, RUN) is None  # type: ignore[arg-type]
    wire.pending.clear()
    message = arrival.pull(wire, HERE, RUN)  # type: ignore[arg-type]
    assert message is not None
    assert message.content[FIELD]["data"] == b"x"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (ArrayRecord({"w": Array(np.zeros(3))}), "of another shape"),
        (ArrayRecord(), "with 'ArrayRecord' in it"),
        (MetricRecord({"a": 1}), "with 'MetricRecord' in it"),
    ],
)
def test_only_flat_records_are_built(record: ArrayRecord | MetricRecord, problem: str) -> None:
    wire = Wire()
    with pytest.raises(MessageError, match=problem):
        pulled(wire, wire.offer(Message(RecordDict({FIELD: record}), reply_to=order_message())))


def test_two_records_are_refused() -> None:
    wire = Wire()
    content = RecordDict({FIELD: ConfigRecord({"a": 1}), "more": ConfigRecord({"b": 1})})
    with pytest.raises(MessageError, match="of another shape"):
        pulled(wire, wire.offer(Message(content, reply_to=order_message())))


def test_a_deep_tree_is_refused_before_anything_is_pulled() -> None:
    tree = ObjectTree(object_id="0")
    for i in range(1, 50):
        tree = ObjectTree(object_id=str(i), children=[tree])
    with pytest.raises(MessageError, match="of another shape"):
        Arrival(tree)


@pytest.mark.parametrize("damage", [lambda d: d[:-3], lambda d: b"nonsense", lambda d: d[:20] + b"\xff" * 40])
def test_bytes_that_are_not_what_was_announced_are_refused(damage: Any) -> None:
    wire = Wire()
    tree = wire.offer(answer_to(order_message(), {"data": b"x" * 100}))
    for name in wire.objects:
        wire.objects[name] = damage(wire.objects[name])
    with pytest.raises(MessageError):
        pulled(wire, tree)


def test_contents_that_are_gone_are_refused() -> None:
    wire = Wire()
    tree = wire.offer(answer_to(order_message(), {"data": b"x"}))
    wire.objects.clear()
    with pytest.raises(MessageError, match="never came"):
        pulled(wire, tree)


class FakeGrid(PatientGrid):
    """A Grid over a `Wire`; messages that are pushed are kept."""

    def __init__(self, wire: Wire, nodes: list[int]) -> None:
        super().__init__("127.0.0.1:1", b"", "token")
        self._client = wire  # type: ignore[assignment]
        self._run = Run.create_empty(RUN)
        self.nodes = nodes
        self.pushed: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: Any) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.pushed.append(message)
        return [message.metadata.message_id for message in messages]


def order(client: str, number: int) -> Order:
    return Order(kind="train", run="0" * 32, number=number, round=1, client=client)


def carrier() -> tuple[GridCarrier, FakeGrid, Wire]:
    wire = Wire()
    grid = FakeGrid(wire, [11, 12, 13])
    return GridCarrier(grid, {"a": 11, "b": 12, "away": 99}), grid, wire


def test_members_are_those_whose_node_is_connected() -> None:
    found, _, _ = carrier()
    assert found.members() == ["a", "b"]


def test_an_answer_is_its_senders_and_one_who_sends_nothing_stops_nobody() -> None:
    found, grid, wire = carrier()
    exchange = found.exchange({"a": order("a", 1), "b": order("b", 2)}, 0.5)
    answers = {11: {"client": "b", "number": 1}}
    came = [(d.client, d.record, d.failure) for d in feed(exchange, grid, wire, answers, silent={12})]
    assert came[0] == ("a", {"client": "b", "number": 1}, "")
    assert came[1:] == [("b", None, "it was announced, but did not come whole within 0.5 s")]


def test_no_two_messages_have_an_id_that_the_other_could_guess() -> None:
    found, grid, _ = carrier()
    list(found.exchange({"a": order("a", 1)}, 0.0))
    list(found.exchange({"a": order("a", 1)}, 0.0))
    first, second = grid.pushed
    assert first.metadata.group_id != second.metadata.group_id
    assert len(first.metadata.group_id) == 32


def test_a_message_refused_at_the_door_fails_its_sender_at_once() -> None:
    wire, refused = Wire(), {"a": "a body of 9 bytes; allowed: 8 bytes"}
    grid = FakeGrid(wire, [11])
    found = GridCarrier(grid, {"a": 11}, lambda: dict([refused.popitem()]) if refused else {})
    exchange = found.exchange({"a": order("a", 1)}, 60.0)
    (delivery,) = feed(exchange, grid, wire, {}, silent={11})
    assert (delivery.client, delivery.record, delivery.failure) == ("a", None, "a body of 9 bytes; allowed: 8 bytes")


def feed(exchange: Any, grid: FakeGrid, wire: Wire, answers: dict[int, Any], silent: set[int]) -> Iterator[Any]:
    """Answer the exchange's messages as soon as they are all pushed: some whole, some only announced."""
    original = grid.pull_messages

    def pull(message_ids: Any) -> list[Message]:
        for message in grid.pushed:
            node = message.metadata.dst_node_id
            if node in answers:
                wire.announce(answer_to(message, answers.pop(node)))
            elif node in silent:
                silent.discard(node)
                wire.announce(answer_to(message, {"data": b"never"}), late=True)
        return original(message_ids)

    grid.pull_messages = pull  # type: ignore[method-assign]
    yield from exchange


def test_the_client_app_takes_a_record_and_gives_one() -> None:
    app = client_app(lambda record: {**record, "keep": [], "status": "done"})
    asked = Message(RecordDict({FIELD: ConfigRecord({"number": 3, "data": b"\x00\x01"})}), THERE, "train")
    asked.metadata.__dict__["_message_id"] = asked.object_id
    reply = app(asked, None)  # type: ignore[arg-type]
    assert dict(reply.content[FIELD]) == {"number": 3, "data": b"\x00\x01", "status": "done"}
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id
