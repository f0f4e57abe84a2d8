"""FolkLoRA: cores in a common frame, a head that each client starts as its validation split says. Ours.

CE-LoRA with ``basis = "frozen"`` (A, B orthonormal, drawn from the seed, the same everywhere: they cost no byte; C
starts at zero, so the mean of cores is the mean of updates, exactly), cores averaged by examples or mixed by
similarity, and a head kept at home that starts from zero or from everybody's class statistics
(`folklora.methods.heads`). The class statistics travel once and serve both the head and, where asked for, the data
similarity.

Where the task has no head of its own nothing would be left that is a client's own, and cores alone can say too little
(docs/tasks.md has CE-LoRA beside it): FolkLoRA then is CE-LoRA as published, unless its options say otherwise.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from folklora.methods.celora import CELoRA
from folklora.methods.celora_options import CELoRAOptions


class FolkLoRAOptions(CELoRAOptions):
    headless: ClassVar[frozenset[str]] = frozenset({"basis", "similarity", "components"})
    """Options that are CE-LoRA's defaults where there is no head."""

    head: Literal["private", "shared", "sketched"] = "sketched"
    head_start: Literal["zero", "sketched", "auto", "fitted"] | None = "auto"
    basis: Literal["private", "frozen", "aligned"] = "frozen"
    similarity: Literal["data", "model", "both", "uniform", "size"] = "size"
    components: int = Field(0, ge=0, le=64, description="of each class's mixture; 0: read off the statistics")

    def without_head(self, method: str) -> Self:
        plain = super().without_head(method)
        if self.model_fields_set & (self.headless | {"fedopt", "scaffold", "dp_epsilon"}):
            return plain
        published = CELoRAOptions()
        return plain.model_copy(update={name: getattr(published, name) for name in self.headless})


class FolkLoRA(CELoRA):
    """The preset that holds where labels overlap and where they do not."""

    name = "folklora"
    title = "FolkLoRA (ours)"
    paper = None
    options_type = FolkLoRAOptions
