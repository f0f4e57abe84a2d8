"""One block applied K of T times, against Hugging Face's own ALBERT and a plain loop over its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank
from folklora.adapters.mixture import CoreMixture, Mixture
from folklora.backbones.backbone import Backbone
from folklora.backbones.batch import Batch, repeat
from folklora.backbones.classification import Classification
from folklora.errors import BackboneError
from folklora.training.stacks import plug, stack

T = 6
GROUPS = [[[2, 9, 3], [2, 8, 7, 6, 5, 3], [2, 3]], [[2, 11, 12, 13, 3]], [[2, 20, 3], [2, 21, 22, 23, 3]]]
LABELS = [[0, 1, 2], [1], [2, 0]]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ALBERT whose block changes states a good deal."""
    import shutil

    from transformers import AutoModel

    where = tmp_path_factory.mktemp("albert-strong")
    shutil.copytree(tiny_model("albert"), where, dirs_exist_ok=True)
    model = AutoModel.from_pretrained(where)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embeddings" not in name:
                parameter.normal_(std=0.15)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(where)
    return where


def loaded(folder: Path, **wishes: Any) -> Backbone:
    return Backbone.load(str(folder), **{"dtype": "float32", **wishes})


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def plain_loop(model: Any, ids: Sequence[int], steps: int) -> Tensor:
    """[length, d]: the stock layer on one sentence, ``x + beta (Block(x) - x)`` as the formula stands."""
    x = model.encoder.embedding_hidden_mapping_in(model.embeddings(torch.tensor([list(ids)])))
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    for _ in range(steps):
        x = x + (T / steps) * (layer(x) - x)
    states: Tensor = x[0]
    return states


def bare(batch: Batch, depth: Sequence[int] | None) -> Bank:
    """Clients without adapters."""
    return Bank({}, {}, batch.token_offsets, batch.token_clients(), depth=depth)


def by_sequence(hidden: Tensor, batch: Batch) -> list[Tensor]:
    flat, segments = hidden.reshape(-1, hidden.shape[-1]), batch.segments.reshape(-1)
    return [flat[segments == i] for i in range(batch.sequences)]


def sequences(groups: Sequence[Sequence[Sequence[int]]]) -> list[Sequence[int]]:
    return [sequence for group in groups for sequence in group]


# -- what a step is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, (T, T, T)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_steps_are_the_stock_model_bit_for_bit(folder: Path, dtype: torch.dtype, depth: Any) -> None:
    backbone, model = loaded(folder), stock(folder, dtype)
    batch = backbone.batch(GROUPS, "never")
    with torch.no_grad():
        ours = backbone.hidden(batch, bare(batch, depth), dtype)
        mask = (batch.segments >= 0).long()
        theirs = model(input_ids=batch.tokens, attention_mask=mask, position_ids=batch.positions).last_hidden_state
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["always", "never"])
@pytest.mark.parametrize("steps", range(1, T + 1))
def test_fewer_steps_are_longer(folder: Path, steps: int, layout: str, attention: str) -> None:
    backbone, model = loaded(folder), stock(folder)
    backbone.attend(attention)
    batch = backbone.batch(GROUPS, layout)
    assert batch.packed == (layout == "always")
    with torch.no_grad():
        told = backbone.hidden(batch, bare(batch, [steps] * 3))
        with backbone.depth.walking(steps):
            by_default = backbone.hidden(batch)
        full = backbone.hidden(batch)
        for found, ids in zip(by_sequence(told, batch), sequences(GROUPS), strict=True):
            torch.testing.assert_close(found, plain_loop(model, ids, steps), rtol=1e-4, atol=1e-5)
    assert torch.equal(told, by_default)
    assert torch.equal(told, full) == (steps == T)
    assert backbone.depth.steps == T  # for a while is over


@pytest.mark.parametrize("layout", ["always", "never"])
@pytest.mark.parametrize("depth", [(2, 6, 3), (6, 1, 6), (5, 4, 4), (1, 2, 3)])
def test_each_client_takes_its_own_number_of_steps(folder: Path, depth: tuple[int, ...], layout: str) -> None:
    backbone, model = loaded(folder), stock(folder)
    groups = [[*group] * 3 for group in GROUPS]
    batch = backbone.batch(groups, layout)
    if layout == "always":  # or nothing is shown about rows that two clients share
        owners = batch.token_clients().view(batch.tokens.shape)
        assert bool((owners.amin(1) < owners.amax(1)).any())
    with torch.no_grad():
        found = by_sequence(backbone.hidden(batch, bare(batch, depth)), batch)
        own = [steps for steps, group in zip(depth, groups, strict=True) for _ in group]
        for states, ids, steps in zip(found, sequences(groups), own, strict=True):
            torch.testing.assert_close(states, plain_loop(model, ids, steps), rtol=1e-4, atol=1e-5)
    assert backbone._socket.bank is None


