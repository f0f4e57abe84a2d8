"""How much of a batch was recovered: each metric of each victim, the control's beside it, and the gain over that.

What was recovered has no order: it is paired with the originals as fits best (Hungarian method), texts by the tokens
they share, pictures by squared error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from folklora.errors import AttackError

BEST_PSNR = 100.0
"""dB: what identical pictures get, whose PSNR is infinite."""

HIGHER = {
    "token_recall": True,
    "rouge_1": True,
    "rouge_2": True,
    "rouge_l": True,
    "exact_match": True,
    "canary_recall": True,
    "label_accuracy": True,
    "mse": False,
    "psnr": True,
    "ssim": True,
    "perceptual": False,
    "unexplained": False,
    "rank_quantile": False,
    "prior_distance": False,
    **{f"label_distance_{source}": False for source in ("sketch", "bias", "weights", "shadows")},
}
"""Metric -> whether a larger number is more leakage."""

Values = dict[str, float]


@dataclass(frozen=True)
class Texts:
    """Token ids without special ones, and what they say."""

    tokens: list[list[int]]
    texts: list[str]


def text_metrics(original: Texts, recovered: Texts, canaries: Sequence[Sequence[int]] | None = None) -> Values:
    """Means over the batch, all in [0, 1].

    ``token_recall``: share of a text's tokens, each as often as it occurs, that the recovered text has anywhere.
    ``rouge_*``: rouge-score's F1 of words, without stemming. ``exact_match``: all tokens, in their order.
    ``canary_recall``: token recall of the secret alone.
    """
    from rouge_score.rouge_scorer import RougeScorer

    shared = np.array([[_recall(a, b) for b in recovered.tokens] for a in original.tokens])
    _, chosen = linear_sum_assignment(-shared)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    found: dict[str, list[float]] = {}
    for i, j in enumerate(chosen):
        rouge = scorer.score(original.texts[i], recovered.texts[j])
        found.setdefault("token_recall", []).append(shared[i, j])
        for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            found.setdefault(name, []).append(rouge[key].fmeasure)
        found.setdefault("exact_match", []).append(float(original.tokens[i] == recovered.tokens[j]))
        if canaries is not None:
            found.setdefault("canary_recall", []).append(_recall(canaries[i], recovered.tokens[j]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def picture_metrics(original: Tensor, recovered: Tensor, features: Callable[[Tensor], Tensor]) -> Values:
    """Means over the batch, of pictures [count, 3, height, width] in [0, 1] at the size that the backbone sees.

    ``mse`` per number; ``psnr`` in dB, at most `BEST_PSNR`; ``ssim`` as scikit-image has it, in windows of 7 pixels or
    what fits; ``perceptual``: 1 minus the cosine of what the frozen backbone sees in both.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError:
        raise AttackError(
            "pictures are judged by scikit-image, which is not here: pip install 'folklora[privacy]'"
        ) from None

    errors = torch.stack([(recovered - each).square().mean((1, 2, 3)) for each in original])
    _, chosen = linear_sum_assignment(errors.double().numpy())
    fits = recovered[torch.from_numpy(chosen)]
    side = min(7, *original.shape[-2:])
    window = side - (side + 1) % 2
    cosines = torch.nn.functional.cosine_similarity(features(original).cpu(), features(fits).cpu(), dim=1)
    found: dict[str, list[float]] = {"mse": [], "psnr": [], "ssim": [], "perceptual": (1 - cosines).tolist()}
    for a, b in zip(original.double().numpy(), fits.double().numpy(), strict=True):
        found["mse"].append(float(np.square(a - b).mean()))
        psnr = float(peak_signal_noise_ratio(a, b, data_range=1.0)) if (a != b).any() else BEST_PSNR
        found["psnr"].append(min(psnr, BEST_PSNR))
        similar = structural_similarity(a, b, data_range=1.0, channel_axis=0, win_size=window)
        found["ssim"].append(float(similar))
    return {name: float(np.mean(values)) for name, values in found.items()}


def label_accuracy(original: np.ndarray, guessed: Tensor) -> float:
    """Share of the labels, each as often as it occurs, that were guessed; order does not count."""
    return _recall(original.tolist(), guessed.tolist())


def _recall(original: Sequence[int], recovered: Sequence[int]) -> float:
    return sum((Counter(original) & Counter(recovered)).values()) / max(1, len(original))


def summary(values: Sequence[Values], controls: Sequence[Values]) -> dict[str, dict[str, Any]]:
    """Metric -> mean, control, gain and the values of each victim; what is not a number is left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for each in values for name in each):
        own, other = ([v[name] for v in many if math.isfinite(v.get(name, math.nan))] for many in (values, controls))
        if not own:
            continue
        mean = float(np.mean(own))
        control = float(np.mean(other)) if other else None
        found[name] = {
            "mean": mean,
            "control": control,
            "gain": None if control is None else mean - control,
            "higher": HIGHER.get(name, True),
            "values": own,
            "controls": other,
        }
    return found


def numbers(scores: Mapping[str, Any]) -> Values:
    """Of an attack's own scores those that are numbers."""
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
