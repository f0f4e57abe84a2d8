"""DP-SGD for many clients: one example at a time, by Opacus, and as its guarantee wants it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from folklora.adapters.layers import Bank
from folklora.adapters.lowrank import LowRank, Tensors
from folklora.backbones.batch import Batch
from folklora.methods.work import Terms, Work
from folklora.recipe import Recipe
from folklora.sections import TrainSection
from folklora.training import cohort
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Fitted, Job
from folklora.training.prefetch import Prefetch
from folklora.training.private import Private, secret_seed
from folklora.training.stacks import from_stack, plug, stack, to_stack

SEED = 5  # as in conftest
SIZES = (23, 9, 40, 3, 17, 1)
RANKS = (3, 1, 8, 4, 2, 5)
CPU = torch.device("cpu")


def private(jobs: Sequence[Job], clip: float = 0.3, noise: float = 0.7) -> list[Job]:
    """Every client's own secret; clips and noises differ a little."""
    return [replace(job, private=Private(clip * (1 + k / 8), noise, 1000 + k)) for k, job in enumerate(jobs)]


def assert_same(ours: dict[str, Fitted], theirs: dict[str, Fitted], tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for client, fitted in ours.items():
        other = theirs[client]
        assert fitted.steps == other.steps
        assert fitted.loss == pytest.approx(other.loss, rel=tolerance)
        for name, tensor in fitted.tensors.items():
            assert float((tensor - other.tensors[name]).norm()) <= tolerance * float(other.tensors[name].norm()), name


def one_gradient(task: Any, adapter: LowRank, tensors: Tensors, job: Job, i: int) -> Tensors:
    """Of one example's own loss, in shapes of stacks; by a forward pass of that example alone."""
    stacks = stack([tensors], job.rank, CPU)
    leaves = {name: stacks[name].requires_grad_() for name in sorted(job.trained)}
    scales = torch.tensor([adapter.scale(job.rank)])

    def plugged(batch: Batch) -> Bank:
        return plug(adapter, stacks, scales, batch, CPU)

    loss = task.losses(task.lay_out([[job.examples[i]]]), torch.tensor([job.labels[i]]), stacks, plugged)
    return dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))


def one_by_one(task: Any, adapter: LowRank, job: Job, train: TrainSection) -> Tensors:
    """The algorithm as it is written, in float64, with plain gradient steps."""
    assert job.private is not None
    own, clip = job.private, job.private.clip
    n, q = len(job.examples), min(1.0, train.batch_size / len(job.examples))
    noise = own.disturbance()
    names = sorted(job.trained)
    tensors = {name: to_stack(name, job.tensors[name], job.rank).double() for name in names}
    for picks in own.samples(n, train):
        total = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        now = {**job.tensors, **{name: from_stack(name, t, job.rank).float() for name, t in tensors.items()}}
        for i in picks:
            gradient = {name: g[0].double() for name, g in one_gradient(task, adapter, now, job, int(i)).items()}
            length = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
            for name, g in gradient.items():
                total[name] += g * min(1.0, clip / length)
        disturbance = own.draw({name: job.tensors[name].shape for name in names}, noise)
        for name in names:
            disturbed = total[name] + to_stack(name, disturbance[name], job.rank).double()
            tensors[name] -= train.lr * disturbed / (n * q)
    return {name: from_stack(name, tensor, job.rank) for name, tensor in tensors.items()}


# -- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "core", "norm", "packed"),
    [("bert", True, True, "auto"), ("bert", False, False, "never"), ("gpt2", True, True, "auto")],
)
def test_a_cohort_is_one_example_at_a_time(
    world: Callable[..., Any], architecture: str, core: bool, norm: bool, packed: str
) -> None:
    place = world(architecture, core=core, norm=norm)
    jobs = private(place.jobs(SIZES, RANKS))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.2, "batch_size": 6, "local_epochs": 2}
    fitted = place.fit(jobs, packed=packed, cohort=4, **settings)
    for job in jobs:
        expected = one_by_one(place.task, place.adapter, job, TrainSection(**settings))
        for name, tensor in expected.items():
            found = fitted[job.client].tensors[name].double()
            assert float((found - tensor).norm()) <= 2e-5 * float(tensor.norm()), (job.client, name)


