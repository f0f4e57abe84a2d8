"""FolkLoRA: cores in a common frame, a head that each client starts as its validation split says. Ours.

CE-LoRA with ``basis = "frozen"`` (A, B orthonormal, drawn from the seed, the same everywhere: they cost no byte; C
starts at zero, so the mean of cores is the mean of updates, exactly), cores averaged by examples or mixed by
similarity, and a head kept at home that starts from zero or from everybody's class statistics
(`folklora.methods.heads`). The class statistics travel once and serve both the head and, where asked for, the data
similarity. Where the task has no head of its own, cores are all there is: nothing travels once but for the similarity.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from folklora.methods.celora import CELoRA, CELoRAOptions


class FolkLoRAOptions(CELoRAOptions):
    head: Literal["private", "shared", "sketched"] = "sketched"
    head_start: Literal["zero", "sketched", "auto"] | None = "auto"
    basis: Literal["private", "frozen", "aligned"] = "frozen"
    similarity: Literal["data", "model", "both", "uniform", "size"] = "size"
    components: int = Field(0, ge=0, le=64, description="of each class's mixture; 0: read off the statistics")


class FolkLoRA(CELoRA):
    """The preset that holds where labels overlap and where they do not."""

    name = "folklora"
    title = "FolkLoRA (ours)"
    paper = None
    options_type = FolkLoRAOptions
