"""The server's end of a round's uploads: from what arrived to the method's new state, and from the state to replies.

In the order of a round::

    prepare(round, clients)       before they train: what must be said first; who cannot take part, and why
    read(round, state, client, data, said) -> upload      one answer, checked; whatever is wrong fails that client
    server(round, state, uploads) -> state      the method's own server step, on what this server may know of them
    reply(state, client) -> bytes               what a client is sent

`Intake` is the plain one: uploads are messages, and the method is given all of them. Others stand between: robust
aggregation gives it another centre than the mean, differential privacy adds noise, secure aggregation knows nothing
but sums, encrypted mixing not even those. The members' end is `folklora.federation.outlet`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from folklora.errors import MessageError
from folklora.federation.codec import encode
from folklora.federation.compression import Compression
from folklora.federation.engine import Engine
from folklora.federation.ledger import Ledger
from folklora.federation.sampling import simulated_secret
from folklora.federation.setup import Setup
from folklora.methods.contract import Message, State


class Intake:
    """Uploads in the clear; see the module's text.

    Attributes
    ----------
    least, needs
        Of fewer uploads nothing can be made: such a round is not committed, and the run stops. The key that says so.
    alone
        Whether `server` is asked even if nothing arrived.
    reads
        Whether the state holds models that this server can read.
    """

    least: int = 0
    needs: str = "engine.min_clients"
    alone: bool = False
    reads: bool = True

    def __init__(self, setup: Setup, engine: Engine) -> None:
        self.recipe = setup.recipe
        self.method = setup.method
        self.engine = engine
        self.compression = Compression(self.recipe.message, self.method)

    def prepare(self, round: int, clients: Sequence[str], ledger: Ledger) -> dict[str, str]:
        """Whatever must be said before the clients train (`Engine.talk`, `Engine.attach`); who fails at it, and why."""
        return {}

    def read(self, round: int, state: State, client: str, data: bytes | None, said: Iterable[Message | None]) -> Any:
        """One client's upload, or None where it has nothing to say.

        Raises
        ------
        MessageError
            If it is not what was agreed.
        """
        expected = self.method.expected(round, state, client)
        if data is None:
            if expected:
                raise MessageError("it sent nothing; allowed: what the method asks for")
            return None
        message = self.compression.read(round, client, data, expected, said)
        self.method.check_update(round, state, client, message)
        return message

    def server(self, round: int, state: State, uploads: Mapping[str, Any], ledger: Ledger) -> State:
        return self.method.server(round, state, uploads)

    def reply(self, state: State, client: str) -> bytes | None:
        message = self.method.reply(state, client)
        return None if message is None else encode(message, self.recipe.message.dtype)

    def messages(self, uploads: Mapping[str, Any]) -> Mapping[str, Message] | None:
        """The uploads as the method's messages, for measuring; None where this server cannot read them."""
        return uploads


def intake_of(setup: Setup, engine: Engine, secret: int | None = None) -> Intake:
    """The recipe's.

    Parameters
    ----------
    secret
        The server's own; by default that of a simulation.
    """
    # They are built on this file.
    from folklora.federation.encrypted import EncryptedIntake
    from folklora.federation.masked import MaskedIntake
    from folklora.federation.protection import EqualIntake, NoisyIntake
    from folklora.federation.robustness import RobustIntake

    recipe = setup.recipe
    if recipe.secure.kind == "masks":
        return MaskedIntake(setup, engine)
    if recipe.secure.kind == "ckks":
        return EncryptedIntake(setup, engine)
    if recipe.robust.rule != "mean":
        return RobustIntake(setup, engine)
    if recipe.privacy.unit == "client" and recipe.privacy.placement == "server":
        return NoisyIntake(setup, engine, simulated_secret(recipe) if secret is None else secret)
    if recipe.privacy.unit == "client":
        return EqualIntake(setup, engine)
    return Intake(setup, engine)