def test_a_conversation_is_one_example(tiny_speaker: Path) -> None:
    """Its loss is the mean over its own response tokens, however long other responses are."""
    from folklora.backbones.causal import CausalBackbone, CausalLM, Dialogue

    backbone = CausalBackbone.load(str(tiny_speaker), dtype="float32")
    task, adapter = CausalLM(backbone), LowRank(backbone.sites, True, alpha=8.0)
    rng = np.random.default_rng(0)
    talks = [Dialogue(rng.integers(4, 60, size=n + 3).tolist(), 3) for n in (1, 9, 2, 5, 7, 1)]
    g = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(shape, generator=g) for name, shape in adapter.shapes(2).items()}
    job = Job("a", 1, 2, tensors, frozenset(tensors), talks, np.zeros(6, dtype=np.int64), private=Private(0.1, 0.5, 3))
    train = TrainSection(optimizer="sgd", lr=0.2, batch_size=4)
    (fitted,) = CohortTrainer(task, adapter, train, SEED).fit([job])
    for name, tensor in one_by_one(task, adapter, job, train).items():
        assert float((fitted.tensors[name].double() - tensor).norm()) <= 2e-5 * float(tensor.norm()), name


def test_a_picture_is_one_example_also_where_it_is_told_from_prompts(
    seeing_model: Callable[[str], Path], noise: Callable[..., list[np.ndarray]]
) -> None:
    """With adapters in the text tower the prompts of all classes run once for each example."""
    from folklora.backbones.image_text import ImageText, ImageTextBackbone

    backbone = ImageTextBackbone.load(str(seeing_model("clip")), tower="both", dtype="float32")
    task, adapter = ImageText(backbone, ("w1", "w2 w3", "w4")), LowRank(backbone.sites, True, alpha=8.0)
    g = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(shape, generator=g) for name, shape in adapter.shapes(2).items()}
    examples, labels = task.encode(noise(7)), np.arange(7) % 3
    job = Job("a", 1, 2, tensors, frozenset(tensors), examples, labels, private=Private(0.1, 0.5, 3))
    train = TrainSection(optimizer="sgd", lr=0.2, batch_size=4)
    (fitted,) = CohortTrainer(task, adapter, train, SEED).fit([job])
    for name, tensor in one_by_one(task, adapter, job, train).items():
        assert float((fitted.tensors[name].double() - tensor).norm()) <= 2e-5 * float(tensor.norm()), name


