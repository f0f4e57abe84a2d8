"""Flower's two apps, and the carrier between them: an order goes out as one message, an answer comes back as one.

Flower's terms are kept where it has some: a *train* order is a message of type ``train``, a *score* order one of type
``evaluate``, all others are ``query``; the record in it is an `Order` or an `Answer`, field by field.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from folklora.federation.flower.arrivals import PatientGrid
from folklora.federation.flower.executor import problem, reported
from folklora.federation.orders import Order, Record
from folklora.federation.remote import Delivery

FIELD = "folklora"
"""The one record of a message."""
TYPES = {"train": "train", "score": "evaluate"}
SHORTEST, LONGEST = 0.1, 1.0
"""Seconds between two looks for answers: after one came, and when none has come for long."""


class GridCarrier:
    """Takes orders to members over Flower's Grid; see `folklora.federation.remote.Carrier`.

    Parameters
    ----------
    grid
        Of the ServerApp.
    nodes
        Member -> the id of the node that holds its key.
    refused
        Members whose message did not get as far as the Grid since this was last asked, and why.
    """

    def __init__(
        self, grid: PatientGrid, nodes: Mapping[str, int], refused: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        self.grid = grid
        self.nodes = dict(nodes)
        self.refused = refused
        self._reasons: dict[str, str] = {}
        self._asked: dict[str, str] = {}  # message id -> member, until it is answered or has expired

    def members(self) -> Sequence[str]:
        """Who is connected now."""
        with reported("Flower's SuperLink"):
            connected = set(self.grid.get_node_ids())
        return [name for name, node in self.nodes.items() if node in connected]

    def exchange(self, orders: Mapping[str, Order], deadline: float) -> Iterator[Delivery]:
        """Deliveries as they come, until each of these orders has one or ``deadline`` seconds are over.

        What Flower has to say in a member's place, and what is no message of ours, are deliveries without a record.
        An answer to an order of an earlier exchange may come too.
        """
        ends = time.monotonic() + deadline
        waiting: dict[str, str] = {}
        for name, order in orders.items():
            sent = self._send(name, order, deadline)
            if sent:
                waiting[sent] = name
            else:
                yield Delivery(name, None, "the order could not be sent")
        pause = SHORTEST
        while waiting and time.monotonic() < ends:
            came = False
            for asked, delivery in (*self._deliveries(), *self._turned_away()):
                came = True
                if waiting.pop(asked, None) is not None or delivery.record is not None:
                    yield delivery
            pause = SHORTEST if came else min(1.1 * pause, LONGEST)
            if not came:
                time.sleep(pause)
        for asked, name in waiting.items():
            if self.grid.forget(asked):
                del self._asked[asked]
                yield Delivery(name, None, f"it was announced, but did not come whole within {deadline:g} s")

    def _turned_away(self) -> list[tuple[str, Delivery]]:
        """Answers that were announced and will not come, because the door was shut on their contents."""
        self._reasons.update(self.refused())
        found: list[tuple[str, Delivery]] = []
        for asked, name in list(self._asked.items()):
            if name in self._reasons and self.grid.forget(asked):
                del self._asked[asked]
                found.append((asked, Delivery(name, None, self._reasons.pop(name))))
        return found

    def _send(self, name: str, order: Order, deadline: float) -> str:
        """Its message's id; empty if Flower would not take it."""
        content = RecordDict({FIELD: ConfigRecord(_flat(order.record()))})
        # The group makes the message's id one that nobody can guess: who knows it could answer in another's place.
        group = secrets.token_hex(16)
        kind = TYPES.get(order.kind, "query")
        message = Message(content, self.nodes[name], kind, ttl=deadline, group_id=group)
        with reported("Flower's SuperLink"):
            # One at a time, so that the contents are there when the member hears of the message.
            sent = next(iter(self.grid.push_messages([message])), "")
        if sent:
            self._asked[sent] = name
        return sent

    def _deliveries(self) -> list[tuple[str, Delivery]]:
        """What has come since, whomever it is from, beside the message that it answers."""
        with reported("Flower's SuperLink"):
            messages = self.grid.pull_messages(list(self._asked))
        found: list[tuple[str, Delivery]] = []
        for message in messages:
            asked = message.metadata.reply_to_message_id
            if (name := self._asked.pop(asked, None)) is None:
                continue
            if message.has_error():
                found.append((asked, Delivery(name, None, problem(message.error))))
            else:
                found.append((asked, Delivery(name, _record(message))))
        for asked, wrong in self.grid.broken.items():
            if (name := self._asked.pop(asked, None)) is not None:
                found.append((asked, Delivery(name, None, wrong)))
        self.grid.broken.clear()
        return found


def _record(message: Message) -> Record:
    return dict(cast(Mapping[str, Any], message.content.get(FIELD, {})))


def _flat(record: Record) -> Record:
    """Without empty lists, which have no type on the wire; they are what is meant where nothing stands."""
    return {key: value for key, value in record.items() if value != []}


def server_app(play: Callable[[PatientGrid], None]) -> ServerApp:
    """The ServerApp of a run: ``play`` with the Grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        play(cast(PatientGrid, grid))

    return app


def client_app(answer: Callable[[Record], Record]) -> ClientApp:
    """The ClientApp of a member: ``answer`` makes an answer's record of an order's."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        return Message(RecordDict({FIELD: ConfigRecord(_flat(answer(_record(message))))}), reply_to=message)

    for register in (app.train, app.evaluate, app.query):
        register()(handle)
    return app
