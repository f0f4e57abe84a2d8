"""Gradient checkpointing: what a layer computed is thrown away and computed again on the way back.

The second computation happens in the backward pass, when the adapters' bank is no longer plugged in and the dropout
generators stand where the forward pass left them. Both are put back as they were at the layer's first computation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from folklora.adapters.layers import Socket
from folklora.errors import BackboneError


def install(model: Any, socket: Socket, shared: Any = None) -> None:
    """Have the model's layers checkpoint themselves wherever gradients are wanted; elsewhere nothing changes.

    transformers' own switch is not used: it needs the layers in training mode, in which some of them (OPT's) drop out
    numbers by themselves, and it takes their key-value caches away even where no gradient is wanted.

    Parameters
    ----------
    shared
        The one block that all the model's layers are, if they are one: it is computed again each time it was applied.

    Raises
    ------
    BackboneError
        If it has no layers that can.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [shared] if shared is not None else []
    layers += [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise BackboneError(
            f"model.checkpointing = true: {model.config.model_type} has no layers that can be computed again; "
            "allowed: false"
        )
    for layer in layers:
        # A partial of the bound method, not a closure: a copy of the model then computes with the copy's own layer.
        layer.forward = partial(_checkpointed, layer.forward, socket)


def _checkpointed(forward: Callable[..., Any], socket: Socket, *args: Any, **kwargs: Any) -> Any:
    from transformers.cache_utils import Cache

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # A cache of keys and values would be filled by the first computation and found full by the second.
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    bank = socket.bank
    dropout = bank.dropout if bank is not None else None
    start = dropout.state() if dropout is not None else None
    first = True

    def segment() -> Any:
        nonlocal first
        if first:
            first = False
            return forward(*args, **kwargs)
        plugged, socket.bank = socket.bank, bank
        end = dropout.state() if dropout is not None else None
        try:
            if dropout is not None:
                dropout.restore(start)
            return forward(*args, **kwargs)
        finally:  # also where torch stops it early, having recomputed all that it needs
            socket.bank = plugged
            if dropout is not None:
                dropout.restore(end)

    return checkpoint(segment, use_reentrant=False, preserve_rng_state=False)