def test_opacus_makes_the_same_of_the_same_samples(world: Callable[..., Any]) -> None:
    """GradSampleModule and DPOptimizer on stock PEFT, with as good as no noise."""
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    place = world("bert")
    (job,) = private(place.jobs((24,), (3,), kinds="A B head"), clip=0.4, noise=1e-9)
    assert job.private is not None
    train = TrainSection(optimizer="sgd", lr=0.3, batch_size=7, local_epochs=2)
    base = AutoModel.from_pretrained(place.folder, attn_implementation="eager").requires_grad_(False)
    names = [site.name for site in place.adapter.sites]
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=place.adapter.alpha, target_modules=names))

    class Stock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model
            self.head = nn.Linear(32, 3)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            states = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
            logits: Tensor = self.head((states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
            return logits

    stock = Stock()
    ours: dict[str, nn.Parameter] = {"head/weight": stock.head.weight, "head/bias": stock.head.bias}
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        ours |= {f"{factor}/{name}": getattr(layer, f"lora_{factor}")["default"].weight for factor in "AB"}
    for name, parameter in ours.items():
        parameter.data.copy_(job.tensors[name])
    for name in place.task.backbone.norms:  # not trained here, and the backbone's own in theirs
        for part in ("weight", "bias"):
            job.tensors[f"norm/{name}.{part}"].copy_(base.get_submodule(name).get_parameter(part))
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = opacus.GradSampleModule(stock.train(), strict=False)  # it looks at nothing in eval mode
        optimizer = DPOptimizer(
            torch.optim.SGD(list(ours.values()), lr=train.lr),
            noise_multiplier=1e-9,
            max_grad_norm=job.private.clip,
            expected_batch_size=7,
        )
        for picks in job.private.samples(24, train):
            assert len(picks)
            rows = [torch.tensor(job.examples[i]) for i in picks]
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            optimizer.zero_grad()
            F.cross_entropy(wrapped(tokens, mask), torch.from_numpy(job.labels[picks])).backward()
            optimizer.step()
    fitted = place.fit([job], optimizer="sgd", lr=0.3, batch_size=7, local_epochs=2)["client-0"]
    for name, parameter in ours.items():
        moved = float((parameter.detach() - job.tensors[name]).norm())
        assert float((fitted.tensors[name] - parameter.detach()).norm()) <= 1e-4 * moved, name


def test_without_limits_it_is_plain_training(world: Callable[..., Any]) -> None:
    """All examples in every step, a clip that nobody reaches, hardly any noise: one batch an epoch, as ever."""
    place = world("bert", core=True, norm=True)
    jobs = place.jobs((20, 7), (3, 5))
    settings: dict[str, Any] = {"batch_size": 64, "local_epochs": 3, "clip": None, "weight_decay": 0.1}
    settings |= {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}
    alike = [replace(job, private=Private(1e6, 1e-14, 1)) for job in jobs]
    assert_same(place.fit(alike, **settings), place.fit(jobs, **settings), 2e-5)


def test_train_clip_is_not_applied_again(world: Callable[..., Any]) -> None:
    place = world("bert")
    jobs = private(place.jobs((20,), (3,)), clip=5.0)
    sgd: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1}
    assert_same(place.fit(jobs, clip=1e-3, **sgd), place.fit(jobs, clip=None, **sgd), 0.0)


def test_terms_see_what_is_private_already(world: Callable[..., Any]) -> None:
    """Masked numbers rest and do not count in an example's norm; a pull comes after the noise."""
    place = world("bert")
    (job,) = place.jobs((12,), (3,), kinds="A B")
    name = min(job.trained)
    mask = torch.zeros_like(job.tensors[name])
    mask[0] = 1.0
    others = {n: torch.zeros_like(job.tensors[n]) for n in job.trained if n != name}
    own = Private(0.05, 0.5, 9)
    sgd: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "batch_size": 64}
    masked = replace(job, private=own, terms=Terms(masks={name: mask, **others}))
    after = place.fit([masked], **sgd)["client-0"].tensors
    assert all(torch.equal(after[n], job.tensors[n]) for n in others)
    assert torch.equal(after[name][1:], job.tensors[name][1:])
    silent = replace(masked, private=replace(own, noise=0.0))
    moved = place.fit([silent], **sgd)["client-0"].tensors[name] - job.tensors[name]
    gradients = [one_gradient(place.task, place.adapter, job.tensors, job, i)[name][0][:1] for i in range(12)]
    mean = sum((g * min(1.0, 0.05 / float(g.norm())) for g in gradients), torch.zeros(1)) / 12
    assert float((moved[:1] + 0.1 * mean).norm()) <= 1e-3 * float(moved.norm())
    pulled = replace(masked, terms=Terms(masks={name: mask}, anchor={name: torch.ones_like(mask)}, proximal=2.0))
    plain = place.fit([replace(masked, terms=Terms(masks={name: mask}))], **sgd)["client-0"].tensors[name]
    difference = place.fit([pulled], **sgd)["client-0"].tensors[name] - plain
    assert torch.allclose(difference, -0.1 * 2.0 * mask * (job.tensors[name] - 1), atol=1e-6)


