"""Gradient checkpointing changes no number: what is computed again sees the same adapters and dropout masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from folklora.backbones.backbone import Backbone
from folklora.backbones.classification import Classification
from folklora.backbones.decoder import PACKABLE
from folklora.errors import BackboneError
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job

LABELS = [[0, 1, 0, 1], [1], [0, 0]]


def pair(build: Callable[[], Any]) -> tuple[Any, Any]:
    """A task twice, the second one's backbone checkpointed."""
    plain, thrifty = build(), build()
    thrifty.backbone.checkpoint()
    return plain, thrifty


def layer_calls(task: Any) -> Counter[str]:
    """How often attention of each layer ran so far, counted from now on."""
    calls: Counter[str] = Counter()
    for dtype, model in task.backbone._models.items():
        for name, module in model.named_modules():
            if name.endswith(("self_attn", "attention", ".attn")):
                module.register_forward_pre_hook(lambda *_, key=f"{dtype} {name}": calls.update([key]))
    return calls


@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_losses_and_gradients_are_the_same(lab: SimpleNamespace, company: Callable[..., Any], family: str) -> None:
    tasks = pair(lambda: lab.task_of(lab.stock(family)))
    calls = [layer_calls(task) for task in tasks]
    (losses, grads), (again, recomputed) = (company(task).losses(lab.groups, LABELS, packed="always") for task in tasks)
    assert set(calls[0].values()) == {1}
    assert set(calls[1].values()) == {2}  # forth, and anew on the way back
    torch.testing.assert_close(again, losses, rtol=1e-6, atol=0)
    assert grads.keys() == recomputed.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-5, atol=1e-7)


def trained(task: Any, company: Callable[..., Any], groups: Any, **train: Any) -> dict[str, Any]:
    group = company(task, dropout=0.3)
    jobs = [
        Job(f"client-{k}", 1, k + 1, own, frozenset(own), groups[k], np.array(LABELS[k]))
        for k, own in enumerate(group.owned)
    ]
    settings = TrainSection(**{"batch_size": 2, "local_epochs": 2, "cohort": 3, **train})
    return {done.client: done for done in CohortTrainer(task, group.adapter, settings, seed=3).fit(jobs)}


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for client, fitted in one.items():
        assert other[client].loss == pytest.approx(fitted.loss, rel=1e-6)
        for name, tensor in fitted.tensors.items():
            torch.testing.assert_close(other[client].tensors[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", ["always", "never"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_with_dropout_is_the_same(
    lab: SimpleNamespace, company: Callable[..., Any], family: str, packed: str
) -> None:
    plain, thrifty = pair(lambda: lab.task_of(lab.stock(family)))
    once = trained(plain, company, lab.groups, packed=packed)
    assert_same_training(once, trained(thrifty, company, lab.groups, packed=packed))
    # With other masks it would not be: dropout is large here.
    other = trained(plain, company, lab.groups, packed=packed, local_epochs=3)
    assert other["client-0"].loss != pytest.approx(once["client-0"].loss, rel=1e-3)


def test_in_bfloat16_the_copy_computes_with_its_own_layers(lab: SimpleNamespace, company: Callable[..., Any]) -> None:
    plain, thrifty = pair(lambda: lab.task_of(lab.stock("llama"), dtype=torch.bfloat16))
    _, grads = company(plain).losses(lab.groups, LABELS)
    company(thrifty).losses(lab.groups, LABELS)  # the copy is made here
    calls = layer_calls(thrifty)
    _, again = company(thrifty).losses(lab.groups, LABELS)
    assert {key.split()[0] for key, count in calls.items() if count} == {"torch.bfloat16"}
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "gpt2"])
def test_tasks_of_texts_with_labels(
    tiny_model: Callable[[str], Path], lab: SimpleNamespace, company: Callable[..., Any], architecture: str
) -> None:
    folder = str(tiny_model(architecture))
    groups = [[example.tokens for example in group] for group in lab.groups]
    plain, thrifty = pair(lambda: Classification(Backbone.load(folder, dtype="float32"), 2))
    calls = layer_calls(thrifty)
    assert_same_training(trained(plain, company, groups), trained(thrifty, company, groups))
    assert calls


def test_without_gradients_nothing_is_computed_twice_and_caches_work(lab: SimpleNamespace) -> None:
    plain, thrifty = pair(lambda: lab.task_of(lab.stock("llama")))
    tokens = torch.tensor([lab.groups[0][2].tokens])
    calls = layer_calls(thrifty)

    def stepwise(model: Any) -> torch.Tensor:
        first = model(tokens[:, :12], use_cache=True)
        logits: torch.Tensor = model(tokens[:, 12:], past_key_values=first.past_key_values, use_cache=True).logits
        return logits

    with torch.no_grad():
        ours = thrifty.backbone.run(stepwise, None)
        assert torch.equal(ours, plain.backbone.run(stepwise, None))
    assert set(calls.values()) == {2}
    torch.testing.assert_close(ours, lab.stock("llama")(tokens).logits[:, 12:], rtol=1e-4, atol=1e-5)


def test_nothing_stays_plugged_in(lab: SimpleNamespace, company: Callable[..., Any]) -> None:
    task = lab.task_of(lab.stock("llama"))
    task.backbone.checkpoint()
    company(task).losses(lab.groups, LABELS)
    assert task.backbone._socket.bank is None


def test_a_model_that_cannot_is_refused() -> None:
    from transformers import AlbertConfig, AutoModel

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "embedding_size": 8}
    config = AlbertConfig(vocab_size=20, **sizes, num_hidden_groups=2)  # of one group, the block can be
    model = AutoModel.from_config(config, attn_implementation="eager")
    backbone = Backbone(model, SimpleNamespace(pad_token_id=0), dtype=torch.float32)
    with pytest.raises(BackboneError, match="model.checkpointing = true: albert"):
        backbone.checkpoint()
