"""What a user asks for: run a recipe, resume a run, compare methods, open a finished run.

Each is a plain function; the command line only parses arguments and draws progress.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from folklora import __version__
from folklora.adapters.lowrank import Tensors
from folklora.backbones.metric import Metric, same_metric
from folklora.data.columns import listed
from folklora.data.partition_file import from_json, to_json
from folklora.errors import DataError, MessageError, RecipeError, RunError
from folklora.federation.contract import CONTRACT, Contract
from folklora.federation.engine import Engine
from folklora.federation.faults import with_faults
from folklora.federation.folder import MemberFolder
from folklora.federation.intake import intake_of
from folklora.federation.local import LocalEngine
from folklora.federation.newcomers import settle_in
from folklora.federation.parties import rowless_setup
from folklora.federation.poison import aftermath, with_liars
from folklora.federation.rounds import Progress, Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup, data_of, prepare, validate
from folklora.federation.standing import own_model
from folklora.federation.trackers import refuse_unreachable, track
from folklora.recipe import Recipe

Summary = dict[str, Any]


def run(recipe: Recipe, out: str | Path, progress: Progress | None = None) -> Summary:
    """Run a recipe into a new run directory and return its summary.

    Raises
    ------
    FolkLoraError
        Before work starts, for anything in the recipe, the data or the directory that cannot be.
    """
    _refuse_network(recipe)
    setup = prepare(recipe)
    engine = with_liars(LocalEngine(setup))
    refuse_unreachable(recipe.track)
    agreed = {CONTRACT: Contract.of(setup.method.context).encode()}
    data = setup.data
    directory = RunDirectory.create(out, recipe, to_json(data.table, data.splits, data.later), agreed)
    return _play(directory, engine, progress)


def resume(path: str | Path, progress: Progress | None = None, *, previous: bool = False) -> Summary:
    """Go on where a run stands; a finished run gives its summary back.

    Parameters
    ----------
    previous
        Step back to the checkpoint before the last one first (after a file was corrupted).
    """
    directory = RunDirectory.open(path)
    if previous:
        directory.step_back()
    if directory.finished:
        return read_summary(directory)
    _refuse_network(directory.recipe)
    setup = _prepared(directory)
    return _play(directory, with_liars(LocalEngine(setup)), progress)


def _play(directory: RunDirectory, engine: LocalEngine, progress: Progress | None) -> Summary:
    """Play a run in this process, with whatever its recipe simulates."""
    recipe = engine.setup.recipe
    harm = partial(aftermath, engine) if recipe.poison.kind != "none" else None
    return play(directory, engine.setup, with_faults(engine, recipe), progress or Silent(), harm=harm)


def _refuse_network(recipe: Recipe) -> None:
    if recipe.engine.kind != "local":
        raise RecipeError(
            f'engine.kind = "{recipe.engine.kind}" runs over a network: `folklora serve`; allowed here: "local"'
        )


def _prepared(directory: RunDirectory) -> Setup:
    """The setup of an existing run; the data must still be what it was, and was encoded when the run began."""
    setup = prepare(directory.recipe, encoding=False)
    refuse_other_data(directory, setup)
    return setup


def _without_rows(directory: RunDirectory) -> Setup:
    """What the models of an existing run need to be used; its examples may lie somewhere else by now."""
    recipe, (clients, classes) = directory.recipe, _agreed(directory)
    return rowless_setup(recipe, clients, classes, recipe.model.name)


def _agreed(directory: RunDirectory) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The clients of a run in their order, and its classes, as ``partition.json`` has them."""
    saved = directory.path / "partition.json"
    try:
        _, classes, splits, _ = from_json(saved.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{saved}: cannot be read: {error}") from None
    except DataError as error:
        raise RunError(f"{directory.path}: {error}") from None
    return tuple(splits), classes


def refuse_other_data(directory: RunDirectory, setup: Setup) -> None:
    """Raises RunError if a setup's data is not what a run began with."""
    saved = directory.path / "partition.json"
    try:
        same = saved.read_bytes() == to_json(setup.data.table, setup.data.splits, setup.data.later).encode()
    except OSError as error:
        raise RunError(f"{saved}: cannot be read: {error.strerror}") from None
    if not same:
        raise RunError(f"{directory.path}: the data is not what this run started with (partition.json differs)")


def play(
    directory: RunDirectory,
    setup: Setup,
    engine: Engine,
    progress: Progress,
    examples: Callable[[str], dict[str, int]] | None = None,
    harm: Callable[[Mapping[str, bytes | None], Summary], dict[str, Any]] | None = None,
) -> Summary:
    """Play a run to its end with an engine, from where its directory stands.

    Parameters
    ----------
    examples
        How many a client has in each split, where the setup's own splits do not tell.
    harm
        What simulated liars achieved, by the server's last replies and the clients' results.
    """
    with directory.locked(), track(setup.recipe, directory.path, progress) as told:
        rounds = Rounds(setup, directory, engine, list(setup.data.splits), told, examples)
        summary = rounds.play()
        joined = summary["newcomers"]["clients"] if setup.newcomers else {}
        assert rounds.checkpoint is not None  # it was played
        now = partial(setup.sizes, round=rounds.checkpoint.round + 1)  # a run may end before its data change
        for client, result in (*summary["clients"].items(), *joined.items()):
            result["examples"] = (examples or now)(client)
        if harm is not None:
            summary["poison"] = harm(rounds.replies(rounds.clients), summary["clients"])
        summary["environment"] = environment(setup)
        insight = setup.method.insight(rounds.state)
        if insight:
            directory.write("insight.safetensors", safetensors.torch.save(insight))
        directory.sweep()  # it may have been killed while the last round's commit did
        directory.write("summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    return summary


def environment(setup: Setup) -> dict[str, Any]:
    """What a run was computed with, for whoever compares numbers; nothing that tells whose machine it was."""
    backbone = setup.task.backbone
    return {
        "folklora": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": backbone.device.type,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def read_summary(directory: RunDirectory) -> Summary:
    try:
        summary: Summary = json.loads((directory.path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{directory.path / 'summary.json'} cannot be read: {error}") from None
    return summary


# -- comparing ---------------------------------------------------------------------------------------------------------


def variant(recipe: Recipe, text: str, seed: int) -> Recipe:
    """The recipe for one entry of ``--methods`` and one seed.

    An entry is a method's name, with settings of its own behind colons: ``celora:basis=frozen:train.lr=5e-3``. Keys
    with a dot are recipe keys, the others the method's options. The recipe's own ``[method]`` options go to the method
    it names.
    """
    name, *settings = text.split(":")
    document = recipe.model_dump(exclude={"method"})
    own = recipe.method.options if name == recipe.method.name else {}
    document["method"] = {"name": name, **own}
    document["seed"] = seed
    return Recipe.parse(document, [s if "." in s.partition("=")[0] else f"method.{s}" for s in settings], where=text)


def compare(
    recipe: Recipe, methods: Sequence[str], seeds: int, out: str | Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Run every method with every seed; runs that are already there are resumed or reused.

    Parameters
    ----------
    methods
        Entries as `variant` takes them.
    seeds
        How many seeds, counted from the recipe's.

    Returns
    -------
    dict
        ``rows`` (one a run) and ``runs`` (their folders under ``out``); also written to ``compare.json``.
    """
    if not methods:
        raise RecipeError("--methods is empty; allowed: names of methods with commas between them")
    if doubled := [m for m in dict.fromkeys(methods) if methods.count(m) > 1]:
        raise RecipeError(f"--methods names {doubled[0]!r} twice")
    plan = [(text, variant(recipe, text, recipe.seed + s)) for s in range(seeds) for text in methods]
    out = Path(out)
    for text, each in plan:  # all refusals come before any work
        _refuse_network(each)
        validate(each)
        refuse_another_recipe(each, out / run_name(text, each.seed))
    judged: dict[str, Metric] = {}
    for text, each in plan:
        data_of(each)  # not every seed can be dealt
        if each.seed == recipe.seed:  # what a method refuses of a recipe, it refuses with every seed
            task = prepare(each).task
            task.refuse_layout(each.train.packed, each.train.batch_size)
            judged[text] = task.metric
    same_metric(judged.items())
    rows, runs = [], []
    for text, each in plan:
        name = run_name(text, each.seed)
        if progress is not None:
            progress.run(name)
        summary = run_or_resume(each, out / name, progress)
        rows.append({**summary["row"], "variant": text})
        runs.append(name)
        document = {"rows": rows, "runs": runs}
        RunDirectory(out).write("compare.json", json.dumps(document, indent=1, allow_nan=False).encode())
    return document


def run_name(text: str, seed: int) -> str:
    """The folder of one run of a comparison: its entry in ``--methods``, and the seed."""
    return f"{text.replace(':', '__').replace('/', '_')}-s{seed}"


def run_or_resume(recipe: Recipe, path: Path, progress: Progress | None = None) -> Summary:
    """The summary of a run: begun, gone on with, or only read; RunError if ``path`` holds another one."""
    if not (path / "recipe.toml").exists():
        return run(recipe, path, progress)
    refuse_another_recipe(recipe, path)
    return resume(path, progress)


def refuse_another_recipe(recipe: Recipe, path: Path) -> None:
    """Raises RunError if ``path`` holds a run, and not of this recipe."""
    if (path / "recipe.toml").exists() and RunDirectory.open(path).recipe != recipe:
        raise RunError(f"{path} holds a run of another recipe; use another --out, or remove it")


# -- opening a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClientModel:
    """One client's model out of a run: its tensors at its own rank, and the setup they belong to.

    ``steps`` is how often it applies a shared block; None: as often as the backbone does.
    """

    setup: Setup
    client: str
    rank: int
    tensors: Tensors
    steps: int | None = None


def client_model(path: str | Path, client: str, *, tuned: bool = False, rows: bool = True) -> ClientModel:
    """The model a client ended with: after the server's last reply, or (``tuned``) after its own last training.

    ``path`` is a run directory or, of a network run, the folder that a member keeps of it. ``rows`` as `client_models`.

    Raises
    ------
    RunError
        If the run has no such client or nothing committed yet.
    """
    return client_models(path, [client], tuned=tuned, rows=rows)[client]


def client_models(
    path: str | Path, clients: Sequence[str] | None = None, *, tuned: bool = False, rows: bool = True
) -> dict[str, ClientModel]:
    """The same of several clients (default: of all), in their order; the run is read once, and all share a setup.

    ``rows`` says whether that setup holds the run's examples, which must then still be what they were; who only uses
    the models asks for none. Where there are newcomers they are read anyway: their models begin with their own data.
    """
    if (brief := MemberFolder(Path(path)).brief()) is not None:
        for client in clients or ():
            if client != brief.client:
                raise RunError(f"{path}: no client {client!r} in a member's folder; allowed: {brief.client}")
        setup, tensors, steps = own_model(MemberFolder(Path(path)), brief, tuned=tuned)
        return {brief.client: ClientModel(setup, brief.client, setup.method.adapter.rank(tensors), tensors, steps)}
    directory = _local(path)
    setup = _prepared(directory) if rows or directory.recipe.newcomers.share else _without_rows(directory)
    wanted = list(setup.data.splits) if clients is None else list(dict.fromkeys(clients))
    for client in wanted:
        if client not in setup.data.splits:
            raise RunError(f"{path}: no client {client!r}; allowed: {listed(list(setup.data.splits))}")
    patience = setup.recipe.train.patience
    checkpoint = (directory.checkpoint(best=True) if patience is not None else None) or directory.checkpoint()
    if checkpoint is None:
        raise RunError(f"{path}: nothing is committed yet")
    engine = LocalEngine(setup)
    engine.present(checkpoint.round + 1, wanted, 1)  # with the data of now
    intake, state = intake_of(setup, engine), {}
    if (checkpoint.round and not tuned) or not set(wanted).isdisjoint(setup.newcomers):
        state = directory.tensors(checkpoint, checkpoint.server)
    chosen = _chosen_steps(directory, setup)
    found = {}
    for client in wanted:
        member = engine.members[client]
        if client in setup.newcomers:
            settle_in(setup, state, member, checkpoint.round, tuned=tuned)
        else:
            member.restore(directory.tensors(checkpoint, checkpoint.clients[client]))
            if not tuned and checkpoint.round:
                reply = intake.reply(state, client)
                if reply is not None:
                    member.receive(reply)
        tensors = member.method.model(member.client)
        steps = chosen.get(client) or setup.steps(client)
        found[client] = ClientModel(setup, client, member.method.adapter.rank(tensors), tensors, steps)
    return found


def _chosen_steps(directory: RunDirectory, setup: Setup) -> dict[str, int]:
    """How often clients of a finished run chose to apply a shared block."""
    if setup.depths is None or not setup.depths.auto or not directory.finished:
        return {}
    summary, where = read_summary(directory), directory.path / "summary.json"
    try:
        results = {**summary["clients"], **summary.get("newcomers", {}).get("clients", {})}
        found = {client: result.get("depth") for client, result in results.items()}
        for client, steps in found.items():
            try:
                setup.depths.check(client, steps, chosen=True)
            except MessageError as error:
                raise RunError(f"{where}: client {client!r}: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise RunError(f"{where}: clients: not what a run ends with") from None
    return found


def clients_of(path: str | Path) -> tuple[str, ...]:
    """Whose models `client_models` gives; RunError where those are elsewhere."""
    if (brief := MemberFolder(Path(path)).brief()) is not None:
        return (brief.client,)
    return _agreed(_local(path))[0]


def _local(path: str | Path) -> RunDirectory:
    directory = RunDirectory.open(path)
    if directory.recipe.engine.kind != "local":
        raise RunError(f"{path}: the members' models are at the members; allowed: a member's folder, .../runs/<run>")
    return directory


def recipe_of(path: str | Path) -> Recipe:
    """The recipe of a run directory, or of the folder that a member keeps of a network run."""
    brief = MemberFolder(Path(path)).brief()
    return RunDirectory.open(path).recipe if brief is None else Recipe.from_toml(brief.recipe)
