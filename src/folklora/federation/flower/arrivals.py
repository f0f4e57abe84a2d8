"""Messages as they arrive: taken without waiting, and of one shape only.

Flower's own `HttpGrid.pull_messages` waits, for hours if need be, for whoever announced an answer and does not send it;
and it builds whatever object it is sent. Both ends of ours take what has come (`Arrival`), and a flat record is all
that they build. Like `folklora.federation.flower.executor`, this uses what Flower does not promise to keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from folklora.errors import MessageError

SHAPE = ("Message", "RecordDict", "ConfigRecord")
"""The objects of a message, each the only child of the one before; of an error, the first."""


class Arrival:
    """A message that was announced; its objects come one by one.

    Raises
    ------
    MessageError
        What was announced is no message of ours.
    """

    def __init__(self, tree: ObjectTree) -> None:
        self.id = tree.object_id
        self.missing: list[str] = []
        self.contents: dict[str, bytes] = {}
        node = tree
        while True:
            self.missing.append(node.object_id)
            if not node.children:
                break
            if len(node.children) > 1 or len(self.missing) == len(SHAPE):
                raise MessageError("a message of another shape; allowed: one flat record")
            node = node.children[0]
        self.chain = list(self.missing)

    def pull(self, client: RuntimeHttpClient, node_id: int, run_id: int) -> Message | None:
        """Take what has come; the message once it is whole.

        Raises
        ------
        MessageError
            Its objects are gone, or not what was announced.
        """
        node = Node(node_id=node_id)
        while self.missing:
            request = PullObjectRequest(node=node, run_id=run_id, object_id=self.missing[0])
            answer = client.PullObject(request)
            if not answer.object_found:
                raise MessageError("a message that was announced, but whose contents never came")
            if not answer.object_available:
                return None
            self.contents[self.missing.pop(0)] = answer.object_content
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=self.id)
        )
        return self._message()

    def _message(self) -> Message:
        try:
            for i, each in enumerate(self.chain):
                kind, children, _ = get_object_head_values_from_object_content(self.contents[each])
                if (
                    kind != SHAPE[i]
                    or children != self.chain[i + 1 : i + 2]
                    or get_object_id(self.contents[each]) != each
                ):
                    raise MessageError(f"a message with {kind!r} in it; allowed: one flat record")
            message = inflate_object_from_contents(self.id, self.contents)
        except MessageError:
            raise
        except Exception as error:  # what a parser makes of bytes that somebody else chose
            raise MessageError(f"a message that cannot be read: {error}") from None
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = self.id
        return message


class PatientGrid(HttpGrid):
    """Flower's Grid, whose `pull_messages` takes what is there and never waits for what is not."""

    def __init__(self, address: str, ca: bytes, token: str) -> None:
        super().__init__(address, insecure=False, root_certificates=ca, token=token)
        self._retry_invoker = None  # type: ignore[assignment]  # it would end this process where a question is refused
        self._arriving: dict[str, Arrival] = {}
        self.broken: dict[str, str] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answers to these messages that are whole by now.

        What came but is no answer of ours is in ``broken``: the message that it answers -> what is wrong with it.
        """
        client, run_id = self._runtime_client, self.run.run_id
        # What was announced once is forgotten by the SuperLink, but for its objects.
        if wanted := [each for each in message_ids if each not in self._arriving]:
            announced = client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
            for head, tree in zip(announced.messages_list, announced.message_object_trees, strict=True):
                with self._noted(head.metadata.reply_to_message_id):
                    self._arriving[head.metadata.reply_to_message_id] = Arrival(tree)
        whole: list[Message] = []
        for asked, arrival in list(self._arriving.items()):
            with self._noted(asked):
                message = arrival.pull(client, self.node.node_id, run_id)
                if message is None:
                    continue
                if message.metadata.reply_to_message_id != asked:
                    raise MessageError("an answer to another message than it was announced as")
                whole.append(message)
            del self._arriving[asked]
        return whole

    def forget(self, message_id: str) -> bool:
        """No longer wait for the answer to a message; whether one was announced."""
        return self._arriving.pop(message_id, None) is not None

    @contextmanager
    def _noted(self, asked: str) -> Iterator[None]:
        try:
            yield
        except MessageError as error:
            self.broken[asked] = str(error)
