"""How much a client's examples count beside as many others: a factor in (0, 1], in coarse steps. Ours [recon].

Two measures, each between 0 and 1:

- *distinct*: the share of examples that are left when of each group of copies, exact or near, one is kept
  (`folklora.data.audit.duplicates`);
- *order*: 1 less `regularity_of_blocks`. In random order the next word follows from nothing; what a language, or a
  habit, adds to that is the order. Of examples some of which are noise it leaves the share of the others, or of many
  short ones its square (docs/audit.md). But how much there is of it in clean data depends on the language and the
  domain: it compares clients, and judges none alone.

Regularity depends on the amount of data, too: of a larger file more pairs repeat. So it is measured on blocks of about
as many examples for everybody. Which example is in which block follows from their number alone, and copies within a
block, exact or near, are left out: of random words a copy would make order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from folklora.data.audit.duplicates import Duplicates, Example, near_duplicates
from folklora.data.audit.entropy import regularity, shannon
from folklora.data.audit.measure import Measure
from folklora.data.audit.tokens import Tokens, words
from folklora.randomness import numpy_generator

By = Literal["duplicates", "regularity", "both"]

BLOCK = 128
"""Examples of a block, up to twice as many; of fewer there is one block."""
LEAST = 2**-5
"""No quality is lower: a client is heard."""
STEPS = 4
"""Steps of quality in each halving: 1, 0.84, 0.71, 0.59, 0.5, ... So no more than 21 values are ever said."""


def tokens_of(examples: Sequence[Example]) -> Tokens:
    """Words of texts, or the items of sequences."""
    return Tokens.joined([words(example) if isinstance(example, str) else example for example in examples])


def blocks(count: int) -> list[np.ndarray]:
    """Places of so many examples, cut into blocks of `BLOCK` to twice as many: a function of the number alone."""
    order = numpy_generator(0, "audit/blocks", round=count).permutation(count)
    parts = max(1, count // BLOCK)
    return [np.sort(order[part::parts]) for part in range(parts)]


def regularities(examples: Sequence[Example]) -> list[Measure]:
    """`folklora.data.audit.entropy.regularity` of each block, without its copies."""
    found: list[Measure] = []
    for places in blocks(len(examples)):
        some = [examples[place] for place in places]
        again = {place for group in copies(some).groups for place in group[1:]}
        found.append(regularity(tokens_of([each for place, each in enumerate(some) if place not in again])))
    return found


def regularity_of_blocks(blocks: Sequence[Measure]) -> Measure:
    """Mean of `regularities`, each between 0 and 1; a block that cannot be measured counts as noise, 1.

    Returns
    -------
    Measure
        Not measurable where no block is.
    """
    if all(each.value is None for each in blocks):
        return Measure(None, blocks[0].why if blocks else "there are no examples")
    return Measure(float(np.mean([bounded(each) for each in blocks])))


def bounded(regularity: Measure) -> float:
    """Between 0 and 1; what cannot be told from noise is noise."""
    return 1.0 if regularity.value is None else min(1.0, max(0.0, regularity.value))


def copies(examples: Sequence[Example]) -> Duplicates:
    """Exact and near ones; shingles are of two words, or of so many items that hardly any come together by chance.

    Two long sequences of a few items have the same pairs whatever they are. That ``s`` items of entropy H in random
    order are met in one of L places has a probability near ``L exp(-s H)``: s is the least that makes it 1/100.
    """
    if not examples or isinstance(examples[0], str):
        return near_duplicates(examples)
    tokens = tokens_of(examples)
    entropy = shannon(tokens).value or 0.0
    length = max(1.0, len(tokens) / len(examples))
    shingle = math.ceil(math.log(100 * length) / entropy) if entropy else 2
    return near_duplicates(examples, shingle=min(64, max(2, shingle)))


def quality(examples: Sequence[Example], by: By) -> float:
    """The factor of the module's text: one of the measures, or their product, in steps."""
    share = copies(examples).share if by != "regularity" else 0.0
    regularity = regularity_of_blocks(regularities(examples)) if by != "duplicates" else Measure(0.0)
    return quality_of(share, regularity, by)


def quality_of(share: float, regularity: Measure, by: By) -> float:
    """The same of what was measured: the share of copies, and the regularity of blocks."""
    value = 1.0
    if by != "regularity":
        value *= 1.0 - share
    if by != "duplicates":
        value *= 1.0 - bounded(regularity)
    return stepped(value)


def stepped(value: float) -> float:
    """The nearest step, from `LEAST` to 1."""
    if value <= LEAST:
        return LEAST
    return float(2.0 ** (-round(-STEPS * math.log2(min(1.0, value))) / STEPS))


def weighed(examples: int, quality: float) -> int:
    """As how many examples these count: a whole number, and never nobody."""
    return max(1, round(examples * quality))
