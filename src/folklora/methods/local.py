"""Local training: every client for itself. The floor under every federated method.

Nothing travels (unless the head starts sketched: then class statistics go up once and a head comes down once).
"""

from __future__ import annotations

from folklora.methods.base import Method


class Local(Method):
    """Plain LoRA [arXiv 2106.09685] at each client, no aggregation."""

    name = "local"
    title = "Local training"
    mixed_ranks = True