def test_a_client_without_a_sequence_asks_for_no_step(folder: Path) -> None:
    backbone = loaded(folder)
    batch = backbone.batch([GROUPS[0], [], GROUPS[2]])
    with torch.no_grad():
        found = backbone.hidden(batch, bare(batch, (2, 6, 2)))
        assert torch.equal(found, backbone.hidden(batch, bare(batch, (2, 2, 2))))


def test_who_has_arrived_costs_nothing(folder: Path) -> None:
    """Of padded rows, the block sees those alone that are still on their way."""
    backbone = loaded(folder)
    batch = backbone.batch(GROUPS, "never")
    seen: list[int] = []
    assert backbone.depth.block is not None
    backbone.depth.block.register_forward_pre_hook(lambda block, given: seen.append(len(given[0])))
    with torch.no_grad():
        backbone.hidden(batch, bare(batch, (2, 6, 3)))
    assert seen == [6, 6, 3, 1, 1, 1]


def test_a_coarse_copy_walks_through_its_own_block(folder: Path) -> None:
    backbone, model = loaded(folder), stock(folder)
    batch = backbone.batch(GROUPS)
    with torch.no_grad():
        for depth in ((3, 3, 3), (2, 6, 3)):
            coarse = backbone.hidden(batch, bare(batch, depth), torch.bfloat16)
            assert coarse.dtype == torch.bfloat16
            fine = backbone.hidden(batch, bare(batch, depth))
            assert 0 < (coarse - fine).abs().max() < 0.15
            for states, ids, steps in zip(by_sequence(fine, batch), GROUPS[0], [depth[0]] * 3, strict=False):
                torch.testing.assert_close(states, plain_loop(model, ids, steps), rtol=1e-4, atol=1e-5)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["always", "never"])
@pytest.mark.parametrize("depth", [(6, 6, 6), (3, 3, 3), (2, 6, 3), (5, 1, 4)])
def test_company_changes_nothing(company: Callable[..., Any], folder: Path, depth: Any, layout: str) -> None:
    task = Classification(loaded(folder, norm=True, targets=r".*(query|ffn|embedding_hidden_mapping_in)"), 3)
    clients = replace(company(task), depth=depth)
    clients.assert_company_changes_nothing(GROUPS, LABELS, packed=layout)


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_slopes_are_those_of_the_plain_loop(company: Callable[..., Any], folder: Path, steps: int) -> None:
    """The adapter is in the weights of the stock layer, and autograd goes through the loop."""
    task = Classification(loaded(folder, targets=r".*(query|value)"), 3, pooling="cls")
    clients = replace(company(task), depth=(steps,))
    losses, grads = clients.losses(GROUPS[:1], LABELS, [0])
    own = {name: tensor.clone().requires_grad_() for name, tensor in clients.owned[0].items()}
    model = stock(folder)
    from torch.func import functional_call

    weights = dict(model.named_parameters())
    for site in clients.adapter.sites:
        update = own[f"B/{site.name}"] @ own[f"C/{site.name}"] @ own[f"A/{site.name}"]
        key = f"{site.name}.weight"
        weights[key] = weights[key].detach() + clients.adapter.scale(1) * update

    class Looped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Sequence[int]) -> Tensor:
            return plain_loop(self.model, ids, steps)[0]

    named = {f"model.{name}": weight for name, weight in weights.items()}
    pooled = torch.stack([functional_call(Looped(), named, (ids,)) for ids in GROUPS[0]])
    logits = pooled @ own["head/weight"].T + own["head/bias"]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS[0]))
    loss.backward()
    torch.testing.assert_close(losses[0], loss.detach(), rtol=1e-5, atol=1e-6)
    for name, tensor in own.items():
        stacked = tensor.grad.T if name.startswith("B/") else tensor.grad  # type: ignore[union-attr]
        if not name.startswith("head"):
            stacked = torch.nn.functional.pad(stacked, (0, 0, 0, 2)) if name[0] in "AB" else stacked
        found = grads[name][0]
        found = found[: stacked.shape[0], : stacked.shape[1]] if name.startswith("C/") else found
        torch.testing.assert_close(found, stacked, rtol=1e-3, atol=1e-6)


def test_an_adapter_of_the_block_exists_once(folder: Path) -> None:
    backbone = loaded(folder)
    where = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert [site.name for site in backbone.sites] == [f"{where}.query", f"{where}.value"]


