from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.errors import AttackError
from folklora.federation.run import variant
from folklora.federation.setup import prepare
from folklora.privacy.attacks.assembly import Assembly
from folklora.privacy.attacks.canvas import TextCanvas
from folklora.privacy.attacks.first_inputs import FirstInputs
from folklora.privacy.attacks.observation import Knowledge
from folklora.privacy.attacks.prior import Bigrams
from folklora.privacy.attacks.pursuit import View, pursue
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.rowspan import inside, residuals, row_span
from folklora.privacy.attacks.run import Plan, attack
from folklora.privacy.attacks.span import spaces, written

VOCABULARY, WIDTH, OUT, RANK = 400, 64, 48, 8


class Layer:
    """Random inputs of a layer with an adapter, and the gradients that some tokens leave."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = self.random(VOCABULARY, WIDTH)
        self.a, self.c, self.b = self.random(RANK, WIDTH), self.random(RANK, RANK), self.random(OUT, RANK)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, count: int) -> list[int]:
        return sorted(torch.randperm(VOCABULARY, generator=self.generator)[:count].tolist())

    def gradients(self, tokens: list[int]) -> dict[str, Tensor]:
        """By autograd, of a loss with a random slope at each token's output."""
        leaves = {name: getattr(self, name).clone().requires_grad_() for name in ("a", "c", "b")}
        dense = torch.zeros(OUT, WIDTH, requires_grad=True)
        x = self.inputs[tokens]
        y = x @ dense.T + x @ leaves["a"].T @ leaves["c"].T @ leaves["b"].T
        (y * self.random(*y.shape)).sum().backward()
        return {name: leaf.grad for name, leaf in {**leaves, "dense": dense}.items() if leaf.grad is not None}


def found(candidates: Tensor, rows: Tensor, most: int) -> list[int]:
    span = row_span(rows, most=most)
    if span.everything:
        return []
    return inside(residuals(candidates, span), span.noise, 1.0, most).nonzero().flatten().tolist()


@pytest.mark.parametrize("count", range(1, RANK))
def test_a_core_reveals_every_token_while_there_are_fewer_than_its_rank(count: int) -> None:
    layer = Layer(count)
    tokens = layer.tokens(count)
    gradient = layer.gradients(tokens)
    assert found(layer.inputs @ layer.a.T, gradient["c"], count) == tokens
    assert found(layer.inputs @ (layer.c @ layer.a).T, gradient["b"], count) == tokens


@pytest.mark.parametrize("count", [RANK, RANK + 1, 2 * RANK, 40])
def test_a_core_reveals_no_token_from_its_rank_on(count: int) -> None:
    layer = Layer(count)
    gradient = layer.gradients(layer.tokens(count))
    assert row_span(gradient["c"], most=count).everything
    candidates = layer.inputs @ layer.a.T
    assert (
        pursue([View(candidates, gradient["c"], candidates[:0])], torch.zeros(VOCABULARY).long(), [count], 1e-6).chosen
        == []
    )


@pytest.mark.parametrize("count", [1, RANK, 40])
def test_a_dense_gradient_reveals_all_that_are_fewer_than_the_layer_is_wide(count: int) -> None:
    layer = Layer(count)
    tokens = layer.tokens(count)
    assert found(layer.inputs, layer.gradients(tokens)["dense"], count) == tokens


@pytest.mark.parametrize("count", [1, RANK])
def test_a_down_factor_reveals_as_many_tokens_as_it_has_rows(count: int) -> None:
    layer = Layer(count)
    tokens = layer.tokens(count)
    assert found(layer.inputs, layer.gradients(tokens)["a"], count) == tokens


@pytest.mark.parametrize("count", [RANK + 1, 2 * RANK, 3 * RANK])
def test_a_pursuit_goes_on_where_a_down_factor_has_fewer_rows_than_there_are_tokens(count: int) -> None:
    layer = Layer(count)
    tokens = layer.tokens(count)
    rows = layer.gradients(tokens)["a"]
    assert found(layer.inputs, rows, count) == []
    result = pursue([View(layer.inputs, rows, layer.inputs[:0])], torch.zeros(VOCABULARY).long(), [count], 1e-6)
    assert sorted(result.chosen) == tokens
    assert result.unexplained < 1e-5


