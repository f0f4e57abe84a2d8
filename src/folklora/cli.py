"""The command line: each command parses its arguments, makes one call into the library, and shows what came back.

Results go to stdout, progress and everything else to stderr. A user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from folklora.errors import FolkLoraError
from folklora.recipe import Recipe
from folklora.terminal import Shown, at_work, err, out, print_json

app = typer.Typer(
    help="FolkLoRA: personalised federated fine-tuning of foundation models in kilobytes a round.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
federation_app = typer.Typer(help="The folder of a federation over a network: keys, certificates, members.")
app.add_typer(federation_app, name="federation", no_args_is_help=True)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/banking77.toml", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="A run directory", show_default=False)]
FederationFolder = Annotated[Path, typer.Argument(help="A federation's folder", show_default=False)]
Days = Annotated[int, typer.Option(help="How long the server's certificate holds")]
Listen = Annotated[
    str | None,
    typer.Option("--host", help="Interface to listen on; default: loopback or all, by the federation's host"),
]
Port = Annotated[int | None, typer.Option(help="Port to listen on; default: the federation's")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain HTTP; on one machine only (loopback)")]
Tuned = Annotated[bool, typer.Option("--tuned", help="Before the server's last reply: as its own training left it")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.lr=1e-3 (repeatable)")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there")]


@app.command()
def run(
    recipe: RecipeFile,
    to: Annotated[Path, typer.Option("--out", help="New run directory")] = Path("runs/run"),
    set_: Set = None,
) -> None:
    """Run one recipe."""
    from folklora.federation.run import run as library_run

    with Shown() as shown:
        summary = library_run(Recipe.read(recipe, set_ or ()), to, shown)
    _finished(summary, to)


@app.command()
def resume(
    path: RunFolder,
    previous: Annotated[bool, typer.Option("--previous", help="Step back one committed round first")] = False,
    federation: Annotated[
        Path | None, typer.Option(help="Of a run that `folklora serve` began: the federation's folder")
    ] = None,
    listen: Listen = None,
    port: Port = None,
    insecure: Insecure = False,
) -> None:
    """Go on with a run that was interrupted."""
    if federation is not None:
        from folklora.federation.flower.serve import resume as library_resume_served

        with at_work(f"go on with: folklora resume {path} --federation {federation}"), Shown() as shown:
            summary = library_resume_served(
                path, federation, shown, previous=previous, listen=listen, port=port, insecure=insecure
            )
    else:
        from folklora.federation.run import resume as library_resume

        with Shown() as shown:
            summary = library_resume(path, shown, previous=previous)
    _finished(summary, path)


def _finished(summary: Mapping[str, Any], path: Path) -> None:
    from folklora.report.page import write_report
    from folklora.report.tables import rich_table

    out.print(rich_table([summary["row"]]))
    out.print(f"report: {write_report(path)}", soft_wrap=True)


@app.command()
def compare(
    recipe: RecipeFile,
    methods: Annotated[str, typer.Option(help="Names with commas; settings behind colons: celora:basis=frozen")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the recipe's")] = 1,
    to: Annotated[Path, typer.Option("--out", help="Directory; what is finished there is reused")] = Path(
        "runs/compare"
    ),
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run several methods with the same data, model and seeds, and compare them."""
    from folklora.federation.run import compare as library_compare
    from folklora.report.page import write_compare_report
    from folklora.report.tables import rich_table

    # Not at commas within brackets: adapter.rank=[4,8]
    names = [name.strip() for name in re.split(r",(?![^\[]*\])", methods) if name.strip()]
    with Shown() as shown:
        document = library_compare(Recipe.read(recipe, set_ or ()), names, seeds, to, shown)
    page = write_compare_report(to)
    if as_json:
        print_json(document)
    else:
        out.print(rich_table(document["rows"]))
        out.print(f"report: {page}", soft_wrap=True)


@app.command()
def report(path: RunFolder) -> None:
    """Write the HTML report and the figures of a run or a comparison again."""
    from folklora.report.page import write_compare_report, write_report

    write = write_compare_report if (path / "compare.json").is_file() else write_report
    out.print(f"report: {write(path)}", soft_wrap=True)


