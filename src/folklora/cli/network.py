"""Federations over a network: keys, certificates, members, the server and its members at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from folklora.cli.common import Days, FederationFolder, Insecure, Json, Listen, Port, RecipeFile, Set
from folklora.cli.running import finished
from folklora.recipe import Recipe
from folklora.terminal import Shown, at_work, err, out, print_json


def keys(to: Annotated[Path, typer.Option(help="New file", show_default=False)]) -> None:
    """Make the key of a run that encrypts what members send (secure.kind = "ckks")."""
    from folklora.federation.keys import make_key

    key = make_key(to)
    out.print(f"key {key.id}: {to}", soft_wrap=True)
    err.print("Hand it to every member, on a way that the server does not see, and never to the server: who has it "
              "reads all uploads.", soft_wrap=True)  # fmt: skip


def federation_init(
    folder: Annotated[Path, typer.Argument(help="New folder", show_default=False)],
    members: Annotated[str, typer.Option(help="Names with commas")],
    host: Annotated[str, typer.Option(help="DNS name or IP address of the server, as members dial it")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port")] = 9443,
    days: Days = 730,
) -> None:
    """A certificate authority, the server's certificate, a key pair for each member."""
    from folklora.federation.flower.credentials import init as library_init

    federation = library_init(folder, [name.strip() for name in members.split(",")], host, port, days)
    for name in federation.members:
        out.print(f"{name}: {federation.member_folder(name)}", soft_wrap=True)
    err.print("Hand each member its folder, and nobody else: its key is how it proves who it is.", soft_wrap=True)


def federation_add(
    folder: FederationFolder,
    name: Annotated[str, typer.Argument(help="The new member", show_default=False)],
    public_key: Annotated[
        Path | None, typer.Option(help="The member's own key.pub (ssh-keygen -t ecdsa -b 384); default: a new pair")
    ] = None,
) -> None:
    """One more member."""
    from folklora.federation.flower.credentials import add as library_add

    out.print(f"{name}: {library_add(folder, name, public_key).folder}", soft_wrap=True)


def federation_renew(folder: FederationFolder, days: Days = 730) -> None:
    """A new certificate for the server; members notice nothing."""
    from folklora.federation.flower.credentials import renew as library_renew

    out.print(f"certificate: {library_renew(folder, days).server_certificate}", soft_wrap=True)


def serve(
    recipe: RecipeFile,
    federation: Annotated[Path, typer.Option(help="The federation's folder", show_default=False)],
    to: Annotated[Path, typer.Option("--out", help="Run directory; one of the same recipe goes on")] = Path("runs/run"),
    set_: Set = None,
    listen: Listen = None,
    port: Port = None,
    insecure: Insecure = False,
) -> None:
    """Run one recipe with the members of a federation, over the network."""
    from folklora.federation.flower.serve import serve as library_serve

    with at_work(f"go on with: folklora resume {to} --federation {federation}"), Shown() as shown:
        read = Recipe.read(recipe, set_ or ())
        summary = library_serve(read, federation, to, shown, listen=listen, port=port, insecure=insecure)
    finished(summary, to)


def join(
    federation: Annotated[
        Path, typer.Option(help="The folder that the member was handed, or the whole federation's", show_default=False)
    ],
    member: Annotated[str | None, typer.Option(help="The member's name, if the folder is not its own")] = None,
    data: Annotated[str | None, typer.Option(help="A file with the member's own rows")] = None,
    text: Annotated[str | None, typer.Option(help="Its column of texts; default: as in the recipe")] = None,
    label: Annotated[str | None, typer.Option(help="Its column of labels; default: as in the recipe")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Another of its columns: prompt=question, image=file, caption=title ... (repeatable)"),
    ] = None,
    rehearse: Annotated[
        str | None, typer.Option(help="In place of --data: the recipe's data.source, of which it takes its share")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the backbone; default: the embedded one")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; default: as in the recipe")] = None,
    key: Annotated[str | None, typer.Option(help="The members' common key, for runs that encrypt")] = None,
    once: Annotated[bool, typer.Option("--once", help="End with the first run that ends")] = False,
    insecure: Insecure = False,
) -> None:
    """Work for a member of a federation, run after run, until Ctrl-C."""
    from folklora.federation.flower.join import join as library_join

    with at_work("what this member learnt is kept; join again with the same command"):
        library_join(
            federation,
            member,
            data=data,
            text=text,
            label=label,
            rehearse=rehearse,
            model=model,
            columns={key: name for key, _, name in (each.partition("=") for each in column or ())},
            device=device,
            key=key,
            once=once,
            insecure=insecure,
        )


def status(
    federation: Annotated[Path, typer.Option(help="The federation's folder", show_default=False)], as_json: Json = False
) -> None:
    """What the server of a federation on this machine is at, and which members are connected."""
    from folklora.federation.flower.status import status as library_status

    found = library_status(federation)
    if as_json:
        print_json(found)
        return
    out.print(f"server: up at {found['address']} (pid {found['pid']})" if found["up"] else "server: not up")
    if found["run"]:
        state = "finished" if found["finished"] else f"round {found['round'] or 0} of {found['rounds']}"
        out.print(f"run: {found['run']}, {state}", soft_wrap=True)
    table = Table(title=found["federation"])
    for column in ("member", "registered", "connected", "since", "last seen"):
        table.add_column(column)
    for name, entry in found["members"].items():
        said = ["yes" if entry[key] else "no" for key in ("registered", "connected")]
        table.add_row(name, *said, entry["since"] or "", entry["seen"] or "")
    out.print(table)
