"""Another centre than the mean, in whole rounds: what it is given, what it withstands, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.errors import FolkLoraError, RunError
from folklora.federation.codec import encode
from folklora.federation.compression import Compression
from folklora.federation.intake import intake_of
from folklora.federation.ledger import Ledger
from folklora.federation.local import LocalEngine
from folklora.federation.run import run
from folklora.federation.setup import Setup, prepare
from folklora.methods.contract import Message
from folklora.privacy import robust

Play = Callable[..., Any]
SIX = ("data.limit=120", "data.clients=6", "data.partition=iid")
RULES = ("median", "trimmed", "krum", "multikrum", "geometric")


def arrived(setup: Setup, messages: dict[str, Message]) -> dict[str, Any]:
    """Uploads as the server reads them in round 2, after it sent everybody its state."""
    intake = intake_of(setup, LocalEngine(setup))
    compression = Compression(setup.recipe.message, setup.method)
    return {c: intake.read(2, {}, c, encode(m, compression.up), ()) for c, m in messages.items()}


def uploads(setup: Setup, lie: float = 1e4) -> tuple[dict[str, torch.Tensor], dict[str, Message]]:
    """A state, and uploads that move a little from it in one direction; one does not."""
    method, generator = setup.method, torch.Generator().manual_seed(3)
    start = {n: t for n, t in method.initial("0").items() if n.partition("/")[0] in method.shared(1)}
    state = {f"global/{n}": t + 0.5 for n, t in start.items()}
    messages = {}
    for i, client in enumerate(setup.data.splits):
        moved = {
            n: t + 0.5 + (lie if i == 1 else 0.1 + 0.01 * torch.randn(t.shape, generator=generator))
            for n, t in start.items()
        }
        messages[client] = Message(moved, {"examples": 1e9 if i == 1 else 10.0})
    return state, messages


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_the_centre_of_updates_and_no_weight_counts(tiny_recipe: Any, rule: str) -> None:
    setup = prepare(tiny_recipe("method.name=fedit", *SIX, f"robust.rule={rule}", "robust.byzantine=0.17"))
    state, messages = uploads(setup)
    intake = intake_of(setup, LocalEngine(setup))
    after = intake.server(2, state, arrived(setup, messages), Ledger())
    names = sorted(next(iter(messages.values())).tensors)
    rows = torch.stack(
        [
            torch.cat([(m.tensors[n].double() - state[f"global/{n}"].double()).flatten() for n in names])
            for m in messages.values()
        ]
    )
    expected = robust.centre(rule, rows, 1)
    found = torch.cat([(after[f"global/{n}"].double() - state[f"global/{n}"].double()).flatten() for n in names])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - 0.1).abs().mean() < 0.02


@pytest.mark.parametrize(("bound", "size"), [("", None), ("robust.norm=0.25", 0.25)])
def test_clipping_shortens_updates_and_leaves_the_rest_to_the_method(
    tiny_recipe: Any, bound: str, size: float | None
) -> None:
    given = [bound] if bound else []
    setup = prepare(tiny_recipe("method.name=fedit", *SIX, "robust.rule=clip", *given))
    state, messages = uploads(setup)
    intake = intake_of(setup, LocalEngine(setup))
    after = intake.server(2, state, arrived(setup, messages), Ledger())

    def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
        return np.concatenate(
            [(t.double() - state[f"global/{n}"].double()).numpy().ravel() for n, t in sorted(tensors.items())]
        )

    rows = [flat(m.tensors) for m in messages.values()]
    norms = [np.linalg.norm(row) for row in rows]
    bound_found = size or sorted(norms)[2]  # of six, the lower of the two in the middle
    mean = np.mean([row * min(1.0, bound_found / n) for row, n in zip(rows, norms, strict=True)], axis=0)
    found = flat({n.removeprefix("global/"): t for n, t in after.items()})
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-6)


def test_clipping_serves_methods_that_do_not_average(tiny_recipe: Any, tmp_path: Path) -> None:
    for name in ("celora", "flora", "hafl"):
        summary = run(tiny_recipe(f"method.name={name}", "data.limit=80", "robust.rule=clip"), tmp_path / name)
        assert summary["row"]["rounds"] == 2


def test_a_round_too_small_for_the_rule_is_not_committed(tiny_recipe: Any, play: Play, tmp_path: Path) -> None:
    class Losing(LocalEngine):
        def train(self, round: int, clients: Any) -> Any:
            for upload in super().train(round, clients):
                yield replace(upload, failure="gone") if round == 2 and upload.client in "01" else upload

    recipe = tiny_recipe("method.name=fedit", *SIX, "robust.rule=krum", "robust.byzantine=0.17")
    with pytest.raises(RunError, match=r'round 2: 4 of 6 .* 5 needed \(robust.rule = "krum"\); .* round 1 left it'):
        play(recipe, Losing)


REFUSED = {
    "krum": (["robust.rule=krum", "robust.byzantine=0.4"], "needs 7 clients to withstand 2, and a round has 6"),
    "few": (
        ["robust.rule=multikrum", "robust.byzantine=0.34", "train.participation=0.5"],
        "needs 5 clients to withstand 1, and a round has 3",
    ),
    "method": (["robust.rule=median", "method.name=celora"], 'allowed: "clip", or a method that averages'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_that_cannot_work_is_refused_before_work(tiny_recipe: Any, tmp_path: Path, name: str) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(FolkLoraError) as refused:
        run(tiny_recipe("method.name=fedit", *SIX, *settings), tmp_path / "run")
    assert reason in str(refused.value)
    assert not (tmp_path / "run").exists()