# -- the guarantee ---------------------------------------------------------------------------------------------------


def test_no_example_moves_a_sum_by_more_than_the_clip(world: Callable[..., Any]) -> None:
    place = world("bert", norm=True)
    (job,) = place.jobs((6,), (3,))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0, "batch_size": 64}

    def sums(keep: int, clip: float) -> Tensor:
        some = replace(job, examples=job.examples[:keep], labels=job.labels[:keep], private=Private(clip, 0.0, 1))
        after = place.fit([some], **settings)["client-0"].tensors
        return torch.cat([((job.tensors[n] - after[n]) * keep).double().flatten() for n in sorted(job.trained)])

    for clip in (1e-3, 0.1):  # less than anyone's gradient
        assert float(sums(1, clip).norm()) == pytest.approx(clip, rel=1e-2)
        for keep in range(1, 6):
            assert float((sums(keep + 1, clip) - sums(keep, clip)).norm()) <= clip * 1.02
    assert float(sums(1, 1e6).norm()) > 0.2


def test_noise_is_gaussian_of_the_promised_size_in_every_trained_number(world: Callable[..., Any]) -> None:
    place = world("bert", core=True, norm=True)
    jobs = place.jobs((30, 4), (3, 8))
    clip, noise = 0.2, 1.7
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0, "batch_size": 10, "local_epochs": 1}
    for job, size in zip(jobs, (10, 4), strict=True):
        last = {}
        for level in (0.0, noise):
            own = replace(job, private=Private(clip, level, 77))
            trainer = CohortTrainer(place.task, place.adapter, TrainSection(**settings), SEED)
            live = cohort._Cohort(trainer, [own, private(place.jobs((5,), (8,)))[0]], 8, [Terms(), Terms()])
            live.step()
            last[level] = live.take(0).tensors
        drawn = torch.cat([(last[noise][n] - last[0.0][n]).flatten() for n in sorted(job.trained)]).double()
        scaled = (drawn * size / (noise * clip)).numpy()
        assert stats.kstest(scaled, "norm").pvalue > 1e-3
        assert scaled.std() == pytest.approx(1.0, abs=5 / np.sqrt(2 * len(scaled)))


def test_opacus_adds_noise_of_the_same_size() -> None:
    opacus = pytest.importorskip("opacus.optimizers")
    parameter = nn.Parameter(torch.zeros(40_000))
    optimizer = opacus.DPOptimizer(
        torch.optim.SGD([parameter], lr=1.0), noise_multiplier=1.3, max_grad_norm=0.5, expected_batch_size=8
    )
    parameter.grad_sample = torch.zeros(3, 40_000)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    optimizer.step()
    own = Private(0.5, 1.3, 4)
    ours = own.draw({"a": torch.Size([40_000])}, own.disturbance())["a"] / 8
    assert float(ours.std()) == pytest.approx(float(parameter.detach().std()), rel=0.02)


def test_samples_are_what_the_accountant_assumes() -> None:
    """Each example in each step with probability q, independently: so sizes are binomial, and some samples empty."""
    train = TrainSection(batch_size=4, local_epochs=3)
    rounds = [Private(1.0, 1.0, seed).samples(40, train) for seed in range(200)]
    assert {len(each) for each in rounds} == {30}
    drawn = np.zeros((200 * 30, 40), dtype=bool)
    for row, picks in zip(drawn, (picks for each in rounds for picks in each), strict=True):
        row[picks] = True
        assert np.array_equal(picks, np.unique(picks))
    rates = drawn.mean(axis=0)
    assert np.abs(rates - 0.1).max() < 5 * np.sqrt(0.09 / len(drawn))
    sizes = np.bincount(drawn.sum(axis=1), minlength=41)
    expected = stats.binom.pmf(np.arange(41), 40, 0.1) * len(drawn)
    head = np.append(sizes[:10], sizes[10:].sum()), np.append(expected[:10], expected[10:].sum())
    assert stats.chisquare(*head).pvalue > 1e-3
    assert sizes[0] > 0
    together = np.corrcoef(drawn.T) - np.eye(40)
    assert np.abs(together).max() < 6 / np.sqrt(len(drawn))


