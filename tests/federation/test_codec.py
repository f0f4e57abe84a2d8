"""Messages as bytes: exact round trips, and nothing but `MessageError` out of anything that arrives."""

from __future__ import annotations

import gc
import math
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from folklora.errors import MessageError
from folklora.federation.codec import BLOCK, MAGIC, check, decode, encode, longest
from folklora.methods.base import Message

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = [(), (1,), (0,), (0, 3), (5,), (3, 4), (64,), (65,), (2, 3, 4), (1, 2, 3, 4)]


def seal(body: bytes) -> bytes:
    """A message around ``body`` whose checksum is right."""
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def tensor_field(name: bytes, code: int, shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(f"<BB{len(shape)}I", code, len(shape), *shape) + values


def one_tensor(code: int, shape: tuple[int, ...], values: bytes = b"") -> bytes:
    return seal(struct.pack("<HH", 0, 1) + tensor_field(b"A/x", code, shape, values))


def random_tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_representable_values_come_back_exactly(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape).to(FLOATS[dtype])
    back = decode(encode(Message({"A/x": tensor}), dtype)).tensors["A/x"]
    assert back.dtype == torch.float32
    assert back.shape == shape
    assert torch.equal(back, tensor.float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrower_dtypes_round_to_the_nearest(dtype: str) -> None:
    tensor = random_tensor((1000,))
    back = decode(encode(Message({"A/x": tensor}), dtype)).tensors["A/x"]
    assert torch.equal(back, tensor.to(FLOATS[dtype]).float())
    assert float(((back - tensor) / tensor).abs().max()) <= torch.finfo(FLOATS[dtype]).eps / 2


@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_integers_are_never_narrowed(kind: torch.dtype, dtype: str) -> None:
    limits = torch.iinfo(kind)
    tensor = torch.tensor([[limits.min, -1, 0], [1, 77, limits.max]], dtype=kind)
    back = decode(encode(Message({"classes": tensor}), dtype)).tensors["classes"]
    assert back.dtype == kind
    assert torch.equal(back, tensor)


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), max_size=200),
    st.integers(0, 3),
)
@example([2.0**127, -(2.0**127)], 0)
@example([1e-45, 2.66e-43], 0)
@example([], 0)
def test_int8_is_off_by_half_a_step_of_its_block(values: list[float], blocks_of_zeros: int) -> None:
    tensor = torch.tensor([0.0] * (BLOCK * blocks_of_zeros) + values, dtype=torch.float32)
    back = decode(encode(Message({"A/x": tensor}), "int8")).tensors["A/x"]
    for start in range(0, len(tensor), BLOCK):
        block, got = tensor[start : start + BLOCK].double(), back[start : start + BLOCK].double()
        step = float(block.abs().max()) / 127
        # The step is rounded to float32 when it travels: by 2^-24 of itself, or to the smallest number there is.
        slack = 127 * max(step * 2**-23, 2**-149)
        assert float((block - got).abs().max()) <= step / 2 + slack


def test_int8_blocks_do_not_disturb_each_other() -> None:
    tensor = torch.cat([torch.full((BLOCK,), 1e6), torch.full((BLOCK,), 1e-6)])
    back = decode(encode(Message({"A/x": tensor}), "int8")).tensors["A/x"]
    assert torch.allclose(back, tensor, rtol=1e-6)


def test_names_and_numbers_survive() -> None:
    message = Message(
        {"B/é": random_tensor((2,)), "A/" + "x" * 250: random_tensor((3,)), "head/bias": random_tensor((1,))},
        {"examples": 12.0, "π": math.pi, "tiny": 5e-324},
    )
    back = decode(encode(message))
    assert back.tensors.keys() == message.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in message.tensors.items())
    assert back.numbers == message.numbers


def test_equal_messages_are_equal_bytes() -> None:
    """In whatever order they were put together: a state that was read back from disk has another order."""
    one = Message({"A/x": torch.ones(2), "B/x": torch.zeros(3)}, {"a": 1.0, "b": 2.0})
    other = Message({"B/x": torch.zeros(3), "A/x": torch.ones(2)}, {"b": 2.0, "a": 1.0})
    assert encode(one) == encode(other)


def test_a_view_that_is_not_contiguous_is_sent_row_by_row() -> None:
    tensor = random_tensor((4, 6)).T[::2]
    for dtype in [*FLOATS, "int8"]:
        contiguous = encode(Message({"A/x": tensor.contiguous()}), dtype)
        assert encode(Message({"A/x": tensor}), dtype) == contiguous


