"""What is not protected in a run, as rules: a condition on its facts, a sentence, what mends it and which key does.

A rule says what the recipe and the run's own records show, not what an attacker will manage: that is a matter of
measurement (`folklora attack`). `RULES` is the one place with all; `findings` are those that apply, the weightiest
first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from folklora.report.facts import Facts
from folklora.report.vocabulary import WORDS

Weight = Literal["high", "medium", "low"]
WEIGHTS: dict[Weight, str] = {
    "high": "Somebody in the federation can read more of single examples or clients than the method needs.",
    "medium": "Weakens what protects the clients, or leaves a choice open that can be made.",
    "low": "Known, and small or without a remedy here.",
}

FEW = 3
"""Clients of a round from which on nobody can take one other's part out of a mean by subtracting its own."""
FEW_EXAMPLES = 32
LARGE_EPSILON = 10.0
RECOVERED = 0.1
"""Gain of an attack over its control from which on it is a finding: a tenth."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not protected. ``key`` is the recipe's key that mends it, None where none does."""

    rule: str
    weight: Weight
    what: str
    remedy: str
    key: str | None


@dataclass(frozen=True)
class Rule:
    """See the module's text; ``mend`` gives the remedy and its key."""

    name: str
    weight: Weight
    applies: Callable[[Facts], bool]
    says: Callable[[Facts], str]
    mend: Callable[[Facts], tuple[str, str | None]]


def findings(facts: Facts) -> list[Finding]:
    """The rules that apply to a run, the weightiest first."""
    order = list(WEIGHTS)
    found = [rule for rule in RULES if rule.applies(facts)]
    found.sort(key=lambda rule: order.index(rule.weight))
    return [Finding(rule.name, rule.weight, rule.says(facts), *rule.mend(facts)) for rule in found]


def _kinds(facts: Facts) -> str:
    return ", ".join(WORDS.get(name, name) for name in facts.kinds)


def _secure(facts: Facts) -> tuple[str, str | None]:
    if facts.method.averages:
        return 'Secure aggregation: secure.kind = "masks", and the server reads sums alone.', "secure.kind"
    if facts.method.must_read is None:
        return 'Encrypted mixing: secure.kind = "ckks", and the server mixes what it cannot read.', "secure.kind"
    reads, allowed = facts.method.must_read
    return (
        f'Encrypted mixing: secure.kind = "ckks". Now {reads} makes the server read; allowed: {allowed}.',
        "secure.kind",
    )


def _noise(facts: Facts) -> tuple[str, str | None]:
    unit = "client" if facts.recipe.form == "caption" else "example"
    beside = facts.method.beside_training if unit == "example" else None
    more = f", which asks for {beside[1]}" if beside else ""
    return (
        f'Differential privacy: privacy.unit = "{unit}" with privacy.epsilon = 8.0 (for example){more}.',
        "privacy.unit",
    )


def _rule(facts: Facts) -> tuple[str, str | None]:
    if facts.recipe.secure.kind != "none":
        return "None while uploads are masked or encrypted: a rule has to read them.", None
    if facts.method.condenses:
        return "None where clients send data that they made: there is no update to judge.", None
    if facts.method.averages:
        return 'Another centre than the mean: robust.rule = "median" or "trimmed".', "robust.rule"
    return 'Bounds on what a client can move: robust.rule = "clip".', "robust.rule"


def _release(facts: Facts) -> tuple[str, str | None]:
    if "dp_epsilon" not in type(facts.method.options).model_fields:
        return 'Start the head without statistics: method.head_start = "zero".', "method.head_start"
    more = " with method.components = 0" if getattr(facts.method.options, "components", 0) else ""
    return f"A private release: method.dp_epsilon = 1.0 (for example){more}.", "method.dp_epsilon"


