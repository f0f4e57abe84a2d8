"""Sketch: no training at all. Class statistics of the frozen backbone's features travel once; a head comes back.

The baseline that any honest table needs [recon, ours]: clients send counts, class means and the pooled within-class
scatter; the server merges them exactly, as if all features lay in one place, and returns the linear discriminant. A
task without a head of its own is refused.
"""

from __future__ import annotations

from typing import Literal

from folklora.adapters.lowrank import Tensors
from folklora.methods.base import Method
from folklora.methods.contract import State
from folklora.methods.options import Options


class SketchOptions(Options):
    head: Literal["sketched"] = "sketched"


class Sketch(Method):
    """A linear discriminant from one-off class statistics; zero rounds."""

    name = "sketch"
    title = "Sketched head, no training"
    mixed_ranks = True
    needs_head = True
    trains = frozenset()
    options_type = SketchOptions

    def rounds(self) -> int:
        return 0

    def global_model(self, state: State, client: str, tensors: Tensors) -> Tensors | None:
        if self.options.start != "sketched":
            return None
        start = {name.removeprefix("start/"): t for name, t in state.items() if name.startswith("start/")}
        return {**tensors, **start}
