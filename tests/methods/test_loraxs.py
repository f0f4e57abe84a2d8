"""LoRA-XS: frozen singular vectors around cores whose mean is exact."""

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


def test_loraxs_lives_between_the_weights_own_singular_vectors(federation: Callable[..., Any]) -> None:
    fed = federation("loraxs")
    for client in fed.clients.values():
        for site in fed.method.context.sites:
            weight = fed.method.context.weight(site.name).double()
            a, b = (client.tensors[f"{factor}/{site.name}"].double() for factor in "AB")
            torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
            # B = U_r and A = Sigma_r V_r^T: then A = B^T W0, and the rows of A have the singular values' lengths.
            torch.testing.assert_close(a, b.T @ weight, atol=1e-5, rtol=0)
            sigma = torch.from_numpy(np.linalg.svd(weight.numpy(), compute_uv=False)[:3])
            torch.testing.assert_close(a.norm(dim=1), sigma, atol=1e-5, rtol=0)


def test_cores_start_tiny_common_and_from_the_seed(context: Callable[..., Any]) -> None:
    method = build("loraxs", {}, context((7, 7)))
    one, other = method.initial("ann"), method.initial("bob")
    moved = build("loraxs", {}, context((7, 7), seed=1)).initial("ann")
    cores = torch.cat([one[f"C/{site.name}"].flatten() for site in method.context.sites])
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert float(cores.std()) == pytest.approx(1e-5, rel=0.3)
    assert not torch.equal(moved["C/layer.0.query"], one["C/layer.0.query"])
    zero = build("loraxs", {"init_std": 0.0}, context()).initial("ann")
    assert not zero["C/layer.0.query"].any()


def test_the_mean_of_cores_is_the_mean_of_updates(federation: Callable[..., Any]) -> None:
    fed = federation("loraxs").begin()
    p = np.array([30, 12, 18]) / 60
    frozen = {key: t.clone() for key, t in fed.clients["ann"].tensors.items() if key[0] in "AB"}
    for round in (1, 2, 3):
        messages = fed.step(round)
        assert {key.partition("/")[0] for key in messages["ann"].tensors} == {"C", "head", "norm"}
        updates = [fed.dense(client.tensors) for client in fed.clients.values()]
        fed.deliver()
        for client in fed.clients.values():
            for got, *own in zip(fed.dense(client.tensors), *updates, strict=True):
                np.testing.assert_allclose(got, np.einsum("k,kij->ij", p, np.stack(own)), atol=1e-5)
            assert all(torch.equal(client.tensors[key], tensor) for key, tensor in frozen.items())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shapes_ranks_and_examples(federation: Callable[..., Any], data: st.DataObject) -> None:
    """Between singular vectors of any shape, up to full rank, the mean of cores is the mean of updates."""
    count = data.draw(st.integers(1, 4))
    rank = data.draw(st.integers(1, 4))
    sides = st.integers(rank, rank + 8)
    sites = tuple(Site(f"layer.{i}", data.draw(sides), data.draw(sides)) for i in range(data.draw(st.integers(1, 2))))
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    weights = {site.name: torch.from_numpy(random.normal(size=(site.d_out, site.d_in))).float() for site in sites}
    examples = [data.draw(st.integers(2, 50)) for _ in range(count)]
    other = {"sites": sites, "weight": weights.__getitem__, "alpha": data.draw(st.floats(0.5, 32))}
    fed = federation("loraxs", ranks=(rank,) * count, examples=examples, **other).begin()
    for site in sites:
        u, sigma, vt = np.linalg.svd(weights[site.name].double().numpy())
        a, b = (fed.clients["ann"].tensors[f"{factor}/{site.name}"].double().numpy() for factor in "AB")
        # Singular vectors have signs, and where singular values are close they may turn: what they span does not.
        np.testing.assert_allclose(b @ a, (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=1e-4)
        np.testing.assert_allclose(b.T @ b, np.eye(rank), atol=1e-5)
    for round in (1, 2):
        fed.step(round)
        updates = [fed.dense(client.tensors) for client in fed.clients.values()]
        fed.deliver()
        for client in fed.clients.values():
            for got, *own in zip(fed.dense(client.tensors), *updates, strict=True):
                mean = np.average(np.stack(own), axis=0, weights=examples)
                np.testing.assert_allclose(got, mean, atol=1e-5 * max(1.0, float(np.abs(mean).max())))
