"""FedIT: FedAvg over LoRA factors. arXiv 2305.05644 (Zhang et al., "Towards Building the Federated GPT").

Each round every client trains A, B and the head from the server's and sends them; the server averages each factor by
itself, weighted by examples. The mean of products is not the product of the means, so the aggregate is biased: the
price is reported as ``aggregation_error``.
"""

from __future__ import annotations

from typing import Literal

from folklora.methods.base import Method
from folklora.methods.options import Options


class FedITOptions(Options):
    head: Literal["private", "shared", "sketched"] = "shared"


class FedIT(Method):
    """Mean of A and mean of B [paper]; the head travels too [paper: all trained tensors do]."""

    name = "fedit"
    title = "FedIT (FedAvg of LoRA)"
    paper = "arXiv:2305.05644"
    has_global_model = True
    travels = frozenset({"A", "B", "norm"})
    combines = frozenset({"proximal", "scaffold", "fedopt"})
    options_type = FedITOptions
