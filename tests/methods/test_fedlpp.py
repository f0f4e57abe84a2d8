"""FedLPP against a by-hand quantiser and against FedIT, and what a run's summary calls whose quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from folklora.adapters.lowrank import Site, Tensors
from folklora.errors import RecipeError
from folklora.federation.codec import decode, encode
from folklora.federation.local import LocalEngine
from folklora.federation.rounds import Rounds, Silent
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.methods import build, check_options
from folklora.methods.contract import Context, Message
from folklora.quantization import levels
from folklora.training.prediction import Question, predict

# QLoRA's own table [arXiv 2305.14314, appendix E].
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634]
NF4 += [0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
GRIDS = {1.0: "ternary", 1.5: "ternary", 2.0: "nf2", 3.0: "nf3", 4.0: "nf4", 8.0: "nf8"}


def by_hand(tensor: Tensor, grid: Sequence[float], block: int) -> Tensor:
    """Number by number, in float64."""
    flat, out = tensor.flatten().double().tolist(), []
    for start in range(0, len(flat), block):
        own = flat[start : start + block]
        c = max(abs(v) for v in own) or 1.0
        out += [c * min(grid, key=lambda level: abs(v / c - level)) for v in own]
    return torch.tensor(out).float().view(tensor.shape)


def test_the_grids() -> None:
    torch.testing.assert_close(levels("nf4"), torch.tensor(NF4), rtol=0, atol=1e-6)
    assert levels("ternary").tolist() == [-1, 0, 1]
    for bits in (2, 3, 4, 8):
        found = levels(f"nf{bits}")
        assert len(found) == 2**bits
        assert bool((found.diff() > 0).all())
        assert (float(found[0]), float(found[-1]), float(found[2 ** (bits - 1) - 1])) == (-1.0, 1.0, 0.0)


@pytest.mark.parametrize("bits", sorted(GRIDS))
@pytest.mark.parametrize("block", [7, 64])
def test_what_a_client_gets_is_the_servers_model_quantised(
    federation: Callable[..., Any], bits: float, block: int
) -> None:
    fed = federation("fedlpp", {"bits": bits, "block": block}).begin()
    grid = levels(GRIDS[bits]).tolist()
    for round in (1, 2):
        fed.step(round)
        fed.deliver()
        for client in fed.clients.values():
            for name, tensor in client.tensors.items():
                full = fed.state[f"global/{name}"]
                want = full if tensor.dim() < 2 else by_hand(full, grid, block)
                torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-9)


def test_clients_start_from_a_coarse_copy_of_the_common_start(federation: Callable[..., Any]) -> None:
    fed, plain = federation("fedlpp", {"bits": 2}), federation("fedit")
    for name, tensor in fed.clients["ann"].tensors.items():
        want = plain.clients["ann"].tensors[name]
        torch.testing.assert_close(tensor, by_hand(want, levels("nf2").tolist(), 64), rtol=1e-6, atol=1e-9)
        assert torch.equal(tensor, fed.clients["bob"].tensors[name])


def test_the_server_keeps_a_sketched_head_whole(federation: Callable[..., Any]) -> None:
    """S after the first round is S before it plus what clients moved from their copy: nothing of S is forgotten."""
    fed = federation("fedlpp", {"bits": 2.0, "head_start": "sketched"}).begin()
    start, held = fed.state["start/head/weight"].double(), fed.clients["ann"].tensors["head/weight"].double()
    assert (start - held).abs().max() > 0.01
    messages = fed.step(1)
    mean = np.average([m.tensors["head/weight"].double() for m in messages.values()], axis=0, weights=[30, 12, 18])
    np.testing.assert_allclose(fed.state["global/head/weight"], start + torch.from_numpy(mean) - held, atol=1e-5)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_server_moves_by_what_clients_moved(federation: Callable[..., Any], rate: float) -> None:
    """S_t+1 = S_t + eta (mean C - D) in float64, S in full precision from the start."""
    fed = federation("fedlpp", {"bits": 3, "block": 16, "server_rate": rate}).begin()
    s = {n: t.double() for n, t in federation("fedit").clients["ann"].tensors.items()}
    p = torch.tensor([30.0, 12.0, 18.0], dtype=torch.float64) / 60
    for round in (1, 2, 3):
        d = {n: t.double() for n, t in fed.clients["ann"].tensors.items()}
        messages = fed.step(round)
        c = {n: sum(w * m.tensors[n].double() for w, m in zip(p, messages.values(), strict=True)) for n in s}
        s = {n: s[n] + rate * (c[n] - d[n]) for n in s}
        for name, tensor in s.items():
            torch.testing.assert_close(fed.state[f"global/{name}"].double(), tensor, rtol=1e-4, atol=1e-5)
        fed.deliver()


@pytest.mark.parametrize(("options", "tolerance"), [({"block": 1, "bits": 1.5}, 1e-6), ({"bits": 8, "block": 8}, 0.05)])
def test_in_the_limit_it_is_fedit(federation: Callable[..., Any], options: dict[str, Any], tolerance: float) -> None:
    """With a scale a number nothing is lost at all; with 8 bits little is."""
    fed, plain = federation("fedlpp", options).begin(), federation("fedit").begin()
    for round in (1, 2, 3):
        for each in (fed, plain):
            each.step(round)
            each.deliver()
        for name, tensor in plain.clients["bob"].tensors.items():
            gap = torch.linalg.norm(fed.clients["bob"].tensors[name] - tensor)
            assert float(gap) <= tolerance * float(torch.linalg.norm(tensor)) + 1e-9


def test_a_download_depends_on_the_state_alone_and_loses_nothing_twice(federation: Callable[..., Any]) -> None:
    fed = federation("fedlpp", {"bits": 2, "block": 5}).begin()
    fed.step(1)
    reply = fed.method.reply(fed.state, "ann")
    for common in ("float32", "float16", "int8"):
        arrived = decode(encode(reply, common))
        for name, tensor in reply.tensors.items():
            if tensor.dim() > 1:  # sent by its own encoding, whatever the recipe says
                assert torch.equal(arrived.tensors[name], tensor)
    before = fed.snapshot()
    fed.deliver()
    once = fed.snapshot()
    fed.deliver()
    assert all(torch.equal(once[c][n], t) for c, tensors in fed.snapshot().items() for n, t in tensors.items())
    assert before.keys() == once.keys()


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(5, 30), st.integers(5, 30), st.sampled_from(sorted(GRIDS)), st.integers(1, 99))
def test_the_server_forgets_nothing_that_it_does_not_send(
    rank: int, d_in: int, d_out: int, bits: float, block: int
) -> None:
    """Clients that did not move leave S as it is, however coarse D."""
    context = Context(
        seed=0, ranks={"a": rank, "b": rank}, sites=(Site("x", d_in, d_out),), alpha=1.0, dropout=0.0, classes=3,
        width=4, head={"head/weight": (3, 4), "head/bias": (3,)}, norms={}, rounds=2, learning_rate=1e-2,
        batch_size=1, local_epochs=1, optimizer="adamw", weight=lambda site: torch.zeros(d_out, d_in),
    )  # fmt: skip
    method = build("fedlpp", {"bits": bits, "block": block}, context)
    plain = build("fedit", {}, context).initial("a")
    state: Tensors = {}
    held = method.initial("a")
    for round in (1, 2):
        message = Message({n: held[n] for n in method.expected(round, state, "a")}, {"examples": 3.0})
        state = method.server(round, state, {"a": message, "b": message})
        for name, tensor in plain.items():
            torch.testing.assert_close(state[f"global/{name}"], tensor, rtol=1e-5, atol=1e-7)
        held = decode(encode(method.reply(state, "a"))).tensors


def test_fewer_bits_come_down(federation: Callable[..., Any]) -> None:
    sizes = []
    for bits in (8, 4, 3, 2, 1.5):
        fed = federation("fedlpp", {"bits": bits}).begin()
        fed.step(1)
        sizes.append(len(encode(fed.method.reply(fed.state, "ann"))))
        assert len(encode(fed.method.typical_reply(1, "ann"))) == sizes[-1]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 5}, "bits = 5; allowed: 1, 1.5, 2, 3, 4, 8"),
        ({"block": 0}, "method.block = 0"),
        ({"block": 70000}, "method.block = 70000"),
        ({"server_rate": 0}, "method.server_rate = 0"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as caught:
        check_options("fedlpp", options)
    assert "\n" not in str(caught.value)


def test_whose_quality_a_summary_tells(tiny_recipe: Any, tmp_path: Any) -> None:
    """accuracy_global: S on the common test set; accuracy_mean: D on each client's; accuracy_tuned_mean: C_k there."""
    recipe = tiny_recipe("method.name=fedlpp", "method.bits=1.5", "method.block=4096", "train.rounds=3")
    setup = prepare(recipe)
    engine = LocalEngine(setup)
    rounds = Rounds(
        setup,
        RunDirectory.create(tmp_path / "run", recipe, "{}"),
        engine,
        list(setup.data.splits),
        Silent(),
    )
    row = rounds.play()["row"]

    def accuracy(tensors: Tensors, examples: Any, labels: Any) -> float:
        logits = predict(setup.task, setup.method.adapter, [Question("x", 4, tensors, examples)])["x"]
        return float((np.argmax(logits, 1) == labels).mean())

    common = {n.removeprefix("global/"): t for n, t in rounds.state.items() if n.startswith("global/")}
    assert row["accuracy_global"] == accuracy(common, setup.test_encoded, setup.data.test.labels)
    held = {n: by_hand(t, levels("ternary").tolist(), 4096) if t.dim() > 1 else t for n, t in common.items()}
    coarse, tuned = [], []
    for client, member in engine.members.items():
        examples, labels = setup.examples(setup.data.splits[client].test)
        coarse.append(accuracy(held, examples, labels))
        tuned.append(accuracy(member.client.tensors, examples, labels))
    assert row["accuracy_mean"] == pytest.approx(np.mean(coarse))
    assert row["accuracy_tuned_mean"] == pytest.approx(np.mean(tuned))
    assert len({round(x, 6) for x in (row["accuracy_global"], row["accuracy_mean"], row["accuracy_tuned_mean"])}) == 3
