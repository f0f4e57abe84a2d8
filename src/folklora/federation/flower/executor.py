"""Running Flower's apps in our own processes, with what Flower does not promise to keep; tested with 1.41, to which the
extra is pinned. Of the other files only `arrivals` and `daemon` use such things.

Flower starts a new process for each message and runs in it the code that came with the run. Here a SuperLink or
SuperNode is told to leave that to others (``--isolation process``), and the process that has the model in memory takes
the tasks itself, with a secret that only it has. What Flower wants submitted with a run, a bundle of code, says
nothing and is never run; who runs a stock SuperNode would run nothing but that.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Message
from flwr.app.error import Error
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_PATIENCE, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import ServerApp
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

from folklora import __version__
from folklora.errors import FederationError, MessageError, one_line
from folklora.federation.flower.arrivals import Arrival, PatientGrid
from folklora.federation.flower.direct import dial_directly

dial_directly()
log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between two questions to a process on this machine."""
ARRIVES = 300.0
"""Seconds within which a message is whole that was announced: longer than Flower lets anybody send it."""

BUNDLE = {
    "pyproject.toml": f"""
[project]
name = "folklora"
version = "{__version__}"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "folklora"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "folklora_nothing:server"
clientapp = "folklora_nothing:client"
""",
    "folklora_nothing.py": 'raise ImportError("it is `folklora serve` and `folklora join` that do the work")\n',
    "LICENSE": "Apache-2.0\n",
}


class SuperLink:
    """The SuperLink that this process started, seen by whoever owns it.

    Parameters
    ----------
    address
        ``host:port`` on loopback.
    secret
        What it was started with.
    ca
        The certificate of the authority that signed its own.
    """

    def __init__(self, address: str, secret: bytes, ca: bytes) -> None:
        self.address, self.ca = address, ca
        self._control = ControlHttpClient.from_server_address(address, False, ca, ())
        self._tasks = _task_client(address, secret, ca)

    def register(self, name: str, public_key: Path) -> int:
        """Let in the holder of a key; its node's id."""
        key = load_ssh_public_key(public_key.read_bytes())
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)  # type: ignore[arg-type]
        with reported("Flower's SuperLink"):
            return int(self._control.RegisterNode(request).node_id)

    def members(self) -> dict[str, dict[str, Any]]:
        """Of each member: whether it is connected, since when or until when, and when it was last heard of."""
        with reported("Flower's SuperLink"):
            nodes = self._control.ListNodes(ListNodesRequest()).nodes_info
        return {node.name: _standing(node) for node in nodes}

    def run(self, app: ServerApp) -> None:
        """Submit a run, and be its ServerApp: returns when ``app`` does, raises what it raises.

        Raises
        ------
        FederationError
            The SuperLink does not answer, or somebody else took the run.
        """
        bundle, _ = build_fab_from_files({name: text.encode() for name, text in BUNDLE.items()})
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        with reported("Flower's SuperLink"):
            run_id = self._control.StartRun(StartRunRequest(fab=fab)).run_id
            claim = self._tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not claim.token or claim.task.run_id != run_id:
            raise FederationError("the SuperLink has another run than this one; nobody else may submit runs to it")
        grid = PatientGrid(self.address, self.ca, claim.token)
        with _task(grid._runtime_client) as task, _alive(grid._runtime_client):
            grid.set_run(run_from_proto(task.run))
            app(grid, context_from_proto(task.context))
        grid.close()

    def close(self) -> None:
        self._control.close()
        self._tasks.close()


class SuperNode:
    """The SuperNode that this process started: takes its messages, one after the other.

    Parameters
    ----------
    address, secret
        As of `SuperLink`; a SuperNode's own interface is plain HTTP on loopback.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self.address = address
        self._tasks = _task_client(address, secret, None)

    def answer(self, app: ClientApp) -> bool:
        """Take one message, if there is one, and send what ``app`` makes of it; whether there was one.

        What ``app`` raises travels back as an error. It is safe to call this again whatever happened.
        """
        try:
            claim = self._tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if not claim.token:
                return False
            client = _client(self.address, None, "flwr-clientapp", RuntimeTokenHttpInterceptor(claim.token))
            with client, _task(client) as task, _alive(client):
                message = self._message(client, task)
                context = context_from_proto(task.context)
                try:
                    reply = app(message, context)
                except Exception as error:  # a defect must reach the server as an answer, or it waits
                    log.exception("an order came to nothing")
                    reason = f"{type(error).__name__}: {error}"[:300]
                    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
                push_message(client, reply, context)
            return True
        except httpx.TransportError as error:  # the SuperNode is gone; who looks after it will say so
            log.debug("a message was lost on its way: %s", error)
        except (httpx.HTTPError, MessageError) as error:
            log.warning("a message was lost on its way: %s", error)
        return False

    @staticmethod
    def _message(client: RuntimeHttpClient, task: PullTaskInputResponse) -> Message:
        announced = client.PullMessages(PullAppMessagesRequest())
        if not announced.message_object_trees:
            raise MessageError("a task without a message")
        arrival = Arrival(announced.message_object_trees[0])
        end = time.monotonic() + ARRIVES
        while (message := arrival.pull(client, task.context.node_id, task.run.run_id)) is None:
            if time.monotonic() > end:
                raise MessageError("its contents never came")
            time.sleep(POLL)
        return message

    def close(self) -> None:
        self._tasks.close()


def _standing(node: NodeInfo) -> dict[str, Any]:
    connected = node.status == NodeStatus.ONLINE
    if not node.last_activated_at:
        return {"connected": False, "since": None, "seen": None}
    if not connected:
        since = seen = node.last_deactivated_at
    else:
        since = node.last_activated_at
        heard = datetime.fromtimestamp(node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval, UTC)
        seen = max(since, heard.isoformat())
    return {"connected": connected, "since": since[:19] + "Z", "seen": seen[:19] + "Z"}


def problem(error: Error) -> str:
    """What stands where an answer should, in words of ours where they are clearer."""
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return "the connection to it was lost"
    return one_line((error.reason or "")[:300]) or f"Flower's error {error.code}"


@contextmanager
def reported(what: str) -> Iterator[None]:
    """What Flower's interface refuses, or a process that is gone, as one line."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FederationError(f"{what} refused: {error.response.text[:300] or error}") from None
    except httpx.HTTPError as error:
        raise FederationError(f"{what} does not answer: {error}") from None


@contextmanager
def _task(client: RuntimeHttpClient) -> Iterator[PullTaskInputResponse]:
    """A claimed task, from its input to its end."""
    task = client.PullTaskInput(PullTaskInputRequest())
    # Messages take their sender from here: one task at a time in a process.
    TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
    TaskIdentity.node_id = task.context.node_id
    ending, details = SubStatus.FAILED, "ended early"
    try:
        yield task
        ending, details = SubStatus.COMPLETED, ""
    finally:
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=ending, details=details))
        except httpx.HTTPError as error:
            log.debug("the end of a task could not be told: %s", error)


@contextmanager
def _alive(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell that the task is being worked on. Flower's own would interrupt this process when that is not heard."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError as error:
            log.debug("a heartbeat was not heard: %s", error)
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def _task_client(address: str, secret: bytes, ca: bytes | None) -> RuntimeHttpClient:
    protected = ["/flwr.proto.Runtime/AcquireTask"]
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)
    return _client(address, ca, "SuperExec", signed)


def _client(
    address: str,
    ca: bytes | None,
    name: str,
    authentication: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor,
) -> RuntimeHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name=name)
    return RuntimeHttpClient.from_server_address(address, ca is None, ca, (version, authentication))
