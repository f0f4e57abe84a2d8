"""FedSA-LoRA: share A, keep B. arXiv 2410.01463 (Guo et al., ICLR 2025).

A is found to carry what clients have in common and B what is their own: both train, only A travels and is averaged, B
and the head stay home [code].
"""

from __future__ import annotations

from folklora.methods.base import Method


class FedSALoRA(Method):
    """Mean of A; private B and head."""

    name = "fedsa"
    title = "FedSA-LoRA (A shared)"
    paper = "arXiv:2410.01463"
    travels = frozenset({"A"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})

    @property
    def newcomer_lacks(self) -> str | None:
        return super().newcomer_lacks or "up factors: those of the others stay home, and its own start at zero"