def test_the_layout_is_the_documented_one() -> None:
    """Written by hand: whoever speaks to an older peer must find the same bytes."""
    message = Message({"A/x": torch.tensor([[1.0, -2.0]])}, {"examples": 3.0})
    body = (
        struct.pack("<HH", 1, 1)
        + b"\x08examples"
        + struct.pack("<d", 3.0)
        + b"\x03A/x"
        + struct.pack("<BB2I", 0, 2, 1, 2)
        + struct.pack("<2f", 1.0, -2.0)
    )
    assert encode(message) == b"FLK1" + struct.pack("<I", zlib.crc32(body)) + body


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)])
def test_the_overhead_is_a_few_bytes(dtype: str, size: int) -> None:
    data = encode(Message({"A/x": random_tensor((8, 384))}), dtype)
    scales = 8 * 384 // BLOCK * 4 if dtype == "int8" else 0
    assert len(data) == 12 + (1 + 3 + 1 + 1 + 8) + 8 * 384 * size + scales


def test_decoded_tensors_can_be_written_to() -> None:
    """And do not write into the bytes that arrived."""
    for dtype in [*FLOATS, "int8"]:
        data = encode(Message({"A/x": torch.ones(3)}), dtype)
        copy = bytes(data)
        decode(data).tensors["A/x"].add_(1)
        assert data == copy


# -- what cannot be sent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_sent(value: float, dtype: str) -> None:
    with pytest.raises(MessageError, match="'A/x' holds NaN or Inf"):
        encode(Message({"A/x": torch.tensor([1.0, value])}), dtype)
    with pytest.raises(MessageError, match="'examples' is not finite"):
        encode(Message({}, {"examples": value}), dtype)


@pytest.mark.parametrize(
    ("tensor", "dtype", "match"),
    [
        (torch.tensor([70000.0]), "float16", "does not fit float16: largest magnitude 70000"),
        (torch.tensor([1e300], dtype=torch.float64), "float32", "does not fit float32"),
        (torch.tensor([1e300], dtype=torch.float64), "int8", "does not fit int8"),
        (torch.tensor([True]), "float32", "torch.bool; allowed: torch.float32.*torch.int64"),
        (torch.tensor([1j]), "float32", "torch.complex64"),
        (torch.zeros(1, 1, 1, 1, 1), "float32", "5 dimensions; allowed: at most 4"),
    ],
)
def test_what_does_not_fit_is_not_sent(tensor: Tensor, dtype: str, match: str) -> None:
    with pytest.raises(MessageError, match=match):
        encode(Message({"A/x": tensor}), dtype)


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128])
def test_names_have_1_to_255_bytes(name: str) -> None:
    with pytest.raises(MessageError, match="allowed: 1 to 255"):
        encode(Message({name: torch.zeros(1)}))


# -- what is refused on arrival ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "does not start with FLK1"),
        (b"FLK1", "does not start with FLK1"),
        (b"PK\x03\x04" + bytes(20), "does not start with FLK1"),
        (MAGIC + bytes(8) + b"x", "checksum"),
        (seal(struct.pack("<HH", 0, 0) + b"x"), "1 bytes after the end"),
        (seal(struct.pack("<HH", 1, 0)), "ends early: 1 bytes announced, 0 left"),
        (seal(struct.pack("<HH", 1, 0) + b"\x00" + bytes(8)), "name '' is empty or repeated"),
        (seal(struct.pack("<HH", 1, 0) + b"\x01\xff" + bytes(8)), "not UTF-8"),
        (seal(struct.pack("<HH", 1, 0) + b"\x01n" + struct.pack("<d", math.nan)), "'n' is not finite"),
        (seal(struct.pack("<HH", 1, 0) + b"\x01n" + struct.pack("<d", -math.inf)), "'n' is not finite"),
        (seal(struct.pack("<HH", 2, 0) + (b"\x01n" + bytes(8)) * 2), "'n' is empty or repeated"),
        (seal(struct.pack("<HH", 0, 2) + tensor_field(b"A/x", 0, (1,), bytes(4)) * 2), "'A/x' is empty or repeated"),
        (one_tensor(9, (1,), bytes(4)), "unknown dtype code 9"),
        (one_tensor(255, (), b""), "unknown dtype code 255"),
        (one_tensor(0, (1,) * 5, bytes(4)), "5 dimensions; allowed: at most 4"),
        (one_tensor(0, (2,), bytes(4)), "ends early: 8 bytes announced, 4 left"),
        (one_tensor(0, (2,), bytes(12)), "4 bytes after the end"),
        (one_tensor(0, (2**32 - 1,) * 4), "ends early"),
        (one_tensor(3, (2**32 - 1,) * 4), "ends early"),
        (one_tensor(5, (2**31, 2**31, 4)), "ends early"),
        (one_tensor(0, (0, 2**32 - 1)), "impossible shape"),
        (one_tensor(0, (2**32 - 1, 0, 2**32 - 1)), "impossible shape"),
        (one_tensor(0, (1,), struct.pack("<f", math.nan)), "holds NaN or Inf"),
        (one_tensor(1, (1,), b"\x00\x7c"), "holds NaN or Inf"),
        (one_tensor(2, (1,), b"\x80\xff"), "holds NaN or Inf"),
        (one_tensor(3, (1,), struct.pack("<f", math.inf) + b"\x00"), "holds NaN or Inf"),
        (one_tensor(3, (1,), struct.pack("<f", math.nan) + b"\x01"), "holds NaN or Inf"),
        (one_tensor(3, (1,), struct.pack("<f", 3e38) + b"\x7f"), "holds NaN or Inf"),
    ],
)
def test_what_is_malformed_is_refused(data: bytes, match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MessageError, match=match) as caught:
            decode(data)
    assert "\n" not in str(caught.value)