def _small(facts: Facts) -> str:
    client, examples = facts.smallest or ("?", 0)
    steps = facts.fewest_steps
    return (
        f"What a client sends is the sum of few examples' marks: client {client!r} trains on {examples}, in "
        f"{steps} step{'s' * (steps != 1)} a round. The fewer, the closer a message is to one example's gradient."
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "flora-stack",
        "high",
        lambda f: f.method.name == "flora" and len(f.run.clients) > 1,
        lambda f: "The reply is the stack of all members' factors: every member sees the others', without names.",
        lambda f: ('Another method: method.name = "fedex" sends a mean and a residual.', "method.name"),
    ),
    Rule(
        "attack-recovered",
        "high",
        lambda f: bool(f.attacks) and f.attacks[0].view == "sent" and f.attacks[0].gained >= RECOVERED,
        lambda f: f"{f.attacks[0].name} {f.attacks[0].came_to}.",
        lambda f: (
            ('Noise while training: privacy.unit = "example". Then attack again.', "privacy.unit")
            if f.recipe.privacy.unit == "none"
            else ("A smaller privacy.epsilon. Then attack again.", "privacy.epsilon")
        ),
    ),
    Rule(
        "gradients-sent",
        "high",
        lambda f: "gradients" in f.once,
        lambda f: (
            "Once, each client sends the dense gradient of every adapted layer on at most "
            f"{getattr(f.method.options, 'gradient_examples', 0)} of its examples, readable by the server."
        ),
        lambda f: ('A frame of the seed: method.name = "loraxs" needs no gradient.', "method.name"),
    ),
    Rule(
        "sketch-in-clear",
        "high",
        lambda f: f.sketched_in_clear,
        lambda f: (
            "Which labels each client has, how many examples of each, and where their features lie are sent once, "
            "readable by the server."
        ),
        _release,
    ),
    Rule(
        "updates-readable",
        "high",
        lambda f: f.readable,
        lambda f: f"The server can read and keep what each single client sends in its rounds: {_kinds(f)}.",
        _secure,
    ),
    Rule(
        "no-noise",
        "high",
        lambda f: f.travels and f.recipe.privacy.unit == "none",
        lambda f: (
            "No noise is added to training: nothing limits how much of one example, or one client, can be in what "
            "is sent, in the replies and in the finished models."
        ),
        _noise,
    ),
    Rule(
        "noise-at-server",
        "high",
        lambda f: (
            f.recipe.privacy.unit == "client" and f.recipe.privacy.placement == "server" and f.travels and f.readable
        ),
        lambda f: (
            "The server adds the noise, after it has read what each client sent: the stated epsilon holds against "
            "everybody but the server."
        ),
        lambda f: (
            'privacy.placement = "client"; or privacy.placement = "shares" with secure.kind = "masks".',
            "privacy.placement",
        ),
    ),
    Rule(
        "noise-in-shares",
        "medium",
        lambda f: f.recipe.privacy.unit == "client" and f.recipe.privacy.placement == "shares" and f.readable,
        lambda f: (
            "Each client adds a share of the noise, and the server reads single messages: the stated epsilon holds "
            "for their sum, not for one message."
        ),
        lambda f: ('secure.kind = "masks", so that the server sees the sum alone.', "secure.kind"),
    ),
    Rule(
        "head-travels",
        "medium",
        lambda f: "head" in f.kinds and f.readable,
        lambda f: "The task head travels: from its change the server can tell which labels a client's examples have.",
        lambda f: ('Keep it at home: method.head = "private".', "method.head"),
    ),
    Rule(
        "inputs-sent",
        "medium",
        lambda f: "A" in f.kinds and f.readable,
        lambda f: (
            "Down factors A travel. Their change is made of the very features of the client's tokens: of a batch with "
            "few tokens they can be read off."
        ),
        lambda f: (
            'A method that keeps A at home: method.name = "celora" or "folklora" (cores), "ffa" (B).',
            "method.name",
        ),
    ),
    Rule(
        "known-frame",
        "medium",
        lambda f: f.readable and f.frame_known,
        lambda f: (
            "The factors around what travels are the same for all and known to the server, which can therefore work "
            "back from a message to the layer's inputs as far as the rank allows."
        ),
        lambda f: (
            ('Factors of each client\'s own: method.basis = "private".', "method.basis")
            if "basis" in type(f.method.options).model_fields
            else ('A method with private factors, such as method.name = "celora".', "method.name")
        ),
    ),
    Rule(
        "few-examples",
        "medium",
        lambda f: f.readable and f.smallest is not None and (f.smallest[1] < FEW_EXAMPLES or f.fewest_steps == 1),
        _small,
        lambda f: ("Ask for more of each client: data.min_examples; or more local steps.", "data.min_examples"),
    ),
    Rule(
        "few-participants",
        "medium",
        lambda f: f.replies_tell and f.fewest is not None and f.fewest < FEW,
        lambda f: (
            f"A round had {f.fewest} client{'s' * (f.fewest != 1)}: where all get a mean, two participants can each "
            "subtract their own part and have the other's."
        ),
        lambda f: (f"At least three in every round: engine.min_clients = {FEW}.", "engine.min_clients"),
    ),
    Rule(
        "large-epsilon",
        "medium",
        lambda f: f.epsilon is not None and f.epsilon > LARGE_EPSILON,
        lambda f: (
            f"The epsilon spent, {f.epsilon:.3g}, is large: what it promises by itself is little, though the "
            "noise may stop attacks all the same."
        ),
        lambda f: ("A smaller budget: privacy.epsilon, with fewer rounds or more examples.", "privacy.epsilon"),
    ),
    Rule(
        "large-sketch-epsilon",
        "medium",
        lambda f: f.sketch_epsilon is not None and f.sketch_epsilon[0] > LARGE_EPSILON,
        lambda f: (
            f"The one-off statistics are released with epsilon {(f.sketch_epsilon or (0,))[0]:.3g}, which is large."
        ),
        lambda f: ("A smaller one: method.dp_epsilon.", "method.dp_epsilon"),
    ),
    Rule(
        "large-delta",
        "medium",
        lambda f: f.protected_units is not None and f.recipe.privacy.delta * f.protected_units >= 1,
        lambda f: (
            f"delta = {f.recipe.privacy.delta:g} is no smaller than one over the {f.protected_units} "
            f"{f.recipe.privacy.unit}s it speaks of: it allows for giving one of them away whole."
        ),
        lambda f: (f"privacy.delta well below {1 / (f.protected_units or 1):.2g}.", "privacy.delta"),
    ),
    Rule(
        "shared-key",
        "medium",
        lambda f: f.recipe.secure.kind == "ckks" and f.travels,
        lambda f: (
            "All clients share the key that opens what was encrypted: a client that works together with the server "
            "can open what any other client sent."
        ),
        lambda f: ("None here: admit only clients that would not hand their key to the server.", None),
    ),
    Rule(
        "sums-readable",
        "low",
        lambda f: f.recipe.secure.kind == "masks" and f.recipe.privacy.unit == "none" and f.travels,
        lambda f: (
            "The server reads the sum of each round, and knows who was in it; sums of few clients, or of rounds that "
            "differ by one client, still tell of single ones."
        ),
        lambda f: (
            'Noise in the sum: privacy.unit = "client" with privacy.placement = "shares".',
            "privacy.placement",
        ),
    ),
    Rule(
        "liars",
        "medium",
        lambda f: f.travels and f.recipe.robust.rule == "mean" and not f.clipped_by_server,
        lambda f: (
            "A client that lies (a poisoned message) counts like any other"
            + ("." if f.recipe.privacy.unit == "client" else ": by the number of examples that it claims to have.")
        ),
        _rule,
    ),
    Rule(
        "not-attacked",
        "medium",
        lambda f: not f.attacks and (f.travels or bool(f.once)),
        lambda f: "No attack has been run on this run: what its messages give away was not measured.",
        lambda f: ("Run one: folklora attack RUN --attack NAME; folklora attack --list has the names.", None),
    ),
    Rule(
        "poisoned",
        "low",
        lambda f: f.recipe.poison.kind != "none" and f.recipe.poison.share > 0,
        lambda f: (
            f"{f.recipe.poison.share:.0%} of the clients were made to lie on purpose ({f.recipe.poison.kind}): this "
            "run is an experiment, and its model is not to be used."
        ),
        lambda f: ('Without it: poison.kind = "none".', "poison.kind"),
    ),
    Rule(
        "simulation",
        "low",
        lambda f: f.simulated,
        lambda f: (
            "This run was a simulation: one process held all examples, and drew every client's noise from the "
            "recipe's seed. It shows what a federation would send, and protected nobody's data by itself."
        ),
        lambda f: ('With real members: folklora serve and folklora join (engine.kind = "flower").', "engine.kind"),
    ),
    Rule(
        "scores-reported",
        "low",
        lambda f: bool(f.uploads),
        lambda f: (
            ("Mean training losses and validation" if f.recipe.privacy.tells_losses else "Validation")
            + " scores are told exactly, every time they are asked for, outside of any noise and any encryption."
        ),
        lambda f: ("Ask less often: train.evaluate_every.", "train.evaluate_every"),
    ),
    Rule(
        "sizes-known",
        "low",
        lambda f: True,
        lambda f: "The server knows how many examples each client has.",
        lambda f: ("None here.", None),
    ),
    Rule(
        "disks",
        "low",
        lambda f: True,
        lambda f: (
            "Nothing is encrypted on disk: "
            + (
                "this folder holds every client's private tensors."
                if f.simulated
                else "a member's folder holds its own, and the server's holds all that it was sent."
            )
        ),
        lambda f: ("Disk encryption by the operator of each machine.", None),
    ),
    Rule(
        "habits",
        "low",
        lambda f: not f.simulated,
        lambda f: "Who is online when, from which address and with which version, is seen by the server.",
        lambda f: ("None here.", None),
    ),
)
