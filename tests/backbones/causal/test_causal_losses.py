"""Losses, gradients and answers of language models in every layout, against Hugging Face's own on each text alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.backbones import decoder
from folklora.backbones.causal import CausalLM, Dialogue
from folklora.backbones.decoder import PACKABLE
from folklora.backbones.metric import LOSS
from folklora.errors import BackboneError
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job

LABELS = [[0, 0, 0, 0], [0], [0, 0]]
LAYOUTS = ("always", "never")


def nats_alone(model: Any, example: Dialogue) -> Tensor:
    """Mean nats of a response token, by the stock model's own loss: no mask, no padding, no neighbours."""
    labels = torch.tensor([example.tokens])
    labels[0, : example.prompt] = -100
    loss: Tensor = model(input_ids=torch.tensor([example.tokens]), labels=labels).loss
    return loss


def frozen_answers(task: CausalLM, groups: Any, packed: str) -> Tensor:
    with torch.no_grad():
        return task.answers(task.lay_out(groups, packed), {}, lambda batch: None)


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "sdpa") for family in sorted(PACKABLE)), *((family, "eager") for family in ("gpt2", "llama", "qwen3"))],
)
def test_every_layout_gives_the_loss_of_each_text_alone(lab: SimpleNamespace, family: str, attention: str) -> None:
    model = lab.stock(family)
    task = lab.task_of(model, attention=attention)
    examples = [example for group in lab.groups for example in group]
    with torch.no_grad():
        wanted = torch.stack([nats_alone(model, example) for example in examples])
    assert wanted.std() > 0.1  # the texts are told apart
    for packed in LAYOUTS:
        answers = frozen_answers(task, lab.groups, packed)
        assert answers[:, 1].tolist() == [len(example) - example.prompt for example in examples]
        torch.testing.assert_close(answers[:, 0] / answers[:, 1], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", LAYOUTS)
def test_long_rope_leaves_a_short_text_alone(lab: SimpleNamespace, packed: str) -> None:
    """transformers turns a whole batch by its longest text: nothing is longer than what has the short angles."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    model = lab.stock.__wrapped__("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    (short,) = lab.dialogues([(5, 6)])
    with torch.no_grad():
        wanted = nats_alone(model, short)
        before = frozen_answers(lab.task_of(model), [[Dialogue([5] * 40, 3)], [short]], packed)[1]
        assert abs(before[0] / before[1] - wanted) > 1e-3  # as it would be
    task = lab.task_of(model, max_length=64)
    (dialogue,) = task.encode([(("user", "w1 " * 30), ("assistant", "w2 w3 " * 20))])
    assert len(dialogue) == task.max_length == 16
    after = frozen_answers(task, [[dialogue], [short]], packed)[1]
    torch.testing.assert_close(after[0] / after[1], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_clients_side_by_side_and_one_by_one_packed_and_padded(
    lab: SimpleNamespace, company: Callable[..., Any], family: str
) -> None:
    group = company(lab.task_of(lab.stock(family)))
    group.assert_company_changes_nothing(lab.groups, LABELS)
    packed, padded = (group.losses(lab.groups, LABELS, packed=layout) for layout in LAYOUTS)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-6)
    for name, grad in packed[1].items():
        torch.testing.assert_close(grad, padded[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_stock_model_with_the_update_in_its_weights(
    lab: SimpleNamespace, company: Callable[..., Any], family: str, packed: str
) -> None:
    model = lab.stock(family)
    group = company(lab.task_of(model))
    losses, grads = group.losses(lab.groups, LABELS, packed=packed)
    for k, examples in enumerate(lab.groups):
        own = {name: tensor.clone().requires_grad_() for name, tensor in group.owned[k].items()}
        weights = dict(model.named_parameters())
        for site in group.adapter.sites:
            a, b, c = (own[f"{kind}/{site.name}"] for kind in "ABC")
            update = group.adapter.scale(k + 1) * b @ c @ a
            name = f"{site.name}.weight"
            weights[name] = weights[name].detach() + (update.T if family == "gpt2" else update)

        def alone(example: Dialogue, weights: dict[str, Tensor] = weights) -> Tensor:
            tokens = torch.tensor([example.tokens])
            logits = torch.func.functional_call(model, weights, (tokens,)).logits[0]
            chances = logits.float().log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])
            return -chances[example.prompt - 1 :].sum()

        total = torch.stack([alone(example) for example in examples]).sum()
        loss = total / sum(len(example) - example.prompt for example in examples)
        loss.backward()
        torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-5, atol=1e-6)
        for name, tensor in own.items():
            rank, found = k + 1, grads[name][k]
            found = {"A": found[:rank], "B": found[:rank].T, "C": found[:rank, :rank]}[name[0]]
            assert tensor.grad is not None
            torch.testing.assert_close(found, tensor.grad, rtol=1e-4, atol=1e-5)


# -- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", LAYOUTS)
@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_nothing_looks_ahead_or_at_a_neighbour(
    lab: SimpleNamespace, company: Callable[..., Any], family: str, packed: str
) -> None:
    task = lab.task_of(lab.stock(family))
    group = company(task)
    stacks = group.stacks(range(3))

    def states(groups: Any) -> tuple[Tensor, Any]:
        layout = task.lay_out(groups, packed)
        with torch.no_grad():
            hidden = task.backbone.hidden(layout.batch, group.plugged(range(3), stacks)(layout.batch))
        return hidden.reshape(-1, hidden.shape[-1]), layout.batch

    before, batch = states(lab.groups)
    segments, positions = batch.segments.reshape(-1), batch.positions.reshape(-1)
    if packed == "always":  # others stand behind it in its row
        assert segments[batch.last[1] + 1] > 1
    changed = [list(examples) for examples in lab.groups]
    tokens = list(changed[0][1].tokens)
    tokens[8] = (tokens[8] + 1) % 50
    changed[0][1] = Dialogue(tokens, changed[0][1].prompt)
    after, _ = states(changed)
    touched = (segments == 1) & (positions >= 8)
    real = segments >= 0
    torch.testing.assert_close(after[real & ~touched], before[real & ~touched], rtol=0, atol=1e-6)
    assert ((after - before)[touched].abs().amax(1) > 1e-4).all()


def test_the_loss_is_on_the_response_alone(lab: SimpleNamespace) -> None:
    model = lab.stock("llama")
    task = lab.task_of(model)
    prompt, response = [3, 4, 5, 6], [7, 8, 9]
    layout = task.lay_out([[Dialogue(prompt + response, 4)]])
    assert layout.wanted.tolist() == response
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    wanted = -sum(float(logits[3 + i, token]) for i, token in enumerate(response))
    assert frozen_answers(task, [[Dialogue(prompt + response, 4)]], "auto")[0].tolist() == pytest.approx([wanted, 3])


@pytest.mark.parametrize("packed", LAYOUTS)
def test_only_states_that_predict_a_response_go_through_the_head(
    lab: SimpleNamespace, company: Callable[..., Any], packed: str
) -> None:
    group = company(lab.task_of(lab.stock("llama")))
    rows: list[int] = []
    head = group.task.backbone._model(torch.float32).lm_head
    head.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].numel() // 32))
    group.losses(lab.groups, LABELS, packed=packed)
    assert sum(rows) == sum(len(example) - example.prompt for examples in lab.groups for example in examples)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_big_vocabulary_is_done_in_parts(
    lab: SimpleNamespace, company: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    group = company(lab.task_of(lab.stock("granite")))
    at_once, answers = group.losses(lab.groups, LABELS), group.answers(lab.groups)
    rows: list[int] = []
    group.task.backbone._model(torch.float32).lm_head.register_forward_pre_hook(
        lambda _, arguments: rows.append(arguments[0].shape[1])
    )
    monkeypatch.setattr(decoder, "LOGITS", tokens * 64)
    in_parts = group.losses(lab.groups, LABELS)
    assert max(rows) == tokens
    assert sum(rows) == 46
    torch.testing.assert_close(in_parts[0], at_once[0])
    for name, grad in at_once[1].items():
        torch.testing.assert_close(in_parts[1][name], grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(group.answers(lab.groups), answers)


# -- kinds of models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_may_be_tied_to_the_embeddings(lab: SimpleNamespace, tied: bool) -> None:
    model = lab.stock("qwen2", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    task = lab.task_of(model, targets=".*", dtype=torch.bfloat16)
    assert not any("lm_head" in site.name for site in task.backbone.sites)
    answers = frozen_answers(task, lab.groups, "auto")
    with torch.no_grad():
        assert float(answers[1, 0]) / 4 == pytest.approx(float(nats_alone(model, lab.groups[0][1])), rel=1e-5)
    half = task.backbone._model(torch.bfloat16)
    assert (half.lm_head.weight is half.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("gemma2", {}),
    ],
)
def test_who_looks_through_a_window_is_padded(lab: SimpleNamespace, family: str, changes: dict[str, Any]) -> None:
    model = lab.stock(family, **changes)
    task = lab.task_of(model)
    with pytest.raises(BackboneError, match=f'train.packed = "always": this {family}'):
        task.refuse_layout("always", 8)
    layout = task.lay_out(lab.groups)
    assert not layout.batch.packed
    answers = frozen_answers(task, lab.groups, "auto")
    with torch.no_grad():
        wanted = torch.stack([nats_alone(model, example) for group in lab.groups for example in group])
    torch.testing.assert_close(answers[:, 0] / answers[:, 1], wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_trains_and_float32_evaluates(lab: SimpleNamespace, company: Callable[..., Any]) -> None:
    model = lab.stock("llama")
    full, half = (company(lab.task_of(model, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(full.answers(lab.groups), half.answers(lab.groups))
    losses, grads = full.losses(lab.groups, LABELS)
    rough, rough_grads = half.losses(lab.groups, LABELS)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - losses).abs().max() / losses.abs().max()) < 0.05
    flat, rough_flat = (torch.cat([found[name].flatten() for name in grads]) for found in (grads, rough_grads))
    assert float((rough_flat - flat).norm() / flat.norm()) < 0.2
    assert torch.equal(half.losses(lab.groups, LABELS, dtype=torch.float32)[0], losses)


def test_features_are_the_mean_state_of_the_whole_text(lab: SimpleNamespace) -> None:
    model = lab.stock("llama")
    task = lab.task_of(model, dtype=torch.bfloat16)
    found = task.features(task.lay_out(lab.groups))
    assert found.dtype == torch.float32
    assert found.shape == (7, task.width)
    for i, example in enumerate(example for group in lab.groups for example in group):
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([example.tokens])).last_hidden_state[0]
        torch.testing.assert_close(found[i], states.mean(0), rtol=1e-4, atol=1e-5)


def test_the_score_is_nats_of_tokens_and_perplexity_beside_it(lab: SimpleNamespace) -> None:
    task = lab.task_of(lab.stock("llama"))
    assert task.metric is LOSS
    score = task.score(np.array([[3.0, 2.0], [9.0, 4.0]], dtype=np.float32), np.zeros(2))
    assert (score.total, score.units, score.value) == (12.0, 6, 2.0)
    assert score.beside == {"perplexity": pytest.approx(np.exp(2.0))}
    assert task.score(np.array([[1e6, 2.0]]), np.zeros(1)).beside == {"perplexity": np.inf}
    assert np.isnan(task.score(np.array([[np.nan, 2.0]]), np.zeros(1)).beside["perplexity"])
    assert task.score(np.zeros((0, 2)), np.zeros(0)).units == 0


def test_training_learns_the_responses_and_no_client_the_others(
    lab: SimpleNamespace, company: Callable[..., Any]
) -> None:
    task = lab.task_of(lab.stock("llama"))
    group = company(task, strength=0.1, dropout=0.1)

    def fit(count: int, epochs: int = 3) -> dict[str, Any]:
        jobs = [
            Job(f"client-{k}", 1, k + 1, own, frozenset(own), lab.groups[k], np.zeros(len(lab.groups[k])))
            for k, own in enumerate(group.owned)
        ]
        train = TrainSection(batch_size=2, lr=1e-2, local_epochs=epochs, cohort=count)
        return {done.client: done for done in CohortTrainer(task, group.adapter, train, seed=3).fit(jobs)}

    alone, together = fit(1), fit(3)
    for client, fitted in alone.items():
        assert together[client].loss == pytest.approx(fitted.loss, rel=1e-5)
        for name, tensor in fitted.tensors.items():
            torch.testing.assert_close(together[client].tensors[name], tensor, rtol=1e-3, atol=1e-4)
    assert all(done.loss < alone[client].loss - 0.3 for client, done in fit(3, epochs=20).items())


@pytest.mark.parametrize("rows", [None, 3])
def test_what_is_told_with_certainty_sends_nothing_small_through_the_backbone(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    backbone = lab.task_of(lab.stock("llama")).backbone
    if rows is not None:
        monkeypatch.setattr("folklora.backbones.decoder.LOGITS", rows * backbone.vocabulary)
    states = 12 * torch.randn(8, backbone.width, generator=torch.Generator().manual_seed(0))

    def slopes() -> Tensor:
        mine = states.clone().requires_grad_()
        with torch.no_grad():
            wanted = torch.stack([backbone.nats(mine, torch.full((8,), t)) for t in range(backbone.vocabulary)]).argmin(
                0
            )
        backbone.nats(mine, wanted).sum().backward()
        assert mine.grad is not None
        return mine.grad

    found = slopes()
    assert not ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()
    assert (found == 0).all(1).any()
    monkeypatch.setattr("folklora.backbones.slopes.LEAST", 0.0)
    torch.testing.assert_close(found, slopes(), rtol=1e-5, atol=1e-15)