def test_a_pursuit_fills_no_place_twice_and_takes_what_is_known() -> None:
    layer = Layer()
    tokens = layer.tokens(6)
    rows = layer.gradients(tokens)["a"]
    places = torch.arange(VOCABULARY) % 2
    known = layer.inputs[tokens[:1]]
    room = [int((places[tokens[1:]] == place).sum()) for place in (0, 1)]
    result = pursue([View(layer.inputs, rows, known)], places, room, 1e-6)
    assert sorted(result.chosen) == tokens[1:]
    short = pursue([View(layer.inputs, rows, known)], places, [1, 0], 1e-6)
    assert len(short.chosen) == 1
    assert int(places[short.chosen[0]]) == 0


@pytest.mark.parametrize("shape", ["steps", "signs", "shuffled", "nothing"])
def test_steps_of_sgd_add_up_in_the_span_and_signs_do_not(shape: str) -> None:
    layer = Layer()
    tokens = layer.tokens(5)
    gradients = [layer.gradients(tokens)["a"] for _ in range(4)]
    rows = torch.stack(gradients).sum(0)
    match shape:
        case "signs":
            rows = gradients[0].sign()
        case "shuffled":
            rows = rows.flatten()[torch.randperm(rows.numel(), generator=layer.generator)].view(rows.shape)
        case "nothing":
            rows = torch.zeros_like(rows)
    assert found(layer.inputs, rows, 5) == (tokens if shape == "steps" else [])


def test_residuals_are_those_of_least_squares() -> None:
    layer = Layer()
    rows = layer.random(5, WIDTH).double()
    x = layer.inputs[:20].double()
    solved = np.linalg.lstsq(rows.T.numpy(), x.T.numpy(), rcond=None)[0]
    expected = np.linalg.norm(x.T.numpy() - rows.T.numpy() @ solved, axis=0) / x.norm(dim=1).numpy()
    np.testing.assert_allclose(residuals(x, row_span(rows)).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4])
def test_the_rank_is_where_singular_values_fall(noise: float) -> None:
    layer = Layer()
    rows = layer.random(20, 6) @ layer.random(6, WIDTH)
    span = row_span(rows + noise * layer.random(20, WIDTH))
    assert span.dimensions == 6
    assert noise / 10 <= span.noise <= max(1e-5, 10 * noise)


def test_rows_of_a_span_are_those_of_layers_that_share_inputs() -> None:
    layer = Layer()
    tokens = layer.tokens(3)
    gradient = layer.gradients(tokens)
    before = {f"{kind}/{site}": getattr(layer, kind.lower()) for kind in "ACB" for site in ("q", "v")}
    sent = {f"{kind}/{site}": gradient[kind.lower()] for kind in "ACB" for site in ("q", "v")}
    (both,) = spaces(sent, before, ["q", "v"])
    assert both.rows.shape == (2 * RANK, WIDTH)
    apart = spaces({name: t for name, t in sent.items() if name[0] != "A"}, before, ["q", "v"])
    assert [space.rows.shape for space in apart] == [(RANK, RANK), (OUT, RANK)] * 2
    for space in apart:
        assert found(space.of(layer.inputs), space.rows, 3) == tokens
    assert spaces({"C/q": torch.zeros(RANK, RANK), "B/v": torch.full((OUT, RANK), torch.nan)}, before, ["q", "v"]) == []


def test_cores_side_by_side_have_a_space_each() -> None:
    layer = Layer()
    tokens, downs, cores = layer.tokens(3), [], []
    for _ in range(2):
        layer.a = layer.random(RANK, WIDTH)
        downs.append(layer.a)
        cores.append(layer.gradients(tokens)["c"])
    sent, before = {"C/q": torch.block_diag(*cores)}, {"A/q": torch.cat(downs)}
    mask = torch.block_diag(*[torch.ones(RANK, RANK)] * 2)
    apart = spaces(sent, before, ["q"], {"C/q": mask})
    assert [space.rows.shape for space in apart] == [(RANK, RANK)] * 2
    assert [found(space.of(layer.inputs), space.rows, 3) for space in apart] == [tokens] * 2
    (whole,) = spaces(sent, before, ["q"])
    assert whole.rows.shape == (2 * RANK, 2 * RANK)


def test_rows_whose_squares_are_zero_are_rows_all_the_same() -> None:
    sent = {"C/q": torch.arange(float(RANK * RANK)).view(RANK, RANK)}
    before = {"A/q": torch.ones(RANK, WIDTH)}
    (large,), (small,) = (spaces({"C/q": sent["C/q"] * by}, before, ["q"]) for by in (1.0, 1e-30))
    torch.testing.assert_close(small.rows, large.rows)


