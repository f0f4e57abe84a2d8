"""Every rule of what is not protected fires where it should, and is silent where its remedy was taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folklora.federation.contract import Contract, SiteShape
from folklora.recipe import Recipe
from folklora.report.facts import Facts
from folklora.report.findings import RULES, WEIGHTS, findings
from folklora.report.protections import encryption, epsilon, robustness

Write = Callable[..., Facts]

CLIENTS = ("north", "south", "east", "west")


@pytest.fixture
def facts(tmp_path: Path) -> Write:
    """``facts("method.name=fedit", ...)`` -> those of a run directory that was never played, only written."""

    def write(
        *overrides: str,
        participants: tuple[str, ...] = CLIENTS,
        examples: int = 200,
        spent: dict[str, Any] | None = None,
        attack: dict[str, Any] | None = None,
    ) -> Facts:
        path = tmp_path / "run"
        path.mkdir()
        document = {"data": {"clients": len(CLIENTS), "classes": ["a", "b", "c"]}, "train": {"rounds": 3}}
        recipe = Recipe.parse(document, overrides)
        (path / "recipe.toml").write_text(recipe.to_toml())
        sizes = {"train": examples, "validation": 20, "test": 40}
        partition = {"classes": ["a", "b", "c"], "clients": dict.fromkeys(CLIENTS, sizes)}
        (path / "partition.json").write_text(json.dumps(partition))
        contract = Contract(
            sites=[SiteShape(name="query", d_in=32, d_out=32), SiteShape(name="value", d_in=32, d_out=48)],
            head={"head/weight": [3, 32], "head/bias": [3]},
            norms={},
            classes=3,
            width=32,
            ranks=dict.fromkeys(CLIENTS, 8),
        )
        (path / "contract.json").write_bytes(contract.encode())
        up = dict.fromkeys(participants, 1000)
        line = {"round": 1, "participants": participants, "bytes_up": 1000 * len(up), "bytes_up_clients": up}
        (path / "metrics.jsonl").write_text(json.dumps({**line, **({"privacy": spent} if spent else {})}) + "\n")
        if attack is not None:
            (path / "attacks").mkdir()
            record = {"attack": "tag", "title": "TAG", "metrics": {"token_recall": attack}, **attack}
            (path / "attacks" / "tag-fedit-s0.json").write_text(json.dumps(record))
        return Facts.of(path)

    return write


FEDIT = "method.name=fedit"
FOLKLORA = "method.name=folklora"
PLAIN = ("method.name=celora", "method.similarity=uniform")  # cores alone, and nothing once
CLIENT = (FEDIT, "privacy.unit=client", "privacy.noise=1.0")
EXAMPLE = (FEDIT, "privacy.unit=example", "privacy.noise=1.0")
MASKS, CKKS, NETWORK = "secure.kind=masks", "secure.kind=ckks", "engine.kind=flower"
STRONG = {"mean": 0.7, "control": 0.1, "gain": 0.6}
WEAK = {"mean": 0.15, "control": 0.1, "gain": 0.05}
NOTHING_SENT = ("method.name=local",)


def spent(unit: str, epsilon: float) -> dict[str, Any]:
    return {"spent": {"unit": unit, "epsilon": epsilon, "delta": 1e-5}}


Case = tuple[tuple[str, ...], dict[str, Any]]
CASES: dict[str, tuple[Case, Case | None]] = {  # rule -> where it fires, and where it does not (None: it always does)
    "flora-stack": ((("method.name=flora",), {}), ((FEDIT,), {})),
    "attack-recovered": (((FEDIT,), {"attack": STRONG}), ((FEDIT,), {"attack": WEAK})),
    "gradients-sent": ((("method.name=fedsb",), {}), (("method.name=loraxs",), {})),
    "sketch-in-clear": (((FOLKLORA,), {}), ((FOLKLORA, "method.dp_epsilon=1.0"), {})),
    "updates-readable": (((FEDIT,), {}), ((FEDIT, MASKS), {})),
    "no-noise": (((FEDIT,), {}), (EXAMPLE, {})),
    "noise-at-server": ((CLIENT, {}), ((*CLIENT, "privacy.placement=client"), {})),
    "noise-in-shares": (
        ((*CLIENT, "privacy.placement=shares"), {}),
        ((*CLIENT, "privacy.placement=shares", MASKS), {}),
    ),
    "head-travels": (((FEDIT,), {}), ((FEDIT, "method.head=private"), {})),
    "inputs-sent": (((FEDIT,), {}), (("method.name=ffa",), {})),
    "known-frame": (((FOLKLORA,), {}), ((FOLKLORA, "method.basis=private"), {})),
    "few-examples": (((FEDIT,), {"examples": 20}), ((FEDIT,), {})),
    "few-participants": (((FEDIT,), {"participants": CLIENTS[:2]}), ((FEDIT,), {"participants": CLIENTS[:3]})),
    "large-epsilon": ((EXAMPLE, spent("example", 50.0)), (EXAMPLE, spent("example", 2.0))),
    "large-sketch-epsilon": (
        ((FOLKLORA, "method.dp_epsilon=50.0"), {}),
        ((FOLKLORA, "method.dp_epsilon=1.0"), {}),
    ),
    "large-delta": (((*EXAMPLE, "privacy.delta=0.01"), {}), (EXAMPLE, {})),
    "shared-key": (((*PLAIN, CKKS), {}), (PLAIN, {})),
    "sums-readable": (
        ((FEDIT, MASKS), {}),
        ((*CLIENT, MASKS, "privacy.placement=shares"), {}),
    ),
    "liars": (((FEDIT,), {}), ((FEDIT, "robust.rule=median"), {})),
    "not-attacked": (((FEDIT,), {}), ((FEDIT,), {"attack": WEAK})),
    "poisoned": (((FEDIT, "poison.kind=sign", "poison.share=0.25"), {}), ((FEDIT, "poison.kind=sign"), {})),
    "simulation": (((FEDIT,), {}), ((FEDIT, NETWORK), {})),
    "scores-reported": (((FEDIT,), {}), (("method.name=sketch",), {})),
    "sizes-known": ((NOTHING_SENT, {}), None),
    "disks": ((NOTHING_SENT, {}), None),
    "habits": (((FEDIT, NETWORK), {}), ((FEDIT,), {})),
}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.name for rule in RULES}
    assert len(RULES) == len({rule.name for rule in RULES})


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_fires(facts: Write, rule: str) -> None:
    overrides, options = CASES[rule][0]
    (found,) = [finding for finding in findings(facts(*overrides, **options)) if finding.rule == rule]
    assert found.what.endswith(".")
    assert found.remedy.endswith(".")
    assert found.key is None or found.key in found.remedy


@pytest.mark.parametrize("rule", [rule for rule, (_, silent) in CASES.items() if silent])
def test_a_rule_is_silent_where_its_remedy_was_taken(facts: Write, rule: str) -> None:
    silent = CASES[rule][1]
    assert silent is not None
    assert rule not in {finding.rule for finding in findings(facts(*silent[0], **silent[1]))}


@pytest.mark.parametrize("rule", CASES)
def test_a_remedy_names_keys_of_the_recipe(facts: Write, rule: str) -> None:
    overrides, options = CASES[rule][0]
    of = facts(*overrides, **options)
    (found,) = [finding for finding in findings(of) if finding.rule == rule]
    if found.key is not None:
        table, _, key = found.key.partition(".")
        section = getattr(of.recipe, table)
        known = type(of.method.options).model_fields if table == "method" else type(section).model_fields
        assert key in known or found.key == "method.name"


def test_the_weightiest_come_first(facts: Write) -> None:
    order = list(WEIGHTS)
    weights = [order.index(finding.weight) for finding in findings(facts(FEDIT))]
    assert weights == sorted(weights)
    assert len(set(weights)) == 3


# -- what was promised -------------------------------------------------------------------------------------------------


def test_no_guarantee_is_called_none(facts: Write) -> None:
    said = epsilon(facts(FEDIT))
    assert said["says"].startswith("No differential privacy")
    assert said["covers"] == said["does_not_cover"] == []


def test_the_epsilon_of_clients_and_whom_it_holds_against(facts: Write) -> None:
    said = epsilon(facts(*CLIENT, **spent("client", 1.0)))
    assert "epsilon = 1 at delta = 1e-05 after round 1" in said["says"]
    assert "whether one client" in said["says"]
    assert "a factor of 2.7" in said["says"]  # e
    assert "not against the server" in said["covers"][0]
    assert any("seed" in line for line in said["does_not_cover"])


def test_an_epsilon_without_a_round_is_not_spent(facts: Write) -> None:
    assert "nothing is spent yet" in epsilon(facts(*EXAMPLE))["says"]


def test_an_infinite_epsilon_is_none(facts: Write) -> None:
    said = epsilon(facts(*EXAMPLE, spent={"unit": "example", "epsilon": None, "delta": 1e-5}))
    assert "no finite epsilon holds" in said["says"]


def test_a_private_sketch_is_told_apart_from_training(facts: Write) -> None:
    said = epsilon(facts(FOLKLORA, "method.dp_epsilon=2.0", "method.dp_delta=1e-6"))
    assert said["training"] is None
    assert (said["statistics"]["epsilon"], said["statistics"]["delta"]) == (2.0, 1e-6)
    assert "What a client sends in its rounds: it has no noise." in said["does_not_cover"]


@pytest.mark.parametrize(
    ("overrides", "once"),
    [
        (("method.name=celora",), {"mixtures"}),
        (("method.name=celora", "method.components=0"), {"statistics"}),
        (("method.name=celora", "method.head=sketched"), {"statistics", "mixtures"}),
        (("method.name=celora", "method.components=0", "method.dp_epsilon=1.0"), {"statistics"}),
        (("method.name=fedsb", "method.head_start=sketched"), {"statistics", "gradients"}),
        ((FEDIT,), set()),
    ],
)
def test_what_is_sent_once(facts: Write, overrides: tuple[str, ...], once: set[str]) -> None:
    of = facts(*overrides)
    assert of.once == once
    assert of.sketched_in_clear == (
        bool(once & {"statistics", "mixtures"}) and not overrides[-1].startswith("method.dp")
    )


def test_encryption_and_who_must_trust_whom(facts: Write) -> None:
    said = encryption(facts(FEDIT, MASKS, NETWORK, "secure.threshold=0.7"))
    assert said["kind"] == "masks"
    assert said["transport"].startswith("TLS")
    assert "fewer than 3 of a round's 4 clients" in said["trust"][0]


def test_a_simulation_has_no_transport(facts: Write) -> None:
    said = encryption(facts(*PLAIN, CKKS))
    assert said["transport"].startswith("None")
    assert "share one key" in " ".join(said["trust"])


def test_rules_against_liars_and_simulated_lies(facts: Write) -> None:
    said = robustness(facts(FEDIT, "robust.rule=trimmed", "poison.kind=labels", "poison.share=0.25"))
    assert "at most 20%" in said["says"]
    assert said["poison"] == "Simulated: 25% of the clients trained on wrong labels."