def test_all_examples_are_in_every_step_where_a_batch_holds_them() -> None:
    samples = Private(1.0, 1.0, 3).samples(5, TrainSection(batch_size=8, local_epochs=2))
    assert [picks.tolist() for picks in samples] == [[0, 1, 2, 3, 4]] * 2


def test_an_empty_sample_is_a_step_of_noise(world: Callable[..., Any]) -> None:
    place = world("bert")
    (job,) = private(place.jobs((40,), (3,)), clip=0.5, noise=1.0)
    assert job.private is not None
    train = TrainSection(batch_size=1)
    empty = [len(picks) == 0 for picks in job.private.samples(40, train)]
    assert 5 < sum(empty) < 35
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "batch_size": 1}
    fitted = place.fit([job], **settings)["client-0"]
    assert fitted.steps == 40
    expected = one_by_one(place.task, place.adapter, job, TrainSection(**settings))
    for name, tensor in expected.items():
        assert float((fitted.tensors[name].double() - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_nothing_shows_the_seed() -> None:
    own = Private(1.0, 2.0, 123456789)
    assert "123456789" not in f"{own} {own!r}"
    assert "123456789" not in repr(Job("a", 1, 2, {}, frozenset(), [], np.zeros(0), private=own))


def test_the_secret_decides_over_samples_noise_and_dropout(world: Callable[..., Any]) -> None:
    place = world("bert", dropout=0.3)
    (job,) = private(place.jobs((12,), (3,)))
    assert job.private is not None
    first, second = job.private, replace(job.private, seed=8)
    train = TrainSection(batch_size=4)
    assert any(
        not np.array_equal(a, b) for a, b in zip(first.samples(12, train), second.samples(12, train), strict=True)
    )
    quiet = [replace(job, private=replace(own, noise=0.0)) for own in (first, second)]
    moved = [place.fit([each], batch_size=64)["client-0"].tensors for each in quiet]  # the masks alone differ
    assert any(not torch.allclose(moved[0][name], moved[1][name], atol=1e-5) for name in moved[0])


def test_every_example_has_a_dropout_mask_of_its_own(world: Callable[..., Any]) -> None:
    place = world("bert", dropout=0.5)
    (job,) = place.jobs((1,), (3,))
    quiet = Private(1e6, 0.0, 7)
    once = replace(job, private=quiet)
    twice = replace(once, examples=[*job.examples] * 2, labels=np.repeat(job.labels, 2))
    moved = [place.fit([each], optimizer="sgd", lr=0.1)["client-0"].tensors for each in (once, twice)]
    assert any(not torch.allclose(moved[0][name], moved[1][name], atol=1e-5) for name in moved[0])


def test_other_trainings_have_other_seeds_and_the_same_one_its_own() -> None:
    recipe = lambda *overrides: Recipe.parse({"privacy": {"unit": "example", "noise": 1.0}}, overrides)
    same, idle = recipe(), ("train.cohort=3", "train.tokens=5", "train.packed=never", "train.patience=2")
    tensors = {"A/x": torch.ones(2, 3), "B/x": torch.zeros(3, 2)}
    work = Work(tensors, frozenset(tensors))
    moments = {"m/A/x": torch.zeros(2, 3)}
    seed = secret_seed(1, "a", 1, work, moments, same)
    assert seed == secret_seed(1, "a", 1, replace(work, tensors=dict(reversed(tensors.items()))), moments, same)
    assert seed == secret_seed(1, "a", 1, work, moments, recipe(*idle))
    nudged = {**tensors, "A/x": tensors["A/x"] + 1e-6}
    others = {
        secret_seed(2, "a", 1, work, moments, same),
        secret_seed(1, "b", 1, work, moments, same),
        secret_seed(1, "a", 2, work, moments, same),
        secret_seed(1, "a", 1, replace(work, branch="personal"), moments, same),
        secret_seed(1, "a", 1, replace(work, tensors=nudged), moments, same),
        secret_seed(1, "a", 1, replace(work, trained=frozenset({"A/x"})), moments, same),
        secret_seed(1, "a", 1, replace(work, terms=Terms(rate=0.5)), moments, same),
        secret_seed(1, "a", 1, replace(work, terms=Terms(correction=tensors)), moments, same),
        secret_seed(1, "a", 1, replace(work, terms=Terms(masks=tensors)), moments, same),
        secret_seed(1, "a", 1, work, {}, same),
        secret_seed(1, "a", 1, work, moments, recipe("train.lr=0.5")),
        secret_seed(1, "a", 1, work, moments, recipe("privacy.clip=2.0")),
        secret_seed(1, "a", 1, work, moments, recipe("privacy.noise=2.0")),
        secret_seed(1, "a", 1, work, moments, recipe("adapter.dropout=0.1")),
        seed,
    }
    assert len(others) == 15
    assert 2**96 < max(others) < 2**128  # of fewer bits, whoever knows the gradients could try them all


# -- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_neither_the_cohort_nor_the_order_nor_the_layout_nor_the_parts_matter(
    world: Callable[..., Any], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world("bert", core=True, norm=True, dropout=dropout)
    jobs = private(place.jobs(SIZES, RANKS))
    # Plain steps: what Adam makes of the rounding of a gradient that is noise alone is as large as the step.
    run = lambda jobs, **train: place.fit(jobs, local_epochs=2, optimizer="sgd", lr=0.1, **train)
    alone = {client: fitted for job in jobs for client, fitted in run([job]).items()}
    assert_same(run(jobs, cohort=3), alone)
    assert_same(run(jobs[::-1], cohort=6, packed="never"), alone)
    monkeypatch.setattr(cohort, "NUMBERS", 40_000)  # a few examples a part
    assert_same(run(jobs, cohort=6), alone)
    monkeypatch.setattr(cohort, "NUMBERS", 1)
    assert_same(run(jobs, cohort=4), alone)


def test_nothing_depends_on_what_is_laid_out_ahead(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    place = world("bert", dropout=0.2)
    jobs = private(place.jobs(SIZES, RANKS))
    plain = place.fit(jobs, cohort=3)
    monkeypatch.setattr(cohort, "Prefetch", lambda device: Prefetch(device, always=True))
    assert_same(place.fit(jobs, cohort=3), plain, 0.0)


def test_a_run_that_is_repeated_is_the_same_in_every_bit(world: Callable[..., Any]) -> None:
    place = world("bert", core=True, dropout=0.2)
    jobs = private(place.jobs(SIZES, RANKS))
    first, second = (place.fit(jobs, cohort=3, optimizer_state="kept") for _ in range(2))
    for client, fitted in first.items():
        for name, tensor in {**fitted.tensors, **fitted.moments}.items():
            assert torch.equal(tensor, {**second[client].tensors, **second[client].moments}[name])


def test_trouble_stays_at_home(world: Callable[..., Any]) -> None:
    place = world("bert")
    jobs = private(place.jobs((12, 12, 12), (3, 3, 3)))
    well = place.fit([jobs[0], jobs[2]], cohort=2)
    jobs[1].tensors["head/weight"].fill_(float("inf"))
    found = place.fit(jobs, cohort=3)
    assert not np.isfinite(found.pop("client-1").loss)
    assert_same(found, well)
