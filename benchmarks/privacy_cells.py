"""What `privacy.py` measures: every cell is one attack on one method's messages, or one run with a defence."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resumable import placeless

from folklora.federation.run import run_name, variant
from folklora.privacy.attacks.observation import Knowledge
from folklora.privacy.attacks.run import Plan
from folklora.recipe import Recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SEEDS = (0, 1, 2)
TEXT = ("banking77.toml", ("data.limit=2000", "model.max_length=64", "train.rounds=5"))
PICTURES = ("fashion.toml", ("data.limit=1500", "adapter.tower=image", "train.rounds=5"))
BALANCED = ("banking77.toml", (*TEXT[1], "data.test_fraction=0.45"))
MANY = ("banking77.toml", ("data.clients=50", "data.limit=4000", "model.max_length=64", "train.rounds=10"))
"""More clients than elsewhere: what hides one of them is the others."""
COMMENTS = ("banking77.toml", ("data.source=../examples/data/goemotions.jsonl", *TEXT[1]))
CHATS = ("dolly.toml", ("data.limit=400", "model.max_length=64", "eval.generate=[]"))
EMOJI = ("emoji.toml", ("adapter.tower=image",))
PHOTOGRAPHS = (
    "fashion.toml",
    ("adapter.tower=image", "data.source=../examples/data/photographs.npz", "data.partition=iid", "data.clients=2"),
)
SETTINGS = {
    "banking77": TEXT,
    "banking77, halves": BALANCED,
    "banking77, 50 clients": MANY,
    "goemotions": COMMENTS,
    "dolly": CHATS,
    "fashion": PICTURES,
    "twemoji": EMOJI,
    "coco": PHOTOGRAPHS,
}

METHODS = ("local", "fedit", "ffa", "fedsa", "loraxs", "celora", "folklora")
"""Everything from all factors to none; the last three differ in the frame in which a core travels."""
LEAKING = ("fedit", "ffa", "fedsa", "celora", "folklora")
OTHERS = (
    "rolora",
    "flora",
    "fedex",
    "federa",
    "fedsb",
    "ravan",
    "fedawa",
    "lorafair",
    "hetlora",
    "hafl",
    "haflq",
    "fedlpp",
    "ditto",
    "apfl",
    "fedamole",
)
"""What else sends trained tensors; LoRA-XS is among `METHODS`. At one rank zero and replication padding are FedIT."""
PRIVATE = ("fedit", "ffa", "loraxs", "celora:similarity=model", "folklora:head=private:head_start=zero")
"""Methods under differential privacy: nothing may leave outside the mechanism, so no class statistics."""
CORES = ("celora", "folklora")
RANKS = (8, 16, 32, 64)
HEADS = 4
"""RAVAN's default: at half the rank each they are as many numbers as one core."""
BATCHES = (1, 2, 4)
STEPS = (1, 2, 4, 8)
EPSILONS = (8, 3, 1)
IN_A_GRADIENT = (1, 4, 16, 64)
"""Examples that Fed-SB's one-off gradient is of; its default is the last."""
SHADOWS = 16
VIEWS: tuple[dict[str, Any], ...] = ({"view": "gradient", "knowledge": {"bases": True}}, {"view": "sent"})
"""The worst case, an exact gradient with the client's private tensors in hand; and what really happens: the bytes."""


