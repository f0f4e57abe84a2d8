"""Which layers of a tower see each of its tokens, once: only those can be each client's own.

What pools, or projects what was pooled, sees one row a sequence, and its rows are nobody's tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def tokenwise(model: nn.Module, call: Callable[[Any], object], tokens: int) -> frozenset[str]:
    """Names of the linear layers and LayerNorms that are called once in ``call(model)``, with ``tokens`` rows."""
    seen: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):

            def look(module: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                calls[name] += 1
                seen[name] += arguments[0].numel() // arguments[0].shape[-1]

            hooks.append(module.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(name for name in seen if calls[name] == 1 and seen[name] == tokens)
