"""The likelihood-ratio attack: is this confidence more like that of models that saw the example, or of those that did
not? arXiv 2112.03570 (Carlini et al., S&P 2022).

1. Confidence p of the true label, scaled to ``phi = log(p / (1 - p))``, which is about normal [paper].
2. Online: shadow models with and without the example; the score is the log ratio of the two normal densities [paper].
3. Offline: shadow models without it alone; the score is how far above their mean phi lies, in their deviations [paper:
  the normal distribution function of it, which orders examples alike].
4. With few shadows the deviation is that of all examples together, per side [paper: below 64 models].
"""

from __future__ import annotations

import numpy as np

OWN_DEVIATION = 64
"""Shadow models from which each example has deviations of its own [paper]."""


def scaled(confidence_log: np.ndarray, others_log: np.ndarray) -> np.ndarray:
    """phi from ``log p`` and ``log (1 - p)``."""
    return confidence_log - others_log


def online(target: np.ndarray, shadows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Log likelihood ratios [n], larger for members.

    Parameters
    ----------
    target
        [n]: phi of the attacked model.
    shadows
        [S, n]: phi of the shadow models.
    seen
        [S, n] bool: which shadow trained on which example. An example that all or none saw takes the other side's mean
        to be as far away as it is on average.
    """
    mean_in, mean_out = _mean(shadows, seen), _mean(shadows, ~seen)
    apart = np.nanmean(mean_in - mean_out)
    mean_in = np.where(np.isnan(mean_in), mean_out + apart, mean_in)
    mean_out = np.where(np.isnan(mean_out), mean_in - apart, mean_out)
    return _log_density(target, mean_in, _deviation(shadows, seen, mean_in)) - _log_density(
        target, mean_out, _deviation(shadows, ~seen, mean_out)
    )


def offline(target: np.ndarray, shadows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Deviations above the models that did not see it, [n]; arguments as in `online`, but those that saw are unused."""
    mean = _mean(shadows, ~seen)
    mean = np.where(np.isnan(mean), np.nanmean(mean), mean)
    return (target - mean) / _deviation(shadows, ~seen, mean)


def _mean(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    count = kept.sum(0)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.where(count > 0, np.where(kept, values, 0).sum(0) / count, np.nan)
    return found


def _deviation(values: np.ndarray, kept: np.ndarray, mean: np.ndarray) -> np.ndarray:
    squares = np.where(kept, np.square(values - mean), 0)
    count = kept.sum(0)
    together = np.sqrt(squares.sum() / max(1, count.sum() - (count > 0).sum()))
    deviation = np.full(len(mean), together)
    if len(values) >= OWN_DEVIATION:
        enough = count > 2
        deviation[enough] = np.sqrt(squares.sum(0)[enough] / (count[enough] - 1))
    return np.maximum(deviation, 1e-6)


def _log_density(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    found: np.ndarray = -np.square((values - mean) / deviation) / 2 - np.log(deviation)
    return found
