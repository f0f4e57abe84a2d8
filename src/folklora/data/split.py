"""How a client splits its own examples: some to train on, some to validate with, some to test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from folklora.data.table import Table
from folklora.errors import DataError
from folklora.randomness import numpy_generator
from folklora.sections import DataSection


@dataclass(frozen=True)
class Split:
    """One client's examples: sorted int64 indices into the table, disjoint, none empty."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)


def own_split(table: Table, indices: np.ndarray, section: DataSection, seed: int, client: str) -> Split:
    """One client's examples as `[data]` has them: `split`, of which some are trained on (`few`, then `part`)."""
    whole = split(table.labels, indices, section.validation, section.test_fraction, seed, client, table.pictures)
    return part(few(whole, table.labels, section.shots, seed, client), section.train_share, seed, client)


def split(
    labels: np.ndarray,
    indices: np.ndarray,
    validation: float,
    test: float,
    seed: int,
    client: str,
    pictures: np.ndarray | None = None,
) -> Split:
    """Split one client's examples into train, validation and test, stratified.

    Test and validation have ``round(n * fraction)`` examples, at least one each and leaving at least one to train.
    Each is a systematic sample of the examples ordered by class: equally spaced from a random start. So a part that
    takes a fraction f of the m examples of a class takes f m of them rounded up or down, and a class too small to reach
    every part lands in each with the probability that its fraction says; the test set stays unbiased. (The fraction
    that validation takes is that of what the test set has left.)

    Parameters
    ----------
    labels
        ``[n]`` labels of the whole table.
    indices
        The client's examples, at least 3, in any order.
    pictures
        ``[n]``: equal for examples that stay together, as `Table.pictures` has them. What is split and counted then are
        the pictures, each under the label of its first example.

    Raises
    ------
    DataError
        The examples are of fewer than 3 pictures.

    Returns
    -------
    Split
        A function of ``(seed, client)`` and the arguments alone: other clients do not matter.
    """
    if pictures is not None:
        indices = np.sort(indices)
        names, places = np.unique(pictures[indices], return_index=True)
        if len(names) < 3:
            raise DataError(
                f"client {client!r} has {len(indices)} captions of {len(names)} pictures; allowed: three pictures or "
                "more, since captions of one stay together and each of train, validation and test has one"
            )
        whole = split(labels, indices[places], validation, test, seed, client)
        together = (np.isin(pictures[indices], pictures[of]) for of in (whole.train, whole.validation, whole.test))
        return Split(*(indices[chosen] for chosen in together))
    count = len(indices)
    rng = numpy_generator(seed, "split", client)
    shuffled = rng.permutation(np.sort(indices))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = [max(1, int(count * fraction + 0.5)) for fraction in (test, validation)]
    while sum(sizes) > count - 1:  # roundings up may leave nothing to train on
        sizes[int(np.argmax(sizes))] -= 1
    parts = []
    for size in sizes:
        taken = ((np.arange(size) + rng.random()) * len(by_class) / size).astype(np.int64)
        taken = np.minimum(taken, len(by_class) - 1)  # a start just below 1 may round up to the end
        parts.append(by_class[taken])
        by_class = np.delete(by_class, taken)
    return Split(train=np.sort(by_class), validation=np.sort(parts[1]), test=np.sort(parts[0]))


def few(of: Split, labels: np.ndarray, shots: int | None, seed: int, client: str) -> Split:
    """The split with at most so many training examples of each class, drawn; None: with all of them.

    The draws of fewer shots are among those of more. What is not drawn is in no part.
    """
    if shots is None:
        return of
    shuffled = numpy_generator(seed, "shots", client).permutation(of.train)
    kept = [shuffled[labels[shuffled] == each][:shots] for each in np.unique(labels[of.train])]
    return Split(np.sort(np.concatenate(kept)), of.validation, of.test)


def part(of: Split, share: float, seed: int, client: str) -> Split:
    """The split with a share of its training examples, rounded and at least one, drawn whatever their labels.

    A smaller share is among a larger one. What is not drawn is in no part.
    """
    if share == 1:
        return of
    shuffled = numpy_generator(seed, "train_share", client).permutation(of.train)
    return Split(np.sort(shuffled[: max(1, int(share * len(of.train) + 0.5))]), of.validation, of.test)


def histogram(table: Table, examples: Split | np.ndarray) -> np.ndarray:
    """``[classes]`` int64 counts of a client's labels, over all three parts of a `Split`."""
    if isinstance(examples, Split):
        examples = np.concatenate([examples.train, examples.validation, examples.test])
    return np.bincount(table.labels[examples], minlength=len(table.classes))
