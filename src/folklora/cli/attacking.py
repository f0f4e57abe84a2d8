"""Attacks on what methods send."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from folklora.cli.common import Json, Set
from folklora.terminal import Shown, out, print_json


def attack(
    source: Annotated[
        Path | None, typer.Argument(help="A recipe, or a run directory", metavar="RECIPE_OR_RUN", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option("--attack", help="Which; --list names them")] = "",
    method: Annotated[str | None, typer.Option(help="As in compare; default: the recipe's own")] = None,
    view: Annotated[str, typer.Option(help="sent: what travels; gradient: one exact step, the upper bound")] = "sent",
    batch: Annotated[int, typer.Option(help="Examples of a batch")] = 1,
    victims: Annotated[int, typer.Option(help="Batches")] = 4,
    warmup: Annotated[int, typer.Option(help="Rounds before the one attacked; a run stands where it is")] = 1,
    steps: Annotated[int, typer.Option(help="Gradient steps of the victim's round")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds that are seen, all of the same batch")] = 1,
    seed: Annotated[int, typer.Option(help="Of the victims and of the attack")] = 0,
    bases: Annotated[bool, typer.Option("--bases", help="The attacker knows what the client keeps")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="It believes that to be what public examples would make of it")
    ] = False,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="It does not know the labels")] = False,
    no_lengths: Annotated[bool, typer.Option("--no-lengths", help="Nor the lengths of texts")] = False,
    budget: Annotated[int, typer.Option(help="Gradients that the attack may take, and its control as many")] = 200,
    prior: Annotated[str, typer.Option(help="Of texts: bigrams, none, or a language model's folder")] = "bigrams",
    canary: Annotated[bool, typer.Option("--canary", help="Hide a secret in every text, and look for it")] = False,
    set_: Set = None,
    as_json: Json = False,
    to: Annotated[Path | None, typer.Option(help="Folder for the result and a gallery of pictures")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name all attacks, and nothing else")] = False,
) -> None:
    """What do a method's messages leak? An attack on them, and its control on shuffled ones."""
    if list_:
        _list_attacks(as_json)
        return
    from folklora.privacy.attacks.run import attack as library_attack
    from folklora.privacy.attacks.run import plan_of

    plan = plan_of(
        name,
        method=method,
        view=view,
        batch=batch,
        victims=victims,
        warmup=warmup,
        steps=steps,
        rounds=rounds,
        seed=seed,
        bases=bases,
        rehearse=rehearse,
        labels=not no_labels,
        lengths=not no_lengths,
        budget=budget,
        prior=prior,
        canary=canary,
    )
    with Shown() as shown:
        document = library_attack(source, plan, to, shown, overrides=set_ or ())
    if as_json:
        print_json(document)
        return
    table = Table(title=f"{document['title']} on {document['variant']}, {document['bytes']:,} bytes sent")
    for column in ("metric", "attack", "control", "gain", "leakage is"):
        table.add_column(column, justify="left" if column in {"metric", "leakage is"} else "right")
    for metric, entry in document["metrics"].items():
        numbers = ("" if entry[key] is None else f"{entry[key]:.3f}" for key in ("mean", "control", "gain"))
        table.add_row(metric, *numbers, "more" if entry["higher"] else "less")
    out.print(table)
    if document["form"] == "text":
        for victim in document["victims"]:
            for key in ("original", "recovered", "control"):
                if key in victim:
                    out.print(f"{key:>9}: {' | '.join(victim[key])}", soft_wrap=True)


def _list_attacks(as_json: bool) -> None:
    from folklora.privacy.attacks import describe

    described = describe()
    if as_json:
        print_json(described)
        return
    table = Table()
    for column in ("name", "attack", "paper", "on"):
        table.add_column(column)
    for entry in described:
        table.add_row(entry["name"], entry["title"], entry["paper"], entry["forms"])
    out.print(table)
