"""What a method's traffic is said to be, against formulas by hand and against real messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from folklora.federation.traffic import describe_methods, per_round
from folklora.methods import METHODS, describe_options

# Numbers of one adapted layer that a client sends a round, by the papers; RoLoRA alternates, so half of both.
FORMULAS: dict[str, Callable[[int, int, int], float]] = {
    "local": lambda d_in, d_out, r: 0,
    "sketch": lambda d_in, d_out, r: 0,
    "fedit": lambda d_in, d_out, r: r * (d_in + d_out),
    "ffa": lambda d_in, d_out, r: r * d_out,
    "fedsa": lambda d_in, d_out, r: r * d_in,
    "rolora": lambda d_in, d_out, r: r * (d_in + d_out) / 2,
    "fedawa": lambda d_in, d_out, r: r * (d_in + d_out),
    "fedlpp": lambda d_in, d_out, r: r * (d_in + d_out),
    "ditto": lambda d_in, d_out, r: r * (d_in + d_out),
    "apfl": lambda d_in, d_out, r: r * (d_in + d_out),
    "lorafair": lambda d_in, d_out, r: r * (d_in + d_out),
    "flora": lambda d_in, d_out, r: r * (d_in + d_out),
    "fedex": lambda d_in, d_out, r: r * (d_in + d_out),
    "federa": lambda d_in, d_out, r: r * (d_in + d_out),
    "loraxs": lambda d_in, d_out, r: r * r,
    "fedsb": lambda d_in, d_out, r: r * r,
    "ravan": lambda d_in, d_out, r: min(4, min(d_in, d_out) // r) * r * r,
    "zeropad": lambda d_in, d_out, r: r * (d_in + d_out),
    "replication": lambda d_in, d_out, r: r * (d_in + d_out),
    "hetlora": lambda d_in, d_out, r: r * (d_in + d_out) + 1,  # the rank
    "hafl": lambda d_in, d_out, r: r * (d_in + d_out) + r,  # and which pairs
    # The shared expert and six others, W_t, and the embeddings of tokens and of the six.
    "fedamole": lambda d_in, d_out, r: 7 * r * (d_in + d_out) + r * d_in + r + 6 * r,
    "feddm": lambda d_in, d_out, r: 0,  # what it sends is data, and of no layer
    "celora": lambda d_in, d_out, r: r * r,
    "folklora": lambda d_in, d_out, r: r * r,
}
DTYPES = ("float32", "float16", "bfloat16", "int8")


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(384, 384, 8), (384, 1536, 8), (4096, 1024, 16), (5, 3, 1)])
def test_bytes_per_layer_are_the_formulas(d_in: int, d_out: int, rank: int) -> None:
    described = {row["name"]: row for row in describe_methods(d_in, d_out, rank, clients=1)}
    assert list(described) == list(METHODS)
    for name, formula in FORMULAS.items():
        assert described[name]["bytes_per_layer_up"] == 4 * formula(d_in, d_out, rank)
        if name not in {"rolora", "fedlpp"}:
            up_only = {"hetlora": 1, "fedamole": 7 * rank}.get(name, 0)
            assert described[name]["bytes_per_layer_down"] == 4 * (formula(d_in, d_out, rank) - up_only)


def test_a_coarse_copy_comes_down_at_its_own_bits() -> None:
    """Four bits a number and a scale for 64; the form says its grid and block in three bytes."""
    described = {row["name"]: row for row in describe_methods(20, 30, 4)}
    assert described["fedlpp"]["bytes_per_layer_up"] == 4 * 4 * (20 + 30)
    assert described["fedlpp"]["bytes_per_layer_down"] == (3 + 40 + 4 * 2) + (3 + 60 + 4 * 2)


def test_rolora_hears_of_both_factors_once_both_are_known() -> None:
    """One factor goes up; a reply holds what the server has: B after the first round, both from then on."""
    described = {row["name"]: row for row in describe_methods(20, 30, 4)}
    assert described["rolora"]["bytes_per_layer_up"] == 4 * 4 * (20 + 30) / 2
    assert described["rolora"]["bytes_per_layer_down"] == 4 * 4 * (30 + 20 + 30) / 2


def test_what_is_said_in_words() -> None:
    described = {row["name"]: row for row in describe_methods(384, 384, 8)}
    travels = {name: row["travels"] for name, row in described.items()}
    assert travels == {
        "local": [],
        "sketch": [],
        "fedit": ["A", "B", "head"],
        "ffa": ["B", "head"],
        "fedsa": ["A"],
        "rolora": ["A", "B", "head"],
        "fedawa": ["A", "B", "head"],
        "fedlpp": ["A", "B", "head"],
        "ditto": ["A", "B", "head"],
        "apfl": ["A", "B", "head"],
        "lorafair": ["A", "B", "head"],
        "flora": ["A", "B", "head"],
        "fedex": ["A", "B", "head"],
        "federa": ["A", "B", "head"],
        "loraxs": ["C", "head"],
        "fedsb": ["C", "head"],
        "ravan": ["H", "head"],
        "zeropad": ["A", "B", "head"],
        "replication": ["A", "B", "head"],
        "hetlora": ["A", "B", "head", "index"],
        "hafl": ["A", "B", "head", "index"],
        "haflq": ["A", "B", "head", "index"],
        "fedamole": ["A", "B", "T", "embedding", "head", "token"],
        "feddm": ["condensed", "index"],
        "fedaf": ["condensed", "index", "logits", "soft"],
        "celora": ["C"],
        "folklora": ["C"],
    }
    once = {name: row["once"] for name, row in described.items() if row["once"]}
    assert once == {
        "sketch": "class statistics",
        "fedsb": "weight gradients",
        "feddm": "class counts",
        "fedaf": "class counts",
        "celora": "class mixtures",
        "folklora": "class statistics",
    }
    for name, row in described.items():
        assert row["title"] == METHODS[name].title
        assert row["global_model"] == METHODS[name].has_global_model
        assert row["mixed_ranks"] == METHODS[name].mixed_ranks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [None, "shared", "private", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_the_forecast_of_a_round_is_what_real_messages_weigh(
    federation: Callable[..., Any], name: str, head: str | None, dtype: str
) -> None:
    """Mean of the first two rounds, whole bytes: the client of each rank, up and down."""
    if METHODS[name].needs_head and head is not None:
        return
    ranks = (2, 5, 3) if METHODS[name].mixed_ranks else (3, 3, 3)
    options = {} if head in {None, "none"} else {"head": head, "head_start": "zero"}
    # How many experts a client gets follows from its data; what is foretold is an even spread.
    options |= {"min_experts": 6, "max_experts": 6} if name == "fedamole" else {}
    fed = federation(name, options, ranks=ranks, headless=head == "none").begin()
    silent = name in {"local", "sketch"} and head != "shared"
    for client, weighed in fed.weigh(dtype).items():
        counts = torch.bincount(fed.clients[client].data.train[1], minlength=fed.method.context.classes)
        assert per_round(fed.method, client, dtype, counts) == weighed
        assert (weighed.up == 0) == (weighed.down == 0) == silent


def test_a_core_costs_the_same_whatever_the_layer() -> None:
    small, large = ({row["name"]: row["bytes_per_layer_up"] for row in describe_methods(d, d, 8)} for d in (16, 4096))
    assert small["celora"] == large["celora"] == 256
    assert large["fedit"] == 256 * small["fedit"]


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_told_in_words(name: str) -> None:
    """What combines with a method and nothing else, each with what is allowed and its default."""
    told = {option["key"]: option for option in describe_options(name)}
    assert ("method.proximal" in told) == ("proximal" in METHODS[name].combines)
    only = {"sketch": '"sketched"', "feddm": '"shared"', "fedaf": '"shared"'}
    heads = only.get(name, '"private" | "shared" | "sketched"')
    assert told["method.head"]["allowed"] == heads
    assert all(option["allowed"] and "typing" not in option["allowed"] for option in told.values())
    if name in {"celora", "folklora"}:
        assert told["method.lambda"]["allowed"] == "number, >= 0, <= 1"
        assert told["method.similarity"]["default"] == {"celora": '"both"', "folklora": '"size"'}[name]


@pytest.mark.parametrize("name", ["flora", "fedex"])
@pytest.mark.parametrize("clients", [1, 3, 10])
def test_what_stacks_all_factors_comes_down_that_many_times(name: str, clients: int) -> None:
    described = {row["name"]: row for row in describe_methods(200, 300, 4, clients)}
    assert described[name]["bytes_per_layer_up"] == 4 * 4 * (200 + 300)
    assert described[name]["bytes_per_layer_down"] == clients * 4 * 4 * (200 + 300)
    assert described["fedit"]["bytes_per_layer_down"] == 4 * 4 * (200 + 300)