def test_the_receiver_sets_the_limit() -> None:
    data = encode(Message({"A/x": torch.zeros(10)}))
    assert decode(data, limit=len(data)).tensors["A/x"].shape == (10,)
    with pytest.raises(MessageError, match=f"message of {len(data)} bytes; allowed: at most {len(data) - 1}"):
        decode(data, limit=len(data) - 1)


@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_longest_honest_message(shape: tuple[int, ...], dtype: str) -> None:
    data = encode(Message({"A/é": random_tensor(shape)}, {"examples": 1.0}), dtype)
    longest_ = longest({"A/é": shape}, ("examples",))
    assert len(data) <= longest_
    if dtype == "float32":
        assert longest_ - len(data) == 4  # which a single int8 value would need for its scale


SHAPE = {"A/x": (2, 3), "B/x": (3, 2)}


@pytest.mark.parametrize(
    ("tensors", "numbers", "match"),
    [
        ({"A/x": (2, 3)}, {"examples": 1.0}, "tensor 'B/x' is missing"),
        ({"A/x": (2, 3), "B/x": (3, 2), "C/x": (1,)}, {"examples": 1.0}, "unknown tensor 'C/x'; allowed: A/x, B/x"),
        ({"A/x": (3, 2), "B/x": (3, 2)}, {"examples": 1.0}, r"'A/x' has shape \(3, 2\); allowed: \(2, 3\)"),
        ({"A/x": (6,), "B/x": (3, 2)}, {"examples": 1.0}, "'A/x' has shape"),
        ({"A/x": (2, 3), "B/x": (3, 2)}, {}, "number 'examples' is missing"),
        ({"A/x": (2, 3), "B/x": (3, 2)}, {"examples": 1.0, "weight": 9.0}, "unknown number 'weight'"),
        ({"A/x": (2, 3), "B/x": (3, 2)}, {"examples": 0.0}, "examples = 0.0; allowed: above 0"),
        ({"A/x": (2, 3), "B/x": (3, 2)}, {"examples": -5.0}, "examples = -5.0"),
        ({"A/x": (2, 3), "B/x": (3, 2)}, {"examples": 1e300}, r"examples = 1e\+300; allowed: above 0, at most"),
    ],
)
def test_check_refuses_what_was_not_agreed(
    tensors: dict[str, tuple[int, ...]], numbers: dict[str, float], match: str
) -> None:
    message = Message({name: torch.zeros(shape) for name, shape in tensors.items()}, numbers)
    with pytest.raises(MessageError, match=match):
        check(decode(encode(message)), SHAPE, ("examples",))


def test_check_refuses_integers_where_floats_were_agreed() -> None:
    message = Message({"A/x": torch.full((2, 3), 2**62), "B/x": torch.zeros(3, 2)}, {"examples": 1.0})
    with pytest.raises(MessageError, match="'A/x' is torch.int64; allowed: floating point"):
        check(decode(encode(message)), SHAPE, ("examples",))


