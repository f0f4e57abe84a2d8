"""Uploads that the server mixes and cannot read: both ends of ``secure.kind = "ckks"``, over `folklora.privacy.ckks`.

Clients share a secret key that the server does not have. Each encrypts what its method sends; the server gives each its
own sum, ``sum_j w_ij x_j``, with weights that follow from the sketches, the numbers of examples, and who took part
(`Method.blind_mixing`); the client decrypts. The state holds ciphertexts::

    sealed/common/<kind>/mask, body     one mix for all                       int32 [m, 2048], [numbers + m]
    sealed/own/<kind>/mask, body        a row of each client, zeros before its first     [N, ...]
    sealed/known                        [N] bool: who has one

Who must trust whom:

- A server that follows the protocol reads neither uploads nor replies; it still sees sketches, numbers of examples,
  losses and scores.
- Every member trusts the server to follow it. Ciphertexts are malleable, and a member cannot tell a mix from a made-up
  reply: whether it refuses one, and its losses and scores after another, tell of the key. A coefficient of the secret
  takes two replies (the number that `Key.decrypt` checks can be moved by it), all of the key some 4,000.
- Every member is trusted by every other with the key: whoever has it reads whatever ciphertext it gets hold of. The
  server must hand no member's upload to another member, and one member that helps the server opens all uploads of all.
- A member that sends noise, or encrypts with another key, spoils every mix that it has a weight in. The others notice
  when they decrypt and refuse that reply, but nobody can tell who it was; the run goes on when it has stepped back a
  round (``--previous``). A wrong key by mistake is found before the training: members say which they have, by digest.

Encryption draws from the system: bits differ from run to run, also after a resume; numbers agree within 1e-4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import kind
from folklora.errors import FederationError, MessageError
from folklora.federation.codec import SEALED, decode, encode
from folklora.federation.engine import Engine
from folklora.federation.intake import Intake
from folklora.federation.ledger import Ledger
from folklora.federation.outlet import Outlet
from folklora.federation.sealing import ASKED, TOPIC, SealedUpload, Sealing
from folklora.federation.setup import Setup
from folklora.methods.base import Method
from folklora.methods.contract import Client, Message, State
from folklora.privacy.ciphertexts import Mixed, mix
from folklora.privacy.ckks import ID, Key
from folklora.recipe import Recipe

IS_ID = re.compile(rb"[0-9a-f]{%d}" % ID).fullmatch
SHOWN = 1000
"""Clients up to which the matrix of weights is kept, to be shown."""


class EncryptedOutlet(Outlet):
    """A member's end; ``key`` may be None where nothing encrypted is sent or opened."""

    def __init__(self, recipe: Recipe, method: Method, client: Client, key: Key | None) -> None:
        super().__init__(recipe, method, client)
        self.given = key
        self.sealing = Sealing(method)

    @property
    def key(self) -> Key:
        if self.given is None:
            raise FederationError('secure.kind = "ckks" and no key here; allowed: the key that the run began with')
        return self.given

    def talk(self, round: int, topic: str, data: bytes) -> bytes:
        if topic != TOPIC or data != ASKED:
            return super().talk(round, topic, data)
        return self.key.id.encode()

    def encode(self, round: int, message: Message) -> bytes:
        return self.sealing.seal(self.protect(round, message), self.key)

    def open(self, data: bytes, most: int) -> Message:
        message = decode(data, most)
        if not any(kind(name) == SEALED for name in message.tensors):
            return message  # a welcome
        clear = {name: tensor for name, tensor in message.tensors.items() if kind(name) != SEALED}
        return Message({**clear, **self.sealing.opened(message, self.key, self.client.id)}, message.numbers)


