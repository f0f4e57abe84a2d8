"""FeDeRA starts from the frozen weights' singular vectors; judged by NumPy's SVD and by PEFT's PiSSA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.adapters.lowrank import Site
from folklora.methods import build


@pytest.mark.parametrize("alpha", [1.0, 6.0, 16.0])
def test_the_adapter_holds_the_principal_part_and_the_base_the_rest(
    federation: Callable[..., Any], alpha: float
) -> None:
    fed = federation("federa", alpha=alpha)
    for client in fed.clients.values():
        for i, site in enumerate(fed.method.context.sites):
            weight = fed.method.context.weight(site.name).double().numpy()
            u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
            a, b = (client.tensors[f"{factor}/{site.name}"].double().numpy() for factor in "AB")
            leading = (u[:, :3] * sigma[:3]) @ vt[:3]
            np.testing.assert_allclose(alpha / 3 * b @ a, leading, atol=1e-5)
            # What stays frozen is the rest of W0: its leading singular value is W0's fourth.
            frozen = weight + client.tensors[f"base/{site.name}"].double().numpy()
            assert np.linalg.norm(frozen, 2) == pytest.approx(sigma[3], rel=1e-5)
            assert np.abs(fed.dense(client.tensors)[i]).max() < 1e-6
            # Neither factor takes more of the singular values than the other.
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_rank_and_scale(context: Callable[..., Any], data: st.DataObject) -> None:
    """Wide, tall and square weights, up to full rank, of full rank or not."""
    d_in, d_out = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    rank, alpha = data.draw(st.integers(1, min(d_in, d_out))), data.draw(st.floats(0.1, 64))
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    inner = data.draw(st.integers(1, min(d_in, d_out)))
    weight = random.normal(size=(d_out, inner)) @ random.normal(size=(inner, d_in))
    frozen = torch.from_numpy(weight).float()
    made = context((rank, rank), sites=(Site("layer", d_in, d_out),), alpha=alpha, weight=lambda site: frozen, norms={})
    tensors = build("federa", {}, made).initial("bob")
    a, b, base = (tensors[f"{name}/layer"].double().numpy() for name in ("A", "B", "base"))
    assert (a.shape, b.shape) == ((rank, d_in), (d_out, rank))
    update, size = alpha / rank * b @ a, max(1.0, float(np.linalg.norm(weight)))
    np.testing.assert_allclose(update + base, 0, atol=1e-5 * size)
    # Eckart and Young: no matrix of this rank is nearer to the weight.
    rest = np.linalg.svd(weight, compute_uv=False)[rank:]
    assert np.linalg.norm(weight - update) == pytest.approx(np.linalg.norm(rest), abs=1e-5 * size)
    assert np.linalg.matrix_rank(update, tol=1e-4 * size) <= rank


def test_the_start_is_pefts_pissa_but_for_signs(context: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    made = context()
    tensors = build("federa", {}, made).initial("ann")
    for site in made.sites:
        model = nn.Sequential()
        model.add_module("layer", nn.Linear(site.d_in, site.d_out, bias=False))
        with torch.no_grad():
            model.layer.weight.copy_(made.weight(site.name))
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights="pissa")
        layer = get_peft_model(model, config).get_submodule("base_model.model.layer")
        theirs = layer.lora_B["default"].weight.T[:, :, None] * layer.lora_A["default"].weight[:, None, :]
        ours = tensors[f"B/{site.name}"].T[:, :, None] * tensors[f"A/{site.name}"][:, None, :]
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
        frozen = made.weight(site.name) + tensors[f"base/{site.name}"]
        torch.testing.assert_close(frozen, layer.base_layer.weight.detach(), rtol=1e-4, atol=1e-5)


def test_federa_aggregates_as_fedit_and_the_base_never_travels(federation: Callable[..., Any]) -> None:
    fed, plain = federation("federa").begin(), federation("fedit").begin()
    bases = {key: t for key, t in fed.clients["ann"].tensors.items() if key.startswith("base/")}
    assert len(bases) == 2
    for round in (1, 2):
        fed.train(round)
        messages = fed.messages(round)
        fed.state = fed.method.server(round, fed.state, messages)
        plain.state = plain.method.server(round, plain.state, messages)
        reply, same = fed.method.reply(fed.state, "ann").tensors, plain.method.reply(plain.state, "ann").tensors
        assert list(reply) == list(same)
        assert all(torch.equal(tensor, same[key]) for key, tensor in reply.items())
        fed.deliver()
    for client in fed.clients.values():
        assert all(torch.equal(client.tensors[key], tensor) for key, tensor in bases.items())
