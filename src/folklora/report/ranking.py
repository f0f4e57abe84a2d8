"""Who is ahead over many settings, and who is only ahead by chance.

Scores on different data sets do not add up; ranks do. Each (setting, seed) is a block in which all methods saw the
same clients, the same examples and the same starting values, so whatever compares methods compares them within blocks.

- `complete`: the methods and blocks among which nothing is missing, since a rank among fewer is another rank.
- `ranking`: mean ranks with a two-level bootstrap over settings and, within them, seeds; who is level with the first.
- `honest_difference`: Tukey's, from how methods and blocks scatter together: of scores over the seeds of one
  setting, or of ranks over settings.
- `critical_difference`: Nemenyi's, as in Demsar (JMLR 7, 2006), for comparison: how far ranks would lie apart by chance
  if no method were better in any setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

Result = tuple[str, str, int]
"""Method, setting, seed."""


@dataclass(frozen=True)
class Scores:
    """A complete design: every method in every block.

    Attributes
    ----------
    methods
        The M methods, in the order they were given.
    settings, seeds
        Of each of the B blocks.
    values
        [B, M]; larger is better, so of losses their merits (`folklora.backbones.metric.Metric.merit`).
    left_out
        Methods, and how many blocks, that would have left holes.
    """

    methods: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    left_out: tuple[tuple[str, ...], int]


@dataclass(frozen=True)
class Ranked:
    """A method's mean rank (1 is best), its interval, and whether it is *level* with the first, as far as one can tell.

    ``low`` and ``high`` are None where a single block leaves nothing to resample; then nobody is told from anybody.
    """

    method: str
    mean: float
    low: float | None
    high: float | None
    level: bool


def complete(results: Mapping[Result, float]) -> Scores:
    """The methods and blocks among which nothing is missing.

    Whatever has the largest share of holes goes first, a block rather than a method: so a method that has hardly been
    run is left out, and so is a block that is only begun.
    """
    methods = list(dict.fromkeys(method for method, _, _ in results))
    blocks = list(dict.fromkeys((setting, seed) for _, setting, seed in results))
    values = np.array([[results.get((m, *b), math.nan) for m in methods] for b in blocks]).reshape(len(blocks), -1)
    kept, rows = list(range(len(methods))), list(range(len(blocks)))
    while (holes := np.isnan(values[np.ix_(rows, kept)])).any():
        by_block, by_method = holes.mean(axis=1), holes.mean(axis=0)
        if by_method.max() > by_block.max():
            kept.pop(_last_argmax(by_method))
        else:
            rows.pop(_last_argmax(by_block))
    return Scores(
        tuple(methods[i] for i in kept),
        tuple(blocks[i][0] for i in rows),
        tuple(blocks[i][1] for i in rows),
        values[np.ix_(rows, kept)],
        (tuple(m for i, m in enumerate(methods) if i not in kept), len(blocks) - len(rows)),
    )


def _last_argmax(values: np.ndarray) -> int:
    return len(values) - 1 - int(np.argmax(values[::-1]))


def mean_ranks(scores: Scores) -> np.ndarray:
    """[M]: rank within each block (ties share theirs), mean over seeds, then over settings."""
    ranks: np.ndarray = _even_weights(scores) @ _ranks(scores)
    return ranks


def ranking(scores: Scores, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0) -> list[Ranked]:
    """Methods by mean rank, with intervals.

    A resample draws settings with replacement and, within each that was drawn, its seeds: the same blocks for every
    method. The interval holds the middle of a method's resampled mean ranks. With few settings it is too narrow: a
    resample of three things cannot hold a fourth. *Level* is therefore not read off the intervals, nor one method at a
    time, where among many some would be called behind for having been looked at: it is whoever is behind the first by
    no more than `rank_difference`.
    """
    ranks, mean = _ranks(scores), mean_ranks(scores)
    order = np.argsort(mean, kind="stable")
    bound = rank_difference(scores, 1 - confidence)
    if bound is None:
        return [Ranked(scores.methods[i], float(mean[i]), None, None, True) for i in order]
    drawn = _resampled_weights(scores, resamples, np.random.default_rng(seed)) @ ranks
    low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2), axis=0)
    level = mean - mean[order[0]] <= bound + 1e-9
    return [Ranked(scores.methods[i], float(mean[i]), float(low[i]), float(high[i]), bool(level[i])) for i in order]


def rank_difference(scores: Scores, alpha: float = 0.05) -> float | None:
    """`honest_difference` of mean ranks: settings are the blocks, or the seeds of a single setting.

    None for fewer than two blocks or methods.
    """
    ranks, groups = _ranks(scores), _blocks_of(scores)
    return honest_difference(
        np.stack([ranks[each].mean(axis=0) for each in groups]) if len(groups) > 1 else ranks, alpha
    )


def _ranks(scores: Scores) -> np.ndarray:
    ranks: np.ndarray = stats.rankdata(-scores.values, axis=1)
    return ranks


def _blocks_of(scores: Scores) -> list[np.ndarray]:
    """For each setting the indices of its blocks."""
    settings = np.array(scores.settings)
    return [np.flatnonzero(settings == name) for name in dict.fromkeys(scores.settings)]


def _even_weights(scores: Scores) -> np.ndarray:
    """[B]: every setting counts the same, however many of its seeds are done."""
    weights = np.zeros(len(scores.values))
    groups = _blocks_of(scores)
    for blocks in groups:
        weights[blocks] = 1 / (len(blocks) * len(groups))
    return weights


def _resampled_weights(scores: Scores, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """[resamples, B]: how much each block counts in each resample."""
    weights = np.zeros((resamples, len(scores.values)))
    groups = _blocks_of(scores)
    for _ in groups:
        drawn = generator.integers(len(groups), size=resamples)
        for index, blocks in enumerate(groups):
            count = len(blocks)
            here = np.flatnonzero(drawn == index)
            seeds = generator.multinomial(count, np.full(count, 1 / count), size=len(here))
            weights[np.ix_(here, blocks)] += seeds / (count * len(groups))
    return weights


def critical_difference(methods: int, blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's: mean ranks that differ by less do not differ, all pairs considered at once.

    Raises
    ------
    ValueError
        For fewer than two methods or no block.
    """
    if methods < 2 or blocks < 1:
        raise ValueError(f"{methods} methods in {blocks} blocks; allowed: at least two methods and one block")
    q = _studentized_range(1 - alpha, methods, math.inf) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def friedman(scores: Scores) -> float | None:
    """The probability of ranks this far apart if all methods were alike; settings are the blocks, seeds are averaged.

    None for fewer than three methods or two settings.
    """
    means = np.stack([scores.values[blocks].mean(axis=0) for blocks in _blocks_of(scores)])
    if min(means.shape[0] - 1, means.shape[1] - 2) < 1:
        return None
    return float(stats.friedmanchisquare(*means.T).pvalue)


def honest_difference(values: np.ndarray, alpha: float = 0.05) -> float | None:
    """Tukey's honestly significant difference between the means of two methods, all pairs considered at once.

    The scatter is what a method and a block do not explain each by itself, taken to be alike for all methods. For two
    methods it is the paired t-test.

    Parameters
    ----------
    values
        [blocks, methods].

    Returns
    -------
    float or None
        None for fewer than two blocks or methods.
    """
    blocks, methods = values.shape
    if blocks < 2 or methods < 2:
        return None
    residual = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    freedom = (blocks - 1) * (methods - 1)
    scatter = math.sqrt(float((residual**2).sum()) / freedom)
    return _studentized_range(1 - alpha, methods, freedom) * scatter / math.sqrt(blocks)


@cache  # scipy integrates for half a second
def _studentized_range(probability: float, methods: int, freedom: float) -> float:
    return float(stats.studentized_range.ppf(probability, methods, freedom))