# -- on models ---------------------------------------------------------------------------------------------------------


def replica(setup: Any) -> Replica:
    return Replica(setup.task, setup.method.adapter, "text")


def test_first_inputs_are_what_the_embedding_layer_gives(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("method.name=fedit"))
    before = setup.method.initial("0")
    inputs = FirstInputs(replica(setup), before, 5, torch.float32)
    assert [site.rpartition(".")[2] for site in inputs.sites] == ["query", "value"]
    model: Any = setup.task.backbone.run(lambda model: model, None, torch.float32)
    places = torch.arange(5)[None]
    whole = torch.cat([block for _, block in inputs.every()])
    with torch.no_grad():
        for token in (0, 7, 63):
            expected = model.embeddings(torch.full((1, 5), token), position_ids=places)[0]
            torch.testing.assert_close(whole[token], expected)
            torch.testing.assert_close(inputs.at(torch.full((1, 5), token))[0], expected)


def test_first_inputs_follow_a_layer_norm_of_the_clients_own(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("method.name=fedit", "adapter.norm=true"))
    before = setup.method.initial("0")
    plain = FirstInputs(replica(setup), before, 3, torch.float32).at(torch.tensor([[9, 9, 9]]))
    name = next(name for name in before if "embeddings" in name and name.endswith("bias"))
    moved = {**before, name: before[name] + 2.0}
    assert torch.allclose(FirstInputs(replica(setup), moved, 3, torch.float32).at(torch.tensor([[9, 9, 9]])), plain + 2)
    shifted = next(iter(FirstInputs(replica(setup), moved, 3, torch.float32).every()))[1]
    assert torch.allclose(shifted[9], plain[0] + 2)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "distilbert", "roberta"])
def test_first_inputs_of_other_architectures(architecture: str, tiny_recipe: Any, tiny_model: Any) -> None:
    recipe = tiny_recipe("method.name=fedit", f"model.name={tiny_model(architecture)}")
    setup = prepare(recipe)
    inputs = FirstInputs(replica(setup), setup.method.initial("0"), 4, torch.float32)
    names = [site.name for site in setup.task.backbone.sites]
    assert inputs.sites == tuple(names[: len(inputs.sites)])
    assert len(inputs.sites) == len(names) / 2


def test_layers_behind_the_first_attention_are_refused(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("method.name=fedit", r"adapter.targets=encoder\.layer\.1\..*query"))
    with pytest.raises(AttackError, match="mixed already"):
        FirstInputs(replica(setup), setup.method.initial("0"), 4, torch.float32)


def span(recipe: Any, **plan: Any) -> dict[str, Any]:
    found = attack(recipe, Plan("span", knowledge=plan.pop("knowledge", Knowledge("gradient")), **plan))
    assert set(found["metrics"]) >= {"found_recall", "found_exactly", "token_recall"}
    return {name: metric["mean"] for name, metric in found["metrics"].items()} | {"metrics": found["metrics"]}


@pytest.mark.parametrize("method", ["fedit", "fedsa"])
def test_a_down_factor_gives_a_batch_of_one_away(method: str, tiny_recipe: Callable[..., Any]) -> None:
    result = span(tiny_recipe(f"method.name={method}"), victims=3)
    assert result["found_exactly"] == result["exact_match"] == result["token_recall"] == 1
    control = {name: result["metrics"][name]["control"] for name in ("found_recall", "exact_match")}
    assert control == {"found_recall": 0, "exact_match": 0}


@pytest.mark.parametrize(("rank", "recovered"), [(4, False), (24, True)])
@pytest.mark.parametrize("method", ["ffa", "folklora"])
def test_cores_and_up_factors_give_it_away_where_their_rank_is_above_its_length(
    method: str, rank: int, recovered: bool, tiny_recipe: Callable[..., Any]
) -> None:
    recipe = tiny_recipe(f"method.name={method}", f"adapter.rank={rank}")
    result = span(recipe, victims=3)
    if recovered:
        assert result["found_exactly"] == result["exact_match"] == 1
    else:
        assert result["found_recall"] < 0.5
        assert result["exact_match"] < 0.5


