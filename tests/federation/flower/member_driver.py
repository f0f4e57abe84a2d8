"""A member that does what the test asks of it: a script for `test_federation.py`, which starts it in its own process.

    python member_driver.py CUES join --federation ...

It is `folklora join`, but before an order it looks for the file ``CUES/<member>.<kind>.<round>``, which says what the
member does. *hang*: it writes ``CUES/<member>.hangs`` and goes on when the cue is gone. *shape*, *nan*, *truncated*,
*gigantic*, *impostor*: it answers, but not as agreed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from folklora import cli
from folklora.federation import resident
from folklora.federation.codec import decode, encode
from folklora.federation.orders import Answer, Order
from folklora.methods.contract import Message


class OnCue(resident.Resident):
    cues = Path()

    def carry_out(self, order: Order) -> Answer:
        cue = self.cues / f"{order.client}.{order.kind}.{order.round}"
        if not cue.exists():
            return super().carry_out(order)
        what = cue.read_text()
        if what == "hang":
            (self.cues / f"{order.client}.hangs").touch()
            while cue.exists():
                time.sleep(0.05)
            return super().carry_out(order)
        answer = super().carry_out(order)
        assert answer.data is not None, answer
        if what == "impostor":
            others = [name for name in ("site-0", "site-1", "site-2") if name != order.client]
            return answer.model_copy(update={"client": others[0]})
        return answer.model_copy(update={"data": damaged(answer.data, what)})


def damaged(data: bytes, what: str) -> bytes:
    if what == "truncated":
        return data[:-7]
    if what == "gigantic":
        return bytes(8 * 2**20)
    message = decode(data)
    name = next(name for name, tensor in message.tensors.items() if tensor.dim() == 2)
    if what == "shape":
        return encode(Message({**message.tensors, name: torch.zeros(3, 2)}, message.numbers))
    assert what == "nan", what
    with patch.object(torch, "isfinite", torch.ones_like):  # an honest sender refuses itself
        return encode(
            Message({**message.tensors, name: torch.full_like(message.tensors[name], torch.nan)}, message.numbers)
        )


if __name__ == "__main__":
    OnCue.cues = Path(sys.argv[1])
    resident.Resident = OnCue  # type: ignore[misc]
    sys.argv = ["folklora", *sys.argv[2:]]
    cli.main()
