"""The floor: two answers that read no text, counted by hand."""

from __future__ import annotations

import majority
import numpy as np

from folklora.data.split import Split


def test_the_common_label_is_of_training_examples_and_its_share_of_test_examples() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 1, 0])
    splits = {
        # Trains on 0, 0, 1; is tested on 0, 1.
        "a": Split(train=np.array([0, 1, 3]), validation=np.array([5]), test=np.array([2, 4])),
        # Trains on 2, 2, 1: everybody's most common label is a tie of 0, 1 and 2, of which the first counts.
        "b": Split(train=np.array([6, 7, 8]), validation=np.array([5]), test=np.array([9, 5])),
    }
    everybody, own = majority.answers(labels, splits)
    assert everybody == np.mean([1 / 2, 1 / 2])
    assert own == np.mean([1 / 2, 1 / 2])
    # Where a client's own label is another than everybody's, only its own is right.
    splits["b"] = Split(train=splits["b"].train, validation=splits["b"].validation, test=np.array([5]))
    assert majority.answers(labels, splits) == (np.mean([1 / 2, 0]), np.mean([1 / 2, 1]))