@app.command()
def audit(path: RunFolder, as_json: Json = False) -> None:
    """What left each client of a run, what was promised, and what is not protected: a page, and the same as JSON."""
    from folklora.report.audit import PAGE
    from folklora.report.audit import audit as library_audit

    document = library_audit(path)
    if as_json:
        print_json(document)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for line in document["summary"]:
        table.add_row(line["about"], line["says"])
    out.print(table)
    out.print(f"audit: {path / PAGE}", soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options")] = None,
    as_json: Json = False,
    d_in: Annotated[int, typer.Option(min=1, help="Input width of an adapted layer")] = 384,
    d_out: Annotated[int, typer.Option(min=1, help="Output width")] = 384,
    rank: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """All methods: paper, what travels, bytes per adapted layer and round; or the options of one."""
    from folklora.federation.traffic import describe_methods
    from folklora.methods import describe_options

    if name is not None:
        options = describe_options(name)
        if as_json:
            print_json({"name": name, "options": options})
            return
        table = Table(title=f"[method] name = {name!r}")
        for column in ("option", "allowed", "default", "what it is"):
            table.add_column(column)
        for option in options:
            table.add_row(option["key"], option["allowed"], option["default"], option["description"])
        out.print(table)
        return
    described = describe_methods(d_in, d_out, rank)
    if as_json:
        print_json(described)
        return
    only_heads = ", ".join(entry["name"] for entry in described if entry["needs_head"])
    table = Table(
        title=f"bytes per client, round and adapted layer: {d_out} x {d_in}, rank {rank}, float32",
        caption="Tasks without a head of their own (causal-lm, image-text): nothing of a head travels, once or in a "
        f"round; not for them: {only_heads}.",
    )
    for column in ("name", "method", "paper", "travels", "once", "up", "down", "mixed ranks"):
        table.add_column(column, justify="right" if column in {"up", "down"} else "left")
    for entry in described:
        table.add_row(
            entry["name"],
            entry["title"],
            entry["paper"] or "ours",
            ", ".join(entry["travels"]) or "nothing",
            entry["once"] or "",
            f"{entry['bytes_per_layer_up']:,.0f}",
            f"{entry['bytes_per_layer_down']:,.0f}",
            "yes" if entry["mixed_ranks"] else "",
        )
    out.print(table)


@app.command()
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


@app.command()
def inspect(recipe: RecipeFile, set_: Set = None, as_json: Json = False) -> None:
    """Clients, labels, model, adapter sizes, predicted bytes and memory; trains nothing."""
    from folklora.federation.inspect import inspect as library_inspect

    found = library_inspect(Recipe.read(recipe, set_ or ()))
    if as_json:
        print_json(found)
        return
    model, method, memory = found["model"], found["method"], found["memory"]
    out.print(
        f"{model['name']} ({model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{len(model['adapted_layers'])} adapted layers, trains in {model['compute']})"
    )
    numbers = ", ".join(f"{kind} {count:,}" for kind, count in found["adapter"]["numbers"].items())
    out.print(f"one client's adapter: {numbers} numbers, {found['adapter']['bytes'] / 1e3:,.1f} kB")
    out.print(
        f"{method['name']}: {method['rounds']} rounds, per client and round "
        f"{method['bytes_up_per_client_round'] / 1e3:,.1f} kB up, "
        f"{method['bytes_down_per_client_round'] / 1e3:,.1f} kB down; "
        f"once, both ways, {method['bytes_once_per_client'] / 1e3:,.1f} kB"
    )
    if privacy := found["privacy"]:
        noise = f"noise {privacy['noise']:.3g}, " if "noise" in privacy else ""
        out.print(
            f"privacy of each {privacy['unit']}: clip {privacy['clip']:g}, {noise}epsilon {privacy['epsilon']:.3g} at "
            f"delta {privacy['delta']:g} after {method['rounds']} rounds, of which the budget affords "
            f"{privacy['rounds']}"
        )
    if told := found["secure"].get("words"):
        out.print(told)
    out.print(
        f"memory: backbone {memory['backbone'] / 1e6:,.0f} MB (stored: {memory['backbone_stored'] / 1e6:,.1f} MB), "
        f"all clients {memory['clients'] / 1e6:,.1f} MB, "
        f"training {memory['training'] / 1e6:,.0f} MB with {memory['clients_side_by_side']} clients side by side"
    )
    table = Table(
        title=f"{len(found['clients'])} clients, {found['classes']} classes, common test set: {found['test_examples']}"
    )
    for column in ("client", "rank", "train", "validation", "test", "classes", "largest class"):
        table.add_column(column, justify="left" if column in {"client", "largest class"} else "right")
    for client, entry in found["clients"].items():
        label, count = max(entry["labels"].items(), key=lambda item: item[1])
        sizes = (str(entry["examples"][part]) for part in ("train", "validation", "test"))
        table.add_row(client, str(entry["rank"]), *sizes, str(len(entry["labels"])), f"{label} ({count})")
    out.print(table)
    if newcomers := found["newcomers"]:
        out.print(f"newcomers, who take part in no round: {', '.join(newcomers)}")


@app.command()
def export(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    to: Annotated[Path, typer.Option(help="New folder")],
    base: Annotated[
        str | None, typer.Option(help="What it names as its base model; default: as that is called here, path or not")
    ] = None,
    tuned: Tuned = False,
) -> None:
    """Write one client's adapter as a stock PEFT LoRA folder, with its head."""
    from folklora.federation.handover import export as library_export
    from folklora.federation.run import recipe_of

    out.print(f"adapter: {library_export(path, client, to, tuned=tuned, base=base)}", soft_wrap=True)
    model = recipe_of(path).model
    coarse = f"of {model.bits} bits (model.bits)" if model.bits else f"kept by {model.quantize} (model.quantize)"
    if model.bits or model.quantize != "none":
        err.print(
            f"note: it was trained on a backbone {coarse}; on the full-precision backbone that stock PEFT loads "
            "beside it, its answers differ a little",
            soft_wrap=True,
        )


@app.command()
def merge(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    to: Annotated[Path, typer.Option(help="New folder")],
    tuned: Tuned = False,
) -> None:
    """Write one client's whole model as an ordinary checkpoint: the base's weights with the adapter in them."""
    from folklora.federation.handover import merge as library_merge

    out.print(f"model: {library_merge(path, client, to, tuned=tuned)}", soft_wrap=True)


@app.command()
def predict(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts; with pictures: those to choose from", show_default=False)
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture's file (repeatable)")] = None,
    as_json: Json = False,
) -> None:
    """Ask one client's own model: classify texts or pictures, choose the texts that fit a picture, answer prompts."""
    from folklora.federation.answers import predict as library_predict

    answers = library_predict(path, client, text or (), image or ())
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        asked = answer["image"] if "image" in answer else answer["text"]
        if "answer" in answer:
            out.print(answer["answer"], soft_wrap=True)
        for found in answer.get("ranking", [answer] if "label" in answer else []):
            what = found["label"] if "label" in found else found["text"]
            out.print(f"{what}  ({100 * found['probability']:.1f} %)  {asked}", soft_wrap=True)


@app.command()
def chat(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    prompt: Annotated[str | None, typer.Option(help="One question; default: lines from standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest, with this probability")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn")] = 0,
    tuned: Tuned = False,
    as_json: Json = False,
) -> None:
    """Talk with one client's own model: /reset forgets what was said, /quit or Ctrl-D ends."""
    from folklora.federation.chat import open_conversation
    from folklora.talk import talk
    from folklora.training.generation import Sampling

    sampling = Sampling(temperature, top_p, seed)
    conversation = open_conversation(path, client, tuned=tuned, max_new_tokens=max_new_tokens, sampling=sampling)
    talk(conversation, prompt, as_json=as_json)


@app.command()
def keys(to: Annotated[Path, typer.Option(help="New file", show_default=False)]) -> None:
    """Make the key of a run that encrypts what members send (secure.kind = "ckks")."""
    from folklora.federation.keys import make_key

    key = make_key(to)
    out.print(f"key {key.id}: {to}", soft_wrap=True)
    err.print("Hand it to every member, on a way that the server does not see, and never to the server: who has it "
              "reads all uploads.", soft_wrap=True)  # fmt: skip


@federation_app.command("init")
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


@federation_app.command("add")
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


@federation_app.command("renew")
def federation_renew(folder: FederationFolder, days: Days = 730) -> None:
    """A new certificate for the server; members notice nothing."""
    from folklora.federation.flower.credentials import renew as library_renew

    out.print(f"certificate: {library_renew(folder, days).server_certificate}", soft_wrap=True)


@app.command()
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
    _finished(summary, to)


@app.command()
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


@app.command()
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


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, ours a traceback."""
    try:
        app(prog_name="folklora")
    except FolkLoraError as error:
        err.print(f"error: {error}", style="red", soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