def test_check_accepts_what_was_agreed_in_any_order() -> None:
    message = Message({name: torch.zeros(SHAPE[name]) for name in ("B/x", "A/x")}, {"examples": 4.0})
    check(decode(encode(message)), SHAPE, ("examples",))


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def survives(data: bytes) -> None:
    """Decodes to finite tensors, or raises `MessageError` and nothing else; warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            message = decode(data)
        except MessageError:
            return
    assert all(math.isfinite(number) for number in message.numbers.values())
    for tensor in message.tensors.values():
        assert bool(torch.isfinite(tensor).all())


def valid_messages() -> list[bytes]:
    integers = {"classes": torch.arange(5, dtype=torch.int32), "counts": torch.arange(3)}
    made = [encode(Message(), "float32"), encode(Message(integers, {"examples": 3.0}))]
    for dtype in [*FLOATS, "int8"]:
        tensors = {f"A/{i}": random_tensor(shape, i) for i, shape in enumerate([(2, 3), (70,), (), (0, 4)])}
        made.append(encode(Message(tensors, {"examples": 7.0, "loss": 0.5}), dtype))
    return made


VALID = valid_messages()


@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    survives(data)
    survives(MAGIC + data)
    survives(seal(data))


def mutate(data: bytearray, draw: Any) -> None:
    """One change of a message's body, as a damaged or hostile sender would make it."""
    kind = draw(6)
    at = draw(len(data)) if data else 0
    if kind == 0 and data:
        data[at] ^= 1 << draw(8)
    elif kind == 1 and data:
        data[at] = (0, 1, 3, 127, 128, 255)[draw(6)]
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data += bytes(draw(256) for _ in range(draw(20)))
    elif kind == 4:
        data[at : at + draw(9)] = struct.pack("<I", (0, 1, 2**16, 2**31, 2**32 - 1)[draw(5)])
    elif kind == 5:
        other = draw(len(data) + 1)
        data[at:at] = data[min(at, other) : max(at, other)][:64]


@given(st.data())
def test_mutated_messages(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(VALID))
    body = bytearray(original[8:])

    def draw(below: int) -> int:
        return data.draw(st.integers(0, max(0, below - 1)))

    for _ in range(1 + draw(4)):
        mutate(body, draw)
    survives(seal(bytes(body)))
    if body != original[8:] and len(body) >= 4:  # the old checksum over a new body
        with pytest.raises(MessageError):
            decode(original[:8] + bytes(body))


@pytest.mark.parametrize("data", VALID, ids=range(len(VALID)))
def test_every_truncation_and_every_flipped_bit_is_noticed(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(MessageError):
                decode(bytes(flipped))


@pytest.fixture
def peak() -> Iterator[Any]:
    """``peak(data)`` -> bytes allocated at most while decoding, NumPy's and Python's; torch's own are not seen."""
    tracemalloc.start()

    def measure(data: bytes) -> int:
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        survives(data)
        return tracemalloc.get_traced_memory()[1] - before

    yield measure
    tracemalloc.stop()


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "shape", [(2**32 - 1,), (2**16, 2**16), (2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), (0, 2**32 - 1), (3, 10**6)]
)
def test_announced_sizes_allocate_nothing(code: int, shape: tuple[int, ...], peak: Any) -> None:
    data = one_tensor(code, shape, bytes(100_000))
    assert peak(data) < 8 * len(data)


@pytest.mark.parametrize("numbers", [0, 65535])
def test_announced_counts_allocate_nothing(numbers: int, peak: Any) -> None:
    data = seal(struct.pack("<HH", numbers, 65535) + bytes(1000))
    assert peak(data) < 8 * len(data) + 20_000


def test_a_valid_message_takes_a_few_times_its_size() -> None:
    """In a process of its own, whose address space is limited: whatever allocates, torch or Python, is caught."""
    code = """
import resource, torch
from folklora.federation.codec import decode, encode
from folklora.methods.base import Message
torch.set_num_threads(1)
for dtype, item in {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}.items():
    data = encode(Message({"A/x": torch.ones((64 << 20) // item)}), dtype)
    decode(encode(Message({"A/x": torch.ones(3)}), dtype))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * len(data), -1))
    decoded = decode(data).tensors["A/x"]
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(dtype, float(decoded[0]), len(decoded) * item)
    del data, decoded
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    shown = [f"{dtype} 1.0 {64 << 20}" for dtype in (*FLOATS, "int8")]
    assert found.stdout.splitlines() == shown, found.stderr[-500:]


@pytest.mark.slow
def test_a_million_mutations() -> None:
    rng = np.random.default_rng(0)
    pool = iter(())

    def draw(below: int) -> int:
        nonlocal pool
        value = next(pool, None)
        if value is None:
            pool = iter(rng.integers(2**62, size=100_000).tolist())
            value = next(pool)
        return int(value % max(1, below))

    decoded = 0
    for i in range(1_000_000):
        if i % 10 == 0:
            survives(seal(rng.bytes(draw(200))))
            continue
        body = bytearray(VALID[draw(len(VALID))][8:])
        for _ in range(1 + draw(3)):
            mutate(body, draw)
        survives(seal(bytes(body)))
        decoded += 1
    assert decoded == 900_000