@dataclass(frozen=True)
class Cell(ABC):
    """One measurement: ``part`` is the table it belongs to."""

    part: str
    setting: str
    method: str
    seed: int

    @property
    @abstractmethod
    def recipe(self) -> Recipe: ...

    @property
    def base(self) -> Recipe:
        file, changes = SETTINGS[self.setting]
        return Recipe.read(RECIPES / file, changes)

    @property
    def label(self) -> str:
        return f"{self.part}; {self.setting}; {self.name}; seed {self.seed}"

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the folder with its result."""

    @property
    def place(self) -> str:
        """The folder of its result, under that of the runs: tells the setting, the plan and the seed apart."""
        return f"{self.part.replace(' ', '-')}/{self.name}"

    @cached_property
    def made_of(self) -> str:
        """In short the recipe it rests on, without what is as by default: a key that is new since says nothing of it.
        Code is not in it: after mending an attack measure its cells `--again`."""
        document = self.recipe.model_dump(mode="json", exclude_defaults=True)
        document |= {name: placeless(document[name]) for name in ("data", "model") if name in document}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]

    def told(self) -> dict[str, Any]:
        return {"part": self.part, "setting": self.setting, "variant": self.method, "seed": self.seed}


@dataclass(frozen=True)
class Attacked(Cell):
    """One attack; victims and their batches follow from the seed, the same for every method."""

    plan: Plan
    gallery: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.base.model_copy(update={"seed": self.seed})

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        told = json.dumps([self.setting, SETTINGS[self.setting], asdict(self.plan), self.seed], sort_keys=True)
        readable = re.sub(r"[^\w.=-]+", "-", f"{self.setting}-{self.plan.attack}-{self.method}")
        return f"{readable}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        plan = self.plan
        granted = ", its own tensors granted" if plan.knowledge.bases else ""
        how = f"{plan.knowledge.view}{granted}, batch {plan.batch}, {plan.steps} steps, warmup {plan.warmup}"
        return f"{self.part}; {self.setting}; {plan.attack} on {self.method}; {how}; seed {self.seed}"

    def told(self) -> dict[str, Any]:
        plan = self.plan
        return {
            **super().told(),
            "attack": plan.attack,
            "view": plan.knowledge.view,
            "bases": plan.knowledge.bases,
            "batch": plan.batch,
            "steps": plan.steps,
            "warmup": plan.warmup,
            "budget": plan.budget,
            "victims_attacked": plan.victims,
        }


@dataclass(frozen=True)
class Defended(Cell):
    """One run of the setting's recipe, with a defence among the variant's settings or with none."""

    @property
    def recipe(self) -> Recipe:
        return variant(self.base, self.method, self.seed)

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        told = json.dumps([self.setting, SETTINGS[self.setting]])
        return f"{self.setting}-{hashlib.sha256(told.encode()).hexdigest()[:8]}-{run_name(self.method, self.seed)}"


def attacked(
    part: str, setting: str, attack: str, methods: Sequence[str], seed: int, *, gallery: bool = False, **plan: Any
) -> Iterator[Attacked]:
    knowledge = Knowledge(view=plan.pop("view", "sent"), **plan.pop("knowledge", {}))
    for method in methods:
        yield Attacked(
            part,
            setting,
            method,
            seed,
            Plan(attack, method, knowledge, seed=seed, **plan),
            gallery and seed == SEEDS[0],
        )


def ranked(methods: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """At ranks of their own, at one scale alpha / r."""
    return [f"{method}:adapter.rank={rank}:adapter.alpha={2 * rank}" for method in methods for rank in ranks]


def _heads() -> list[str]:
    """RAVAN with as many numbers a layer as the cores of `RANKS`, at their scale."""
    every = ((rank * HEADS, rank) for rank in (size // round(HEADS**0.5) for size in RANKS))
    return [f"ravan:heads={HEADS}:adapter.rank={rank}:adapter.alpha={2 * whole}" for whole, rank in every]


def private(methods: Sequence[str], unit: str, epsilons: Sequence[float]) -> list[str]:
    return [f"{method}:privacy.unit={unit}:privacy.epsilon={epsilon}" for method in methods for epsilon in epsilons]


def cells() -> Iterator[Cell]:
    """All of them, the most telling first; a seed of everything before the next."""
    for seed in SEEDS:
        for batch in BATCHES:
            for view in VIEWS:
                yield from attacked("span", "banking77", "span", LEAKING, seed, batch=batch, gallery=batch == 1, **view)
            yield from attacked(
                "span by rank", "banking77", "span", ranked(CORES, RANKS), seed, batch=batch, **VIEWS[0]
            )
        if seed == SEEDS[0]:  # what follows here says that there are no surprises, and is measured once
            for batch in BATCHES:
                yield from attacked("cores side by side", "banking77", "span", _heads(), seed, batch=batch, **VIEWS[0])
            for view in VIEWS:
                yield from attacked("every method", "banking77", "span", ("loraxs", *OTHERS), seed, **view)
            yield from (Defended("every method reaches", "banking77", method, seed) for method in OTHERS)
            yield from attacked("canary", "banking77", "span", LEAKING, seed, canary=True, **VIEWS[1])
        mixtures = (*CORES, *(f"folklora:dp_epsilon={epsilon}.0" for epsilon in EPSILONS))
        yield from attacked("once", "banking77", "mixture", mixtures, seed, gallery=True)
        frames = [f"fedsb:gradient_examples={count}" for count in IN_A_GRADIENT]
        frames += [f"{frames[-1]}:message.dtype={dtype}" for dtype in ("bfloat16", "int8")]
        yield from attacked("first gradient", "banking77", "first-gradient", frames, seed, warmup=0, gallery=True)
        yield from (Defended("utility", "banking77", method, seed) for method in METHODS)
        yield from attacked("membership", "banking77, halves", "membership", LEAKING, seed, budget=SHADOWS)
        plain_and_private = (*PRIVATE, *private(PRIVATE, "example", EPSILONS))
        yield from (Defended("epsilon", "banking77", method, seed) for method in plain_and_private)
        for view in VIEWS:
            yield from attacked("texts", "banking77", "lamp", LEAKING, seed, budget=150, gallery=True, **view)
        for view in VIEWS:
            yield from attacked(
                "pictures", "fashion", "inverting", LEAKING[:-1], seed, budget=400, victims=2, gallery=True, **view
            )
        for steps in STEPS:
            yield from attacked("local steps", "banking77", "span", (*LEAKING, "flora"), seed, steps=steps)
        yield from attacked("labels", "banking77", "labels", LEAKING, seed, budget=2 * SHADOWS)
        yield from attacked("attacked under epsilon", "banking77", "span", private(PRIVATE, "example", EPSILONS), seed)
        attack_of = dict.fromkeys(("goemotions", "dolly"), "span") | dict.fromkeys(("twemoji", "coco"), "inverting")
        for setting, attack in attack_of.items():
            kept: dict[str, Any] = {"budget": 400} if attack == "inverting" else {}
            methods = ("fedit", "celora")
            yield from attacked("victims", setting, attack, methods, seed, victims=2, gallery=True, **VIEWS[0], **kept)
        yield from attacked(
            "membership under epsilon", "banking77, halves", "membership",
            private((PRIVATE[0], PRIVATE[-1]), "example", EPSILONS[:1]), seed, budget=SHADOWS,
        )  # fmt: skip
        hidden = private(PRIVATE, "client", EPSILONS[:1])
        # Where the server must read every upload by itself, each client adds all of the noise.
        hidden = [f"{m}:privacy.placement=client" if m.startswith("celora") else m for m in hidden]
        plain_and_private = (*PRIVATE, *hidden)
        yield from (Defended("epsilon of clients", "banking77, 50 clients", m, seed) for m in plain_and_private)
        yield from (Defended("utility", "fashion", method, seed) for method in METHODS[:-1])
