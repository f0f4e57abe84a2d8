"""Mixtures of experts against each token by itself, in float64, with every product written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.adapters.lowrank import Site, Tensors
from folklora.adapters.mixture import CoreMixture, Mixture, Router, blocks_of, joined
from folklora.adapters.peft import save_peft
from folklora.errors import RunError

SITE = Site("layer", 7, 5)
RANK, SLOTS, ALPHA = 2, 4, 6.0
HELD = (4, 1, 2)  # experts of each client
ROWS = {"equal": (6, 6, 6), "unequal": (9, 2, 5), "one without rows": (7, 0, 4)}
KINDS = {"lora": Mixture, "cores": CoreMixture}
both = pytest.mark.parametrize("kind", KINDS)


def adapter(kind: str, top: int = 2, balance: float = 0.0) -> Mixture:
    return KINDS[kind]((SITE,), False, ALPHA, slots=SLOTS, top=top, balance=balance)


def clients(kind: str, *, rubbish: bool = True) -> list[Tensors]:
    """Clients with experts in their first slots, and rubbish in the others: none of it must ever be seen."""
    made = adapter(kind)
    random, found = torch.Generator().manual_seed(3), []
    for held in HELD:
        tensors = {
            n: torch.randn(s, generator=random) for n, s in made.shapes(made.stacked(RANK)).items() if n[0] != "l"
        }
        for name in (f"{factor}/layer" for factor in made.expert_kinds):
            blocks = blocks_of(name, tensors[name], RANK).clone()
            blocks[1 + held :] *= 50.0 if rubbish else 0.0
            tensors[name] = joined(name, blocks)
        tensors["live/layer"] = (torch.arange(SLOTS) < held).float()
        found.append(tensors)
    return found


def oracle(
    kind: str, own: Tensors, x: np.ndarray, top: int, dropped: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list]:
    """One token: what is added to the layer's output, the probabilities of the client's experts, and which it takes."""
    held = int(own["live/layer"].sum())
    blocks = {name: blocks_of(name, t, RANK).double().numpy() for name, t in own.items() if name[0] in "ABE"}
    t = own["T/layer"].double().numpy()
    if kind == "lora":
        seen = [blocks["A/layer"][e] @ x for e in range(1 + held)]
        out = [blocks["B/layer"][e] @ blocks["A/layer"][e] @ dropped for e in range(1 + held)]
        wanted = t @ x
    else:
        a, b = own["A/layer"].double().numpy(), own["B/layer"].double().numpy()
        seen = [blocks["E/layer"][e] @ a @ x for e in range(1 + held)]
        out = [b @ blocks["E/layer"][e] @ a @ dropped for e in range(1 + held)]
        wanted = t @ a @ x
    scores = np.array([seen[1 + e] @ wanted for e in range(held)]) / math.sqrt(RANK)
    p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    taken = np.argsort(-p)[:top].tolist()
    y = out[0] + sum(p[e] / p[taken].sum() * out[1 + e] for e in taken)
    return ALPHA / RANK * y, p, taken


def plugged(kind: str, own: list[Tensors], rows: tuple[int, ...], real: Tensor | None = None, **settings: float):
    made = adapter(kind, **settings)  # type: ignore[arg-type]
    stacks = {name: torch.stack([t[name].T if name[0] == "B" else t[name] for t in own]) for name in own[0]}
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    scales = torch.full((len(own),), made.scale(made.stacked(RANK)))
    leaves = {name: tensor.clone().requires_grad_(not name.startswith("live")) for name, tensor in stacks.items()}
    real = torch.ones(sum(rows), dtype=torch.bool) if real is None else real
    return made.plug_site(SITE, leaves, scales, owners, real), leaves, (0, *np.cumsum(rows).tolist())


@both
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("dropout", [False, True])
def test_every_token_is_its_own_mixture(kind: str, rows: tuple[int, ...], top: int, dropout: bool) -> None:
    own = clients(kind)
    x = torch.randn(sum(rows), SITE.d_in, generator=torch.Generator().manual_seed(1))
    mask = 2 * torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(2)).float() if dropout else None
    site, _, offsets = plugged(kind, own, rows, top=top)
    got = site.delta(x, offsets, mask).detach().numpy()
    owners = np.repeat(np.arange(len(rows)), rows)
    for token, owner in enumerate(owners):
        seen = x[token].double().numpy()
        dropped = seen if mask is None else seen * mask[token].double().numpy()
        want, _, _ = oracle(kind, own[owner], seen, top, dropped)
        np.testing.assert_allclose(got[token], want, rtol=1e-4, atol=1e-4)


@both
def test_the_load_is_that_of_each_client_s_real_tokens(kind: str) -> None:
    """n sum P f; tokens that pad a row are nobody's load."""
    own, rows = clients(kind), ROWS["unequal"]
    x = torch.randn(sum(rows), SITE.d_in, generator=torch.Generator().manual_seed(1))
    real = torch.rand(sum(rows), generator=torch.Generator().manual_seed(5)) < 0.7
    site, _, offsets = plugged(kind, own, rows, real, top=2, balance=0.25)
    site.delta(x, offsets, None)
    assert site.penalty is not None
    for k, tensors in enumerate(own):
        tokens = [t for t in range(offsets[k], offsets[k + 1]) if real[t]]
        told = [oracle(kind, tensors, x[t].double().numpy(), 2, x[t].double().numpy())[1:] for t in tokens]
        mean = np.mean([p for p, _ in told], axis=0)
        counts = np.bincount([e for _, taken in told for e in taken], minlength=HELD[k])
        want = 0.25 * HELD[k] * float(mean @ (counts / counts.sum()))
        assert float(site.penalty[k].detach()) == pytest.approx(want, rel=1e-4)
        if HELD[k] == 1:
            assert want == pytest.approx(0.25)  # all tokens take the only expert
    with torch.no_grad():
        site.delta(x, offsets, None)
    assert site.penalty is None  # nobody minimises anything