@pytest.mark.parametrize("view", ["gradient", "sent"])
@pytest.mark.parametrize("method", ["ravan:heads=2", "ravan:heads=2:budget=1"])
def test_several_cores_give_it_away_where_the_rank_of_one_is_above_its_length(
    method: str, view: Any, tiny_recipe: Callable[..., Any]
) -> None:
    """At ranks of 8 and of 32 in all; two of three texts have fewer than 16 tokens."""
    sgd = ("train.optimizer=sgd", "train.lr=1.0", "train.clip=none")
    few, many = (
        span(variant(tiny_recipe(f"adapter.rank={rank}", *sgd), method, 0), knowledge=Knowledge(view), victims=3)
        for rank in (4, 16)
    )
    assert few["token_recall"] < 0.4
    assert many["token_recall"] > 0.8
    assert many["found_recall"] > 0.6
    assert many["metrics"]["token_recall"]["control"] < 0.4


def test_nothing_is_found_before_anything_moved(tiny_recipe: Callable[..., Any]) -> None:
    result = span(tiny_recipe("method.name=fedsa"), warmup=0)  # B is zero, and so is A's gradient
    assert result["found_recall"] == result["token_recall"] == 0


def test_what_steps_of_sgd_sent_is_attacked_as_a_sum(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=fedit", "train.optimizer=sgd", "train.lr=1.0", "train.clip=none")
    result = span(recipe, knowledge=Knowledge("sent"), steps=3, warmup=2)
    assert result["token_recall"] > 0.9


def test_the_second_layer_sorts_tokens_out_among_texts(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("method.name=fedit", "adapter.rank=4"))
    before = setup.method.initial("0")
    generator = torch.Generator().manual_seed(0)
    before = {n: torch.randn(t.shape, generator=generator) * 0.3 if n[0] in "Bh" else t for n, t in before.items()}
    texts = [[2, *torch.randint(4, 64, (length,), generator=generator).tolist(), 3] for length in (6, 5)]
    names = [name for name in before if "layer.1" in name and name.startswith("A/")]
    gradient = replica(setup).exact(before, names, texts, torch.tensor([0, 1]))
    sites = [name.removeprefix("A/") for name in names]
    told = spaces(gradient, before, sites)
    free = torch.zeros(2, 8, dtype=torch.bool)
    for row, text in zip(free, texts, strict=True):
        row[1 : len(text) - 1] = True
    mixed = [list(text) for text in texts]
    for places in (slice(1, 2), slice(4, 6)):
        mixed[0][places], mixed[1][places] = mixed[1][places], mixed[0][places]
    assembly = Assembly(replica(setup), before, sites[0], told, torch.float32)
    found = assembly.improved(mixed, free)
    assert sorted(found) == sorted(texts) != sorted(mixed)
    blind = Assembly(replica(setup), before, sites[0], [], torch.float32)
    assert blind.improved(mixed, free) == mixed


def test_a_batch_is_written_down_whole(tiny_recipe: Callable[..., Any]) -> None:
    result = span(tiny_recipe("method.name=fedit", "adapter.rank=16"), batch=2, victims=2)
    assert result["found_recall"] > 0.7
    assert result["token_recall"] > 0.7


def test_texts_of_a_batch_are_written_as_the_prior_likes_them(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("method.name=fedit"))
    canvas = TextCanvas(replica(setup), [4, 4], ([2], [3]), [0, 1, 2, 3])
    prior = Bigrams([[2, 10, 20, 3], [2, 11, 21, 3]] * 9, 64)
    texts = written(canvas, {1: [10, 11], 2: [21, 20]}, prior)
    assert sorted(texts) == [[2, 10, 20, 3], [2, 11, 21, 3]]
    assert written(canvas, {1: [10]}, None) == [[2, 10, 0, 3], [2, 10, 0, 3]]


def test_pictures_are_refused(seeing_model: Callable[[str], Path], tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe("method.name=fedit", f"model.name={seeing_model('vit')}", "data.image=picture")
    with pytest.raises(AttackError, match="one on text"):
        attack(recipe, Plan("span"))


def test_a_matrix_that_the_fast_driver_cannot_take_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        3, 9, generator=torch.Generator().manual_seed(2)
    )
    want = row_span(matrix)

    def failing(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", failing)
    got = row_span(matrix)
    torch.testing.assert_close(got.values, want.values)
    torch.testing.assert_close(got.basis.T @ got.basis, want.basis.T @ want.basis)