@pytest.mark.parametrize("depth", [(6, 6, 6), (3, 3, 3), (2, 6, 3)])
def test_layers_that_are_computed_again_give_the_same_slopes(
    company: Callable[..., Any], folder: Path, depth: Any
) -> None:
    found = []
    for again in (False, True):
        backbone = loaded(folder, norm=True)
        if again:
            backbone.checkpoint()
        calls: list[int] = []
        assert backbone.depth.block is not None
        inner: Any = backbone.depth.block.albert_layers[0]  # type: ignore[index]
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        losses, grads = replace(company(Classification(backbone, 3)), depth=depth).losses(GROUPS, LABELS)
        assert len(calls) == max(depth) * (2 if again else 1)
        found.append((losses, grads))
    (losses, grads), (others, slopes) = found
    assert torch.equal(losses, others)
    assert grads.keys() == slopes.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, slopes[name]), name


@pytest.mark.parametrize("kind", [Mixture, CoreMixture])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_balance_of_a_mixture_is_of_every_application(folder: Path, kind: Any, checkpointing: bool) -> None:
    backbone = loaded(folder)
    if checkpointing:
        backbone.checkpoint()
    task = Classification(backbone, 3)
    adapter = kind(backbone.sites, False, 4.0, 0.0, slots=3, top=2, balance=0.1)
    rank = adapter.stacked(2)
    g = torch.Generator().manual_seed(0)
    owned = []
    for live in (3, 2, 3):
        own = {name: 0.5 * torch.randn(shape, generator=g) for name, shape in adapter.shapes(rank).items()}
        own |= {name: torch.randn(shape, generator=g) for name, shape in task.head_shapes().items()}
        for name in own:
            if name.startswith("live/"):
                own[name] = (torch.arange(3) < live).float()
        owned.append(own)
    scales = torch.full((3,), adapter.scale(rank))

    def penalties(members: list[int], depth: Sequence[int]) -> Tensor:
        stacks = {
            name: t.requires_grad_()
            for name, t in stack([owned[k] for k in members], rank, task.backbone.device).items()
        }
        batch = backbone.batch([GROUPS[k] * 3 for k in members])
        bank = plug(adapter, stacks, scales[: len(members)], batch, torch.device("cpu"), depth)
        hidden = backbone.hidden(batch, bank)
        told: Tensor = bank.penalty.detach()  # type: ignore[union-attr]
        (hidden.sum() + bank.penalty.sum()).backward()  # type: ignore[union-attr]
        return told

    together = penalties([0, 1, 2], (2, 6, 3))
    for k, steps in enumerate((2, 6, 3)):
        torch.testing.assert_close(together[k : k + 1], penalties([k], (steps,)), rtol=1e-4, atol=1e-6)
    # Each application is counted: one more step adds about as much as one.
    one, six = (float(penalties([1], (steps,))) for steps in (1, 6))
    assert 4 * one < six < 9 * one


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_a_model_with_layers_of_its_own_is_refused(tiny_model: Callable[[str], Path]) -> None:
    backbone = loaded(tiny_model("bert"))
    assert (backbone.depth.full, backbone.depth.steps, backbone.depth.of([None, None])) == (None, None, None)
    with pytest.raises(
        BackboneError, match=r"^depth.steps = 3: this bert has 2 layers with weights of their own"
    ) as one:
        backbone.depth.walk(3)
    assert "\n" not in str(one.value)
    with pytest.raises(BackboneError, match="^depth = 2: this bert"):
        backbone.depth.of([None, 2])


def test_two_groups_of_layers_are_not_one_block() -> None:
    from transformers import AlbertConfig, AutoModel

    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "embedding_size": 8}
    model = AutoModel.from_config(AlbertConfig(vocab_size=20, num_hidden_layers=4, num_hidden_groups=2, **sizes))
    backbone = Backbone(model, SimpleNamespace(pad_token_id=0), dtype=torch.float32)
    assert backbone.depth.full is None
    assert any("groups.1" in site.name for site in backbone.sites)


@pytest.mark.parametrize("steps", [0, 7, 1000])
def test_more_steps_than_the_model_takes_are_refused(folder: Path, steps: int) -> None:
    backbone = loaded(folder)
    with pytest.raises(BackboneError, match=f"depth.steps = {steps}: .* 6 times; allowed: 1 to 6"):
        backbone.depth.walk(steps)
    with pytest.raises(BackboneError, match="allowed: 1 to 6"):
        backbone.depth.of([3, steps])
    assert backbone.depth.steps == T
    assert backbone.depth.of([3, None]) == (3, T)


def test_nothing_is_said_where_nobody_asks(folder: Path, company: Callable[..., Any]) -> None:
    task = Classification(loaded(folder), 3)
    clients = company(task)
    laid = task.lay_out(GROUPS)
    assert clients.plugged([0, 1, 2], clients.stacks([0, 1, 2]))(laid).depth is None
    assert isinstance(clients.adapter, LowRank)
    assert repeat(laid, 1).clients == 1
