"""The command line: each command parses its arguments, makes one call into the library, and shows what came back.

Results go to stdout, progress and everything else to stderr. A user's mistake is one line and exit code 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from folklora.cli.attacking import attack
from folklora.cli.looking import audit, inspect, methods
from folklora.cli.models import chat, evaluate, export, merge, predict
from folklora.cli.network import (
    federation_add,
    federation_init,
    federation_renew,
    join,
    keys,
    serve,
    status,
)
from folklora.cli.planning import plan
from folklora.cli.running import compare, report, resume, run
from folklora.errors import FolkLoraError
from folklora.terminal import err

app = typer.Typer(
    help="FolkLoRA: personalised federated fine-tuning of foundation models in kilobytes a round.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
federation_app = typer.Typer(help="The folder of a federation over a network: keys, certificates, members.")
app.add_typer(federation_app, name="federation", no_args_is_help=True)

Command = Callable[..., Any]

LOCAL: tuple[Command, ...] = (
    run,
    resume,
    compare,
    plan,
    report,
    audit,
    methods,
    attack,
    inspect,
    export,
    merge,
    predict,
    evaluate,
    chat,
)
NETWORK: tuple[Command, ...] = (keys, serve, join, status)
FEDERATION: dict[str, Command] = {"init": federation_init, "add": federation_add, "renew": federation_renew}

for command in (*LOCAL, *NETWORK):
    app.command()(command)
for name, part in FEDERATION.items():
    federation_app.command(name)(part)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, ours a traceback."""
    try:
        app(prog_name="folklora")
    except FolkLoraError as error:
        err.print(f"error: {error}", style="red", soft_wrap=True)
        raise SystemExit(2) from None
