"""``contract.json``: what a method is asked for with it is what the run's own method says, in both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from folklora.errors import MethodError
from folklora.federation.contract import CONTRACT, Contract
from folklora.federation.setup import prepare
from folklora.methods import METHODS
from folklora.report.audit import audit


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_contract_expects_what_the_run_s_does(tiny_recipe: Callable[..., Any], name: str) -> None:
    recipe = tiny_recipe(f"method.name={name}", "adapter.norm=true")
    setup = prepare(recipe)
    contract = Contract.of(setup.method.context)
    assert Contract.model_validate_json(contract.encode()) == contract
    asked = contract.method(recipe)
    assert asked.rounds() == setup.method.rounds()
    assert asked.once == setup.method.once
    assert asked.sketch_numbers() == setup.method.sketch_numbers()
    for client in setup.data.splits:
        for round in (1, 2):
            told = {name: tuple(shape) for name, shape in asked.expected(round, {}, client).items()}
            assert told == {name: tuple(s) for name, s in setup.method.expected(round, {}, client).items()}


def test_a_contract_has_no_weights(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=fedit")
    method = Contract.of(prepare(recipe).method.context).method(recipe)
    with pytest.raises(MethodError, match="no weights"):
        method.context.weight(method.context.sites[0].name)


def test_the_audit_of_a_network_run(federated: Callable[..., Any], tiny_recipe: Callable[..., Any]) -> None:
    fed = federated(tiny_recipe("method.name=celora"))
    fed.play()
    assert (fed.path / CONTRACT).is_file()
    document = audit(fed.path)
    assert document["run"]["engine"] == "network"
    assert document["run"]["shapes_known"] is True
    assert document["encryption"]["transport"].startswith("TLS")
    told = {part["client"]: part["once"] + part["up"] for part in document["left"]["clients"]}
    assert told == dict(fed.carrier.up)  # every byte that crossed, and no other
    rules = {finding["rule"] for finding in document["findings"]}
    assert "simulation" not in rules
    assert "habits" in rules
    begun = json.loads((fed.path / CONTRACT).read_text())
    assert list(begun["ranks"]) == fed.members
