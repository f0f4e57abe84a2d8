"""`attack`: what do one method's messages leak? Victims, the attack, its control, and a result anybody can repeat.

Victims, their batches, the attack's random numbers and its budget follow from ``seed`` and the data alone, so they are
the same for every method. The control is the same attack, with the same random numbers, on the same observation with
the numbers of every tensor shuffled: what the prior alone achieves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from folklora.errors import AttackError, RunError
from folklora.federation.rounds import Progress, Silent
from folklora.federation.run import variant
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import Setup, prepare
from folklora.methods import find as find_method
from folklora.privacy.attacks import find
from folklora.privacy.attacks.attacker import Attacker
from folklora.privacy.attacks.guess import Attack, Form
from folklora.privacy.attacks.inference import Inference, Stage
from folklora.privacy.attacks.observation import Knowledge, Victim, View
from folklora.privacy.attacks.prior import Bigrams, LanguageModel, Prior
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.result import Played, outcome, write
from folklora.privacy.attacks.victims import choose, tokens_of, with_secrets
from folklora.privacy.attacks.warm import Warm, attackable, play, reopen
from folklora.privacy.attacks.witness import Seen, watch
from folklora.randomness import torch_generator
from folklora.recipe import Recipe

LEAST = {"batch": 1, "victims": 1, "warmup": 0, "steps": 1, "rounds": 1, "budget": 1, "seed": 0}

REHEARSED = 256
"""Public examples of a rehearsal, at most."""


@dataclass(frozen=True)
class Plan:
    """What is to be attacked, and how.

    Attributes
    ----------
    method
        An entry as ``--methods`` of `folklora compare` takes it; None: the recipe's own.
    batch, victims
        Examples of a batch; batches.
    warmup
        Rounds before the one that is attacked; of a run its last checkpoint counts instead.
    steps, rounds
        Gradient steps of the victim's round; rounds that are seen, all of the same batch.
    budget
        Gradients of the replica that an attack may take, for the attack and for its control each.
    prior
        "bigrams" of the public half, "none", or a language model's folder; of texts.
    rehearse
        Whether what never travels is believed to be as a client of public examples would have it.
    canary
        Whether every victim's text ends with a secret of random tokens.
    """

    attack: str
    method: str | None = None
    knowledge: Knowledge = field(default_factory=Knowledge)
    batch: int = 1
    victims: int = 4
    warmup: int = 1
    steps: int = 1
    rounds: int = 1
    seed: int = 0
    budget: int = 200
    prior: str = "bigrams"
    rehearse: bool = False
    canary: bool = False


def plan_of(
    name: str, *, view: str = "sent", bases: bool = False, labels: bool = True, lengths: bool = True, **effort: Any
) -> Plan:
    """A plan from a command line's words.

    Raises
    ------
    AttackError
        For an attack or a view that there is not, and numbers below their least.
    """
    find(name)
    if view not in get_args(View):
        raise AttackError(f"--view {view!r}; allowed: {', '.join(get_args(View))}")
    plan = Plan(name, knowledge=Knowledge(cast(View, view), labels, lengths, bases), **effort)
    for field_, allowed in LEAST.items():
        if getattr(plan, field_) < allowed:
            raise AttackError(f"--{field_} {getattr(plan, field_)}; allowed: at least {allowed}")
    return plan


def attack(
    source: str | Path | Recipe | None,
    plan: Plan,
    to: str | Path | None = None,
    progress: Progress | None = None,
    *,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Attack the messages of a recipe or of a run; the result as a document, which is also written.

    Parameters
    ----------
    source
        A recipe or its file; or a run directory, from whose last checkpoint the attack starts.
    to
        Folder for the result and, of pictures, a gallery; by default ``attacks`` in a run directory, and none else.
    overrides
        ``key=value`` for a recipe's file.

    Raises
    ------
    FolkLoraError
        Before work starts, for what cannot be attacked so.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    chosen = find(plan.attack)()
    recipe, run = _recipe(source, plan, overrides)
    form: Form = "image" if recipe.form == "image" else "text"
    if form not in chosen.forms:
        raise AttackError(
            f"--attack {plan.attack!r} is one on {' and '.join(sorted(chosen.forms))}, and the recipe's examples are "
            f"{'pictures' if form == 'image' else 'texts'}; allowed: `folklora attack --list` says which"
        )
    _refuse(plan, form)
    if find_method(recipe.method.name).condenses and not isinstance(chosen, Inference):
        raise AttackError(
            f"method {recipe.method.name!r} sends data that its clients made, and no gradient stands behind it; "
            'allowed: --attack "condensed"'
        )
    if recipe.depth.train or recipe.depth.device_steps:
        raise AttackError(
            "depth.train or depth.device_steps: clients of this recipe work at several depths, and the attacker's copy "
            "of the model has one; allowed: depth.steps alone"
        )
    warm = _warm(recipe, run, plan, progress)
    replica = Replica(warm.setup.task, warm.setup.method.adapter, form)
    public, victims = choose(warm.setup, plan.batch, plan.victims, plan.seed)
    secrets = None
    if plan.canary:
        setup, victims, secrets = with_secrets(warm.setup, victims, plan.seed)
        warm = replace(warm, setup=setup)
    lens = Attacker(replica, plan.knowledge, _prior(plan, warm.setup, public, form), _usual(warm.setup, public, form))
    lens.advance = progress.advance
    folder = Path(to) if to is not None else run / "attacks" if run is not None else None
    if isinstance(chosen, Inference):
        clients = list(dict.fromkeys(victim.client for victim in victims))
        progress.phase(f"{plan.attack} {warm.setup.recipe.method.name}", chosen.effort(plan.budget, warm, clients))
        found = chosen.infer(Stage(warm, lens, clients, plan.seed, plan.budget, progress.advance))
        document = {**_circumstances(warm, plan, chosen, form, lens), **found.document(), "utility": None}
        document["seconds"] = round(time.perf_counter() - started, 2)
        if folder is not None:
            write(folder, document, replica, [])
        return document
    rows = public[:REHEARSED] if plan.rehearse else None
    seen = [
        watch(warm, victim, plan.knowledge, replica, steps=plan.steps, rounds=plan.rounds, public=rows)
        for victim in victims
    ]
    _refuse_unmatched(warm.setup, seen, chosen)
    progress.phase(f"{plan.attack} {warm.setup.recipe.method.name}", 2 * plan.budget * len(victims))
    played = [_play(chosen, lens, watched, plan, victim) for watched, victim in zip(seen, victims, strict=True)]
    document = {
        **_circumstances(warm, plan, chosen, form, lens),
        **outcome(replica, played, secrets),
        "seconds": round(time.perf_counter() - started, 2),
        "sent": {name: list(t.shape) for name, t in seen[0][0].observation.sent.items()},
        "unmatched": list(seen[0][0].unmatched),
        "bytes": seen[0][0].bytes,
        "utility": None,
    }
    if folder is not None:
        write(folder, document, replica, played)
    return document


def _circumstances(warm: Warm, plan: Plan, chosen: Attack, form: Form, lens: Attacker) -> dict[str, Any]:
    """What was attacked, with what knowledge and effort."""
    granted = {key: value for key, value in asdict(plan.knowledge).items() if key != "view"}
    return {
        "attack": chosen.name,
        "title": chosen.title,
        "method": warm.setup.recipe.method.name,
        "variant": plan.method or warm.setup.recipe.method.name,
        "seed": plan.seed,
        "view": plan.knowledge.view,
        "knowledge": {
            **granted,
            "rehearsed": plan.rehearse,
            "rounds": plan.rounds,
            "prior": None if lens.prior is None else lens.prior.name,
        },
        "batch": plan.batch,
        "warmup": warm.round,
        "steps": plan.steps,
        "budget": plan.budget,
        "form": form,
    }


# -- before work starts ------------------------------------------------------------------------------------------------


def _recipe(source: str | Path | Recipe | None, plan: Plan, overrides: Sequence[str]) -> tuple[Recipe, Path | None]:
    if source is None:
        raise AttackError("nothing to attack is named; allowed: a recipe, or a run directory")
    if not isinstance(source, Recipe) and Path(source).is_dir():
        directory = RunDirectory.open(source)
        name = directory.recipe.method.name
        if plan.method is not None and plan.method != name:
            raise RunError(f"{source} is a run of {name!r}; allowed: no --method, or a recipe in its place")
        if overrides:
            raise RunError(f"{source} is a run, whose recipe stands; allowed: no --set, or a recipe in its place")
        return directory.recipe, directory.path
    recipe = source if isinstance(source, Recipe) else Recipe.read(source, overrides)
    return (variant(recipe, plan.method, recipe.seed) if plan.method else recipe), None


def _refuse(plan: Plan, form: Form) -> None:
    if plan.canary and form == "image":
        raise AttackError("--canary: a secret is hidden in texts, and the recipe's examples are pictures")
    if form == "text" and plan.prior not in {"bigrams", "none"} and not Path(plan.prior).is_dir():
        raise AttackError(f"--prior {plan.prior}: no such folder; allowed: bigrams, none, or a language model's folder")


def _warm(recipe: Recipe, run: Path | None, plan: Plan, progress: Progress) -> Warm:
    if run is not None:
        return reopen(run)
    choose(prepare(attackable(recipe)), plan.batch, plan.victims, plan.seed)  # refusals come before rounds are played
    return play(recipe, plan.warmup, progress)


def _prior(plan: Plan, setup: Setup, public: np.ndarray, form: Form) -> Prior | None:
    if form == "image" or plan.prior == "none":
        return None
    task: Any = setup.task
    if plan.prior != "bigrams":
        return LanguageModel(Path(plan.prior), task.backbone.tokenizer)
    return Bigrams([tokens_of(setup.encoded[i]) for i in public], len(task.backbone.tokenizer))


def _usual(setup: Setup, public: np.ndarray, form: Form) -> int:
    """The median length of the public texts."""
    return 1 if form == "image" else int(np.median([len(setup.encoded[i]) for i in public]))


def _refuse_unmatched(setup: Setup, seen: Sequence[Sequence[Seen]], chosen: Attack) -> None:
    """Raises AttackError where something travels and none of it is a trained tensor that the replica has."""
    for each in (one for watched in seen for one in watched):
        if chosen.matches and each.unmatched and not each.observation.gradient:
            raise AttackError(
                f"method {setup.recipe.method.name!r} sends {each.unmatched[0]!r} and nothing that the client trains "
                "under that name: gradient attacks have nothing to match; allowed: a method that sends trained tensors"
            )


# -- the attack and its control ----------------------------------------------------------------------------------------


def _play(chosen: Attack, lens: Attacker, watched: Sequence[Seen], plan: Plan, victim: Victim) -> Played:
    real = [each.observation for each in watched]
    shuffle = torch_generator(plan.seed, "shuffle", victim.client, int(victim.rows[0]))
    shuffled = [chosen.control(each, shuffle) for each in real]
    found = []
    for first, *further in (real, shuffled):
        lens.further, lens.spent = further, 0
        generator = torch_generator(plan.seed, "attack", victim.client, int(victim.rows[0]))
        found.append(chosen.run(lens, first, plan.budget, generator))
        for _ in range(lens.spent, plan.budget):
            lens.advance()
    return Played(victim, *found)
