"""Metrics of attacks in words, and which of an attack's metrics says most to people."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measure:
    """How metrics whose names begin with ``prefix`` are told.

    ``says`` is a sentence's end with the number in it; ``percent``: a share, written in per cent; ``chief``: between 0
    and 1, and what an attack is judged by, so that gains of different attacks stand side by side.
    """

    prefix: str
    words: str
    says: str
    percent: bool = True
    chief: bool = False

    def number(self, value: float, *, gain: bool = False) -> str:
        """``71 %``, ``0.52``; gains have a sign, and those of shares are points."""
        told = f"{100 * value:.0f}" if self.percent else f"{value:.3g}"
        told = "0" if float(told) == 0 else f"+{told}" if gain and value > 0 else told
        return f"{told} {'points' if gain else '%'}" if self.percent else told


MEASURES = (
    Measure("canary_recall", "tokens of a planted secret recovered", "recovered {} of a planted secret", chief=True),
    Measure("token_recall", "tokens of a text recovered", "recovered {} of a text's tokens", chief=True),
    Measure("word_recall", "words of a client's texts told", "told {} of the words in a client's texts", chief=True),
    Measure("word_precision", "words told that are in the texts", "was right in {} of the words it told"),
    Measure("pair_recall", "tokens told at their places", "told {} of the tokens at their places"),
    Measure("pair_precision", "tokens told at places that are theirs", "was right in {} of the tokens at places"),
    Measure("ssim", "likeness of the pictures (SSIM)", "reached a likeness (SSIM) of {} to the pictures", False, True),
    Measure("summed_precision", "examples named that are the client's", "was right in {} of its answers", chief=True),
    Measure(
        "hit", "classes in which an own example was named", "named an own example in {} of the classes", chief=True
    ),
    Measure("tpr_at_", "members found at few false alarms", "found {} of the members at few false alarms", chief=True),
    Measure("auc", "telling members from others (AUC)", "told members from others with an AUC of {}", False, True),
    Measure("label_accuracy", "labels recovered", "recovered {} of the labels", chief=True),
    Measure("label_distance", "distance to the label shares", "came within {} of the label shares", False, True),
    Measure("exact_match", "texts recovered word for word", "recovered {} of the texts word for word"),
    Measure("rouge_l", "overlap in word order (ROUGE-L)", "reached {} overlap in word order"),
    Measure("rouge_1", "overlap in words (ROUGE-1)", "reached {} overlap in words"),
    Measure("rouge_2", "overlap in pairs of words (ROUGE-2)", "reached {} overlap in pairs of words"),
    Measure("found_recall", "tokens that passed the span test", "found {} of the tokens"),
    Measure("found_exactly", "texts of which just the right tokens passed", "found {} of the texts exactly"),
    Measure("pursued_recall", "tokens found one after the other", "found {} of the tokens"),
    Measure("balanced_accuracy", "telling members from others (right answers)", "was right in {} of its answers"),
    Measure("top_labels", "most frequent labels named", "named {} of the most frequent labels"),
    Measure("summed_whole", "classes of which all examples were named", "named all examples of {} of the classes"),
    Measure("psnr", "likeness of the pictures (PSNR, dB)", "reached {} dB", False),
    Measure("mse", "squared error of the pictures", "came to a squared error of {}", False),
    Measure("perceptual", "distance as the model sees the pictures", "came to a distance of {}", False),
    Measure("unexplained", "part of the message left unexplained", "left {} of the message unexplained"),
    Measure("rank_quantile", "place of the nearest own example among all", "came to place {}", False),
    Measure("public_cosine", "likeness of the nearest public example", "came to a likeness of {}", False),
    Measure("prior_distance", "distance to the label shares without messages", "came within {}", False),
)
"""What says most comes first."""


def measure(name: str) -> Measure:
    """How a metric is told; one that is not known by its name."""
    for known in MEASURES:
        if name.startswith(known.prefix):
            rest = name.removeprefix(known.prefix).strip("_").replace("_", " ")
            return replace(known, prefix=name, words=f"{known.words}: {rest}") if rest else known
    words = name.replace("_", " ")
    return Measure(name, words, f"came to {{}} in {words}", percent=False)


def place(name: str) -> int:
    """How much a metric says to people, 0 being the most."""
    return next((i for i, known in enumerate(MEASURES) if name.startswith(known.prefix)), len(MEASURES))
