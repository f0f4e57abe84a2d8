"""The same run on whatever computes: side by side or one by one, in one precision or the other, here or on a GPU.

On a machine without a GPU its half is skipped; nothing else is different there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folklora.errors import BackboneError
from folklora.federation.run import client_model, run
from folklora.recipe import Recipe

HERE = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")),
]


@pytest.fixture(params=["text", "chat", "picture", "prompts"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recipe(
    kind: str,
    tiny_recipe: Callable[..., Recipe],
    tiny_speaker: Path,
    tiny_chats: Path,
    seeing_model: Callable[[str], Path],
    tmp_path: Path,
) -> Callable[..., Recipe]:
    """``recipe("model.device=cuda", ...)`` -> two rounds of this kind of task, unequal clients and ranks."""
    common = ["method.name=celora", "train.optimizer=sgd", "train.lr=0.05", "train.rounds=2", "model.dtype=float32"]

    def make(*overrides: str) -> Recipe:
        if kind == "text":
            return tiny_recipe("adapter.rank=[2, 4, 3, 4]", *common, *overrides)
        if kind == "chat":
            document: dict[str, Any] = {
                "model": {"name": str(tiny_speaker), "task": "causal-lm"},
                "data": {"source": str(tiny_chats), "partition": "natural", "by": "topic"},
            }
        else:
            rng = np.random.default_rng(0)
            labels = rng.integers(3, size=90)
            pixels = np.clip(rng.normal(60 + 60 * labels[:, None, None, None], 30, (90, 12, 12, 3)), 0, 255)
            np.savez(
                tmp_path / "pictures.npz", image=pixels.astype(np.uint8), label=np.array([f"w{i}" for i in labels])
            )
            model = {"name": str(seeing_model("vit"))}
            if kind == "prompts":
                model = {"name": str(seeing_model("clip")), "task": "image-text", "template": "{}"}
            data = {"source": str(tmp_path / "pictures.npz"), "image": "image", "clients": 3, "alpha": 1.0}
            document = {"model": model, "data": data}
        document |= {"adapter": {"rank": 4}, "train": {"batch_size": 8}}
        return Recipe.parse(document, [*common, *overrides])

    return make


@pytest.mark.parametrize("device", HERE)
def test_side_by_side_or_one_by_one_on_this_device(
    recipe: Callable[..., Recipe], tmp_path: Path, kind: str, device: str
) -> None:
    together = run(recipe(f"model.device={device}", "train.cohort=4"), tmp_path / "together")
    run(recipe(f"model.device={device}", "train.cohort=1"), tmp_path / "alone")
    assert together["environment"]["device"] == device
    for client in together["clients"]:
        same(tmp_path / "together", tmp_path / "alone", client, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_computes_what_the_cpu_does(recipe: Callable[..., Recipe], tmp_path: Path, kind: str) -> None:
    for device in ("cpu", "cuda"):
        run(recipe(f"model.device={device}"), tmp_path / device)
    for client in run(recipe("model.device=cuda"), tmp_path / "again")["clients"]:
        same(tmp_path / "cuda", tmp_path / "cpu", client, 1e-3)
        same(tmp_path / "cuda", tmp_path / "again", client, 1e-5)


@pytest.mark.parametrize("device", HERE)
def test_bfloat16_is_near_float32(recipe: Callable[..., Recipe], tmp_path: Path, kind: str, device: str) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        summary = run(recipe(f"model.device={device}", f"model.dtype={dtype}"), tmp_path / dtype)
        assert summary["environment"]["dtype"] == dtype
        losses[dtype] = summary["row"][f"{summary['row']['metric']}_mean"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(recipe: Callable[..., Recipe], tmp_path: Path, kind: str) -> None:
    with pytest.raises(BackboneError, match='model.device = "cuda": no CUDA device here; allowed: "cpu" or "auto"'):
        run(recipe("model.device=cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def same(one: Path, other: Path, client: str, tolerance: float) -> None:
    found, wanted = (client_model(path, client).tensors for path in (one, other))
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
