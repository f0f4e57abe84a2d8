"""Laying out the next minibatch while the accelerator computes this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Prefetch:
    """One minibatch ahead, in a thread of its own, in page-locked memory from which copies do not wait.

    On the CPU, where the thread would only take a core from the products, nothing is done ahead.
    """

    def __init__(self, device: torch.device, *, always: bool = False) -> None:
        self.pins = device.type == "cuda"
        self.worker = ThreadPoolExecutor(1, "prefetch") if self.pins or always else None
        self.coming: Future[Any] | None = None

    def ahead(self, lay_out: Callable[[], Any]) -> None:
        """Start on what `now` will be asked for next."""
        if self.worker is not None:
            self.coming = self.worker.submit(self._made, lay_out)

    def now(self, lay_out: Callable[[], Any]) -> Any:
        """What was begun by `ahead`, or else what ``lay_out`` gives; they must be the same."""
        coming, self.coming = self.coming, None
        return self._made(lay_out) if coming is None else coming.result()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.worker is not None:
            self.worker.shutdown(cancel_futures=True)

    def _made(self, lay_out: Callable[[], Any]) -> Any:
        return pinned(lay_out()) if self.pins else lay_out()


def pinned(layout: Any) -> Any:
    """A layout, or any nested data class of tensors, with its tensors in page-locked memory."""
    if isinstance(layout, Tensor):
        return layout.pin_memory()
    if dataclasses.is_dataclass(layout) and not isinstance(layout, type):
        values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
        held = {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) or dataclasses.is_dataclass(value)
        }
        return dataclasses.replace(layout, **{name: pinned(value) for name, value in held.items()})
    return layout