@both
def test_gradients_are_autograd_s_of_a_loop_over_tokens(kind: str) -> None:
    rows, random = ROWS["unequal"], torch.Generator().manual_seed(8)
    x = torch.randn(sum(rows), SITE.d_in, generator=random)
    pull = torch.randn(sum(rows), SITE.d_out, generator=random)
    site, leaves, offsets = plugged(kind, clients(kind), rows, top=2, balance=0.5)
    x_leaf = x.clone().requires_grad_()
    ((site.delta(x_leaf, offsets, None) * pull).sum() + site.penalty.sum()).backward()  # type: ignore[union-attr]
    naive = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    seen = x.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for k, held in enumerate(HELD):
        p_sum, counts = torch.zeros(held, dtype=torch.float64), torch.zeros(held, dtype=torch.float64)
        for t in range(offsets[k], offsets[k + 1]):
            out, p, taken = _token(kind, {n: leaf[k] for n, leaf in naive.items()}, held, seen[t])
            total = total + (out * pull[t].double()).sum()
            p_sum = p_sum + p
            counts[taken] += 1
        total = total + 0.5 * held * (p_sum / rows[k] * counts / counts.sum()).sum()
    total.backward()
    torch.testing.assert_close(x_leaf.grad.double(), seen.grad, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]
    for name, leaf in leaves.items():
        if not name.startswith("live"):
            torch.testing.assert_close(leaf.grad.double(), naive[name].grad, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]


def _token(kind: str, own: Tensors, held: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = own["B/layer"]  # [.., r, d_out] in a stack
    if kind == "lora":
        down = own["A/layer"].view(1 + SLOTS, RANK, -1) @ x
        out, wanted = torch.einsum("erd,er->ed", b.view(1 + SLOTS, RANK, -1), down), own["T/layer"] @ x
    else:
        down = own["E/layer"] @ (own["A/layer"] @ x)
        out, wanted = down @ b, own["T/layer"] @ (own["A/layer"] @ x)
    p = torch.softmax((down[1 : 1 + held] @ wanted) / math.sqrt(RANK), 0)
    taken = torch.argsort(-p.detach())[:2]
    gates = p[taken] / p[taken].sum()
    return ALPHA / RANK * (out[0] + (gates[:, None] * out[1 + taken]).sum(0)), p, taken


@both
def test_slots_that_are_not_in_use_get_no_gradient(kind: str) -> None:
    own, rows = clients(kind), ROWS["equal"]
    site, leaves, offsets = plugged(kind, own, rows, top=3, balance=0.1)
    x = torch.randn(sum(rows), SITE.d_in, generator=torch.Generator().manual_seed(1))
    (site.delta(x, offsets, None).square().sum() + site.penalty.sum()).backward()  # type: ignore[union-attr]
    for k, held in enumerate(HELD):
        for factor in adapter(kind).expert_kinds:
            grad = leaves[f"{factor}/layer"].grad[k]  # type: ignore[index]
            blocks = blocks_of(f"{factor}/layer", grad.T if factor == "B" else grad, RANK)
            assert blocks[: 1 + held].flatten(1).any(1).all()
            assert not blocks[1 + held :].any()


def test_who_holds_no_expert_has_the_shared_one() -> None:
    router = Router(torch.zeros(1, 3), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), 2, 0.1)
    leaf = torch.randn(4, 3, 2, requires_grad=True)
    gates, load = router(leaf, torch.randn(4, 2))
    assert not gates.any()
    assert load is not None
    (gates.sum() + load.sum()).backward()
    assert not leaf.grad.any()  # type: ignore[union-attr]  # and nothing that is no number


@both
def test_embeddings_are_those_the_router_sees(kind: str) -> None:
    for own in clients(kind):
        x = torch.randn(SITE.d_in, generator=torch.Generator().manual_seed(4))
        token, experts = adapter(kind).embeddings(own, "layer", x)
        held = int(own["live/layer"].sum())
        assert experts.shape == (held, RANK)
        _, p, _ = oracle(kind, own, x.double().numpy(), 2, x.double().numpy())
        torch.testing.assert_close(
            torch.softmax(experts @ token / math.sqrt(RANK), 0).double(), torch.from_numpy(p), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["A/s", "B/s", "E/s"])
def test_blocks_join_again(name: str) -> None:
    shape = {"A": (6, 5), "B": (5, 6), "E": (3, 2, 2)}[name[0]]
    tensor = torch.arange(math.prod(shape)).float().view(shape)
    blocks = blocks_of(name, tensor, 2)
    assert len(blocks) == 3
    again = joined(name, blocks)
    assert torch.equal(again, tensor)
    assert again.is_contiguous()
    assert again.data_ptr() != tensor.data_ptr()


@both
def test_a_mixture_is_no_lora_folder(kind: str, tmp_path: Path) -> None:
    made, own = adapter(kind), clients(kind)[0]
    with pytest.raises(RunError, match=r"another matrix for every token.*allowed: `folklora predict`") as caught:
        save_peft(tmp_path / "out", own, made, "base")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="another matrix for every token"):
        made.update(own, "layer")