class EncryptedIntake(Intake):
    """The server's end; it has no key, and needs no library."""

    reads = False

    def __init__(self, setup: Setup, engine: Engine) -> None:
        super().__init__(setup, engine)
        self.sealing = Sealing(self.method)
        self.keys: dict[str, str] = {}  # of each client that this process has met
        self.position = {client: i for i, client in enumerate(self.method.context.clients)}

    def prepare(self, round: int, clients: Sequence[str], ledger: Ledger) -> dict[str, str]:
        """Who has no key, or another than most have, is left out before it spoils what all others get."""
        new = [client for client in clients if client not in self.keys]
        for client in new:
            ledger.down[client] += len(ASKED)
        for client, answer in self.engine.talk(round, TOPIC, dict.fromkeys(new, ASKED)):
            ledger.up[client] += len(answer)
            if IS_ID(answer):
                self.keys[client] = answer.decode()
        said = [self.keys[client] for client in self.position if client in self.keys]
        (common, _), *_ = Counter(said).most_common() or [("", 0)]  # of two as common the first member's
        failed = {client: "it did not say which key it has" for client in clients if client not in self.keys}
        for client in clients:
            if self.keys.get(client, common) != common:
                failed[client] = f"its key is {self.keys.pop(client)}, most members' is {common}; allowed: one for all"
        return failed

    def read(self, round: int, state: State, client: str, data: bytes | None, said: Iterable[Message | None]) -> Any:
        if data is None:
            raise MessageError("it sent nothing; allowed: what the method asks for")
        upload = self.sealing.read(data, self.method.expected(round, state, client))
        # Who is hidden by its own noise counts as one example, whatever it says.
        return SealedUpload(1.0, upload.sealed) if self.recipe.privacy.unit == "client" else upload

    def server(self, round: int, state: State, uploads: Mapping[str, Any], ledger: Ledger) -> State:
        clients = list(uploads)
        examples = {client: Message({}, {"examples": upload.examples}) for client, upload in uploads.items()}
        weights = self.method.weights(examples)
        rows = self.method.blind_mixing(state, clients, weights)
        after = dict(state)
        for name in uploads[clients[0]].sealed:
            wanted = rows if name in self.method.travels else weights
            mixed = mix([upload.sealed[name] for upload in uploads.values()], np.atleast_2d(wanted.double().numpy()))
            after |= self._common(name, mixed) if wanted.dim() == 1 else self._own(state, clients, name, mixed)
        return after | (self._weights(state, clients, rows) if rows.dim() == 2 else {})

    def _common(self, name: str, mixed: Mixed) -> State:
        path = f"{SEALED}/common/{name}"
        return {f"{path}/mask": _tensor(mixed.masks[0]), f"{path}/body": _tensor(mixed.body[0])}

    def _own(self, state: State, clients: Sequence[str], name: str, mixed: Mixed) -> State:
        """A row for each client that took part; the others keep theirs."""
        count, where = len(self.position), torch.tensor([self.position[client] for client in clients])
        known = state.get(f"{SEALED}/known", torch.zeros(count, dtype=torch.bool)).clone()
        known[where] = True
        found: State = {f"{SEALED}/known": known}
        for part, rows in (("mask", _tensor(mixed.masks)), ("body", _tensor(mixed.body))):
            path = f"{SEALED}/own/{name}/{part}"
            found[path] = state.get(path, rows.new_zeros(count, *rows.shape[1:])).clone()
            found[path][where] = rows
        return found

    def _weights(self, state: State, clients: Sequence[str], rows: Tensor) -> State:
        """To be shown; see `Method.insight`."""
        count, where = len(self.position), torch.tensor([self.position[client] for client in clients])
        if count > SHOWN:
            return {}
        full = state.get("weights", torch.eye(count)).clone()
        full[where] = 0.0
        full[where[:, None], where] = rows.float()
        return {"weights": full}

    def reply(self, state: State, client: str) -> bytes | None:
        place = self.position[client]
        own = f"{SEALED}/known" in state and bool(state[f"{SEALED}/known"][place])
        tensors = {}
        for path, tensor in state.items():
            of, _, rest = path.removeprefix(f"{SEALED}/").partition("/")
            if kind(path) == SEALED and of == "common":
                tensors[f"{SEALED}/{rest}"] = tensor
            elif kind(path) == SEALED and of == "own" and own:
                tensors[f"{SEALED}/{rest}"] = tensor[place]
        return encode(Message(tensors)) if tensors else None

    def messages(self, uploads: Mapping[str, Any]) -> Mapping[str, Message] | None:
        return None


def _tensor(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.int32).copy())
