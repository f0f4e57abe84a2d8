"""Flower's SuperLink or SuperNode as a child that never outlives the process that started it.

``python -m folklora.federation.flower.daemon superlink ARGUMENTS``, which `folklora.federation.flower.processes` runs.
Its standard input is a pipe that the parent holds open: when that closes, on purpose or because the parent was killed,
the child ends, as after Ctrl-C and if need be the hard way. That works wherever there are pipes, and at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from types import SimpleNamespace
from typing import Any

from folklora.federation.flower.direct import dial_directly

GRACE = 3.0
"""Seconds that a child has for its goodbyes."""
SHORTEST, LONGEST = 0.2, 3.0
"""Seconds between two questions of a SuperNode to its SuperLink: after work, and when there has been none for long."""


HEARTBEAT = 15
"""Seconds within which a SuperNode tells that it is alive; one that does not, twice, counts as gone. Flower's is 30."""
PLAIN = "--plain-http"
"""An argument that Flower does not know."""


class Pause:
    """What a SuperNode does in place of Flower's fixed sleeps: short ones after work, longer ones as nothing comes.

    Flower's own are 3 s between two questions for work, and 0.5 s while the work is done; a round has several messages,
    and would be spent in them.
    """

    def __init__(self) -> None:
        self.idle = SHORTEST

    def __call__(self, seconds: float) -> None:
        if seconds < LONGEST:
            self.idle = SHORTEST
            time.sleep(min(seconds, SHORTEST / 2))
        else:
            time.sleep(min(self.idle, seconds))
            self.idle = min(1.3 * self.idle, LONGEST)


def _ends_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _quicken() -> None:
    """Shorter pauses in a SuperNode than Flower's."""
    from flwr.supercore import heartbeat
    from flwr.supercore.inflatable.inflatable_utils import pull_objects
    from flwr.supernode import fleet_http_connection, start_client_internal

    vars(start_client_internal)["time"] = SimpleNamespace(sleep=Pause())
    # A message may be announced before its contents are there: then it asks again, 1 s later as Flower has it.
    pull_objects.__kwdefaults__ = {**(pull_objects.__kwdefaults__ or {}), "initial_backoff": SHORTEST / 2}
    for module in (heartbeat, fleet_http_connection):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT


def _without_tls() -> None:
    """Let a SuperNode with a key speak plain HTTP, which Flower does not: the key still tells who it is."""
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.fleet_http_client import FleetHttpClient

    with_tls = FleetHttpClient.from_server_address

    def without(address: str, insecure: bool, root_certificates: object, **options: Any) -> FleetHttpClient:
        return with_tls(address, True, None, **options)

    vars(fleet_http_connection)["FleetHttpClient"] = SimpleNamespace(from_server_address=without)


def main() -> None:
    """Run the SuperLink or SuperNode until it ends or standard input does."""
    threading.Thread(target=_ends_with_parent, daemon=True).start()
    kind = sys.argv[1]
    plain = PLAIN in sys.argv
    sys.argv = [f"flower-{kind}", *(argument for argument in sys.argv[2:] if argument != PLAIN)]
    status = 1
    try:
        dial_directly()
        if kind == "superlink":
            from flwr.superlink.cli.flower_superlink import flower_superlink

            flower_superlink()
        else:
            from flwr.supernode.cli.flower_supernode import flower_supernode

            _quicken()
            if plain:
                _without_tls()
            flower_supernode()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
    finally:
        # Flower leaves threads behind that would keep a SuperNode without a SuperLink alive.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
