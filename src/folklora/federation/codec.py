"""Messages as bytes: small, self-describing, checked before anything is allocated, nothing unpickled.

Layout, little-endian::

    "FLK1" | crc32 of all that follows: u32 | numbers: u16 | tensors: u16
    each number:  name | f64
    each tensor:  name | form: u8 | dimensions: u8 | each: u32 | its values, row-major, as the form says
    name:         length: u8 | UTF-8

Both are written in the order of their names, so that equal messages are equal bytes. The forms::

    0, 1, 2       float32, float16, bfloat16: raw
    4, 5          int32, int64: raw
    3   int8      a scale (f32: largest magnitude / 127) for each 64 values, then a signed byte each
    6   levels    grid: u8 | block: u16 | a scale (f32) for each block, then codes without a gap
                  (`folklora.quantization`; grids: 1 ternary, 2, 3, 4, 8 normal float, 20 int4, 24 int8)
    7   sparse    form of the values: u8 | how many, k: u32 | where | the k values, as that form says; all others are 0
    8   slices    axis: u8 (0 rows, 1 columns) | block: u16 | each slice's grid: u8 (0: all zero) |
                  of each slice that is there, its scales and codes as in form 6; for matrices only

Where the k values of a sparse tensor of n lie is Elias and Fano's code, about ``2 + log2(n / k)`` bits a value: with
``l = floor(log2(n / k))``, the low l bits of each position, packed; then a bit array of ``k + ((n - 1) >> l)`` in which
bit ``i + (position_i >> l)`` is set. It has one spelling, and its length follows from n and k.

How a tensor travels is its *encoding*, written ``form[/block][@fraction]``: ``float16``, ``nf4/32`` (blocks of 32),
``int8@0.05`` (the largest twentieth, dense where that is shorter), or ``rows/64:8,4,0`` (slices, and the bits of each).
A message may name one for each tensor; all others take the common one. Under a common encoding other than plain floats,
vectors of at most `VECTOR` numbers travel whole, in float32 where it has few bits: biases, gains, counts and mixture
weights weigh nothing beside matrices, and much depends on each of their numbers.

What the byte counters of a run report is the length of these bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from folklora.adapters.lowrank import Shapes, Tensors, kind
from folklora.errors import MessageError
from folklora.methods.contract import Message
from folklora.quantization import (
    BLOCK,
    MOST_IN_BLOCK,
    blocks_of,
    dequantize,
    pack,
    pack_bits,
    packed_bytes,
    quantize,
    unpack,
    unpack_bits,
)

MAGIC = b"FLK1"
VECTOR = 2**13
"""Numbers of a vector that still travels whole; a longer one is a packed matrix."""
LIMIT = 1 << 30
"""Bytes no message may exceed unless the receiver says otherwise."""
MOST_EXAMPLES = 2**40
"""Far above any client's: sums of such numbers still fit. It does not keep a liar from outweighing all others."""

SEALED = "sealed"
"""The kind of tensors that hold ciphertexts, four bytes in each number."""

_PLAIN = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16, 4: torch.int32, 5: torch.int64}
_CODES = {dtype: code for code, dtype in _PLAIN.items()}
_INT8, _LEVELS, _SPARSE, _SLICES = 3, 6, 7, 8
_GRIDS = {1: "ternary", 2: "nf2", 3: "nf3", 4: "nf4", 8: "nf8", 20: "int4", 24: "int8"}
_GRID_CODES = {grid: code for code, grid in _GRIDS.items()}
_BITS = {"0": 0, "1.5": 1, "2": 2, "3": 3, "4": 4, "8": 24}
"""Bits of a slice, as encodings spell them -> its grid's code."""
_AXES = {"rows": 0, "columns": 1}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Encoding:
    """How one tensor travels; see the module's text.

    Attributes
    ----------
    form
        ``float32``, ``float16``, ``bfloat16``, a grid of `folklora.quantization`, ``rows`` or ``columns``.
    keep
        The fraction of values that is sent.
    slices
        Grid code of each row or column.
    """

    form: str
    block: int = BLOCK
    keep: float = 1.0
    slices: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        return self.form in {"float32", "float16", "bfloat16"}


@lru_cache(maxsize=4096)
def encoding(text: str) -> Encoding:
    """Read an encoding.

    Raises
    ------
    MessageError
        If it is none.
    """
    head, _, bits = text.partition(":")
    head, at, keep = head.partition("@")
    form, slash, block = head.partition("/")
    try:
        found = Encoding(
            form,
            int(block) if slash else BLOCK,
            float(keep) if at else 1.0,
            tuple(_BITS[b] for b in bits.split(",")) if bits else (),
        )
    except (ValueError, KeyError):
        raise MessageError(f"encoding {text!r} cannot be read") from None
    sliced = form in _AXES
    known = sliced or found.plain or form in _GRID_CODES
    fits = 1 <= found.block <= MOST_IN_BLOCK and 0 < found.keep <= 1 and bool(found.slices) == sliced
    if not (known and fits) or (slash and found.plain) or (at and sliced):
        raise MessageError(
            f"encoding {text!r}; allowed: float32, float16, bfloat16, {', '.join(_GRID_CODES)}, with /block "
            f"(1 to {MOST_IN_BLOCK}) and @fraction behind it, or rows:, columns: with bits"
        )
    return found


def encode(message: Message, common: str = "float32") -> bytes:
    """A message as bytes; integers as they are, floating tensors by their own encoding or else the ``common`` one.

    Raises
    ------
    MessageError
        If a tensor or a number holds NaN or Inf, a tensor does not fit the narrower dtype, or an encoding is none.
    """
    parts = [struct.pack("<HH", len(message.numbers), len(message.tensors))]
    for name, number in sorted(message.numbers.items()):
        if not math.isfinite(number):
            raise MessageError(f"number {name!r} is not finite")
        parts += [_name(name), struct.pack("<d", number)]
    for name in sorted(message.tensors):
        tensor = message.tensors[name]
        own = message.encodings.get(name)
        code, values = _values(name, tensor, encoding(own) if own else _shared_encoding(tensor, encoding(common)))
        shape = struct.pack(f"<BB{tensor.dim()}I", code, tensor.dim(), *tensor.shape)
        parts += [_name(name), shape, values]
    body = b"".join(parts)
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def _shared_encoding(tensor: Tensor, common: Encoding) -> Encoding:
    if tensor.dim() > 1 or tensor.numel() > VECTOR:
        return common
    return Encoding(common.form) if common.plain else Encoding("float32")


def decode(data: bytes, limit: int = LIMIT, shapes: Shapes | None = None) -> Message:
    """Bytes as a message; floating tensors come back as float32.

    Parameters
    ----------
    limit
        Bytes of the longest message that is taken.
    shapes
        The tensors that were agreed on, where they are known: any other is refused before it is allocated. Without
        them, sparse tensors and slices are refused, because few bytes of those may announce many numbers; any other
        form grows at most twentyfold (ternary).

    Raises
    ------
    MessageError
        Naming what is wrong: too large, truncated, trailing bytes, bad checksum, unknown form, NaN or Inf, a repeated
        or unreadable name, codes, positions or shapes that cannot be.
    """
    if len(data) > limit:
        raise MessageError(f"message of {len(data)} bytes; allowed: at most {limit}")
    if len(data) < 12 or data[:4] != MAGIC:
        raise MessageError("not a FolkLoRA message (it does not start with FLK1)")
    if zlib.crc32(memoryview(data)[8:]) != struct.unpack_from("<I", data, 4)[0]:
        raise MessageError("message is damaged or truncated: its checksum does not match")
    reader = _Reader(data, 8)
    count_numbers, count_tensors = reader.unpack("<HH")
    numbers: dict[str, float] = {}
    for _ in range(count_numbers):
        name = reader.name(numbers)
        (numbers[name],) = reader.unpack("<d")
        if not math.isfinite(numbers[name]):
            raise MessageError(f"number {name!r} is not finite")
    tensors: Tensors = {}
    for _ in range(count_tensors):
        name = reader.name(tensors)
        if shapes is not None:
            _refuse_unknown("tensor", {name}, shapes)
        tensors[name] = reader.tensor(name, None if shapes is None else shapes[name])
    if reader.at != len(data):
        raise MessageError(f"{len(data) - reader.at} bytes after the end of the message")
    return Message(tensors, numbers)


def check(message: Message, shapes: Shapes, numbers: Iterable[str] = ()) -> None:
    """Refuse a message that does not carry exactly the agreed tensors and numbers.

    Raises
    ------
    MessageError
        Naming the first missing, unknown or misshapen tensor or number.
    """
    _same_names("tensor", message.tensors, shapes)
    _same_names("number", message.numbers, dict.fromkeys(numbers))
    for name, shape in shapes.items():
        _refuse_other_shape(name, tuple(message.tensors[name].shape), shape)
        whole = kind(name) in {"index", SEALED}
        if message.tensors[name].dtype != (torch.int32 if whole else torch.float32):
            allowed = "int32" if whole else "floating point"
            raise MessageError(f"tensor {name!r} is {message.tensors[name].dtype}; allowed: {allowed}")
    if not 0 < message.numbers.get("examples", 1) <= MOST_EXAMPLES:
        raise MessageError(f"examples = {message.numbers['examples']}; allowed: above 0, at most {MOST_EXAMPLES}")


def longest(shapes: Shapes, numbers: Iterable[str] = ()) -> int:
    """Bytes of the longest message that carries these tensors and numbers: in the widest form, a scale and a mark for
    each value."""
    tensors = sum(11 + len(name.encode()) + 4 * len(shape) + 6 * math.prod(shape) for name, shape in shapes.items())
    return 12 + sum(9 + len(name.encode()) for name in numbers) + tensors


def _refuse_unknown(what: str, found: Iterable[str], agreed: Mapping[str, object]) -> None:
    if unknown := sorted(set(found) - agreed.keys()):
        raise MessageError(f"unknown {what} {unknown[0]!r}; allowed: {', '.join(list(agreed)[:4]) or 'none'} ...")


def _refuse_other_shape(name: str, found: tuple[int, ...], agreed: tuple[int, ...]) -> None:
    if found != agreed:
        raise MessageError(f"tensor {name!r} has shape {found}; allowed: {agreed}")


def _same_names(what: str, found: Mapping[str, object], agreed: Mapping[str, object]) -> None:
    _refuse_unknown(what, found, agreed)
    if missing := sorted(agreed.keys() - found.keys()):
        raise MessageError(f"{what} {missing[0]!r} is missing")


def _name(name: str) -> bytes:
    encoded = name.encode()
    if not 1 <= len(encoded) <= 255:
        raise MessageError(f"name {name!r} has {len(encoded)} bytes; allowed: 1 to 255")
    return struct.pack("<B", len(encoded)) + encoded


def _values(name: str, tensor: Tensor, wanted: Encoding) -> tuple[int, bytes]:
    """The form of a tensor and its values."""
    if tensor.dim() > _MAX_DIMENSIONS:
        raise MessageError(f"tensor {name!r} has {tensor.dim()} dimensions; allowed: at most {_MAX_DIMENSIONS}")
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        if tensor.dtype not in _CODES:
            raise MessageError(f"tensor {name!r} is {tensor.dtype}; allowed: {', '.join(map(str, _CODES))}")
        return _CODES[tensor.dtype], _raw(tensor)
    if not bool(torch.isfinite(tensor).all()):
        raise MessageError(f"tensor {name!r} holds NaN or Inf")
    narrow = tensor.to(getattr(torch, wanted.form)) if wanted.plain else tensor.float()
    if not bool(torch.isfinite(narrow).all()):
        raise MessageError(
            f"tensor {name!r} does not fit {wanted.form}: largest magnitude {float(tensor.abs().max()):g}"
        )
    if wanted.slices:
        return _SLICES, _sliced(name, narrow, wanted)
    if wanted.keep < 1 and (kept := math.ceil(wanted.keep * tensor.numel())):
        sparse = 5 + _positions_bytes(tensor.numel(), kept) + _dense_bytes(kept, wanted)
        if sparse < _dense_bytes(tensor.numel(), wanted):
            return _SPARSE, _sparse(narrow.flatten(), kept, wanted)
    return _dense(narrow, wanted)


def _dense(values: Tensor, wanted: Encoding) -> tuple[int, bytes]:
    if wanted.plain:
        return _CODES[values.dtype], _raw(values)
    if wanted.form == "int8" and wanted.block == BLOCK:
        return _INT8, _int8(values)
    return _LEVELS, struct.pack("<BH", _GRID_CODES[wanted.form], wanted.block) + _levels(
        values, wanted.form, wanted.block
    )


def _dense_bytes(count: int, wanted: Encoding) -> int:
    """Length of what `_dense` makes of so many values."""
    if wanted.plain:
        return count * int(getattr(torch, wanted.form).itemsize)
    header = 0 if wanted.form == "int8" and wanted.block == BLOCK else 3
    return header + 4 * blocks_of(count, wanted.block) + packed_bytes(count, wanted.form)


def _raw(tensor: Tensor) -> bytes:
    # NumPy has no bfloat16: its bits travel as int16.
    bits = tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor.contiguous()
    return bits.numpy().tobytes()


def _int8(tensor: Tensor) -> bytes:
    count = tensor.numel()
    blocks = torch.zeros(blocks_of(count, BLOCK), BLOCK)
    blocks.view(-1)[:count] = tensor.flatten()
    scales = blocks.abs().amax(1) / 127
    # Clamped, because the scale of a block of the smallest numbers there are may round down.
    levels = torch.round(blocks / torch.where(scales > 0, scales, 1.0)[:, None]).clamp(-127, 127).to(torch.int8)
    return scales.numpy().tobytes() + levels.flatten()[:count].numpy().tobytes()


def _levels(values: Tensor, grid: str, block: int) -> bytes:
    scales, codes = quantize(values, grid, block)
    return scales.numpy().tobytes() + pack(codes.numpy(), grid)


def _sparse(flat: Tensor, kept: int, wanted: Encoding) -> bytes:
    """The ``kept`` largest magnitudes."""
    where = torch.topk(flat.float().abs(), kept, sorted=False).indices.sort().values
    form, values = _dense(flat[where], wanted)
    low, length = _positions_shape(len(flat), kept)
    positions = where.numpy()
    high = np.zeros(length, dtype=np.uint8)
    high[(positions >> low) + np.arange(kept)] = 1
    coded = pack_bits(positions & ((1 << low) - 1), low) + np.packbits(high, bitorder="little").tobytes()
    return struct.pack("<BI", form, kept) + coded + values


def _positions_shape(count: int, kept: int) -> tuple[int, int]:
    """Low bits of a position, and bits of the array that holds the high ones."""
    low = (count // kept).bit_length() - 1
    return low, kept + ((count - 1) >> low)


def _positions_bytes(count: int, kept: int) -> int:
    low, length = _positions_shape(count, kept)
    return -(-low * kept // 8) + -(-length // 8)


def _sliced(name: str, matrix: Tensor, wanted: Encoding) -> bytes:
    axis = _AXES[wanted.form]
    if matrix.dim() != 2 or matrix.shape[axis] != len(wanted.slices):
        raise MessageError(f"tensor {name!r} of shape {tuple(matrix.shape)} has no {len(wanted.slices)} {wanted.form}")
    parts = [
        _levels(one.contiguous(), _GRIDS[grid], wanted.block)
        for one, grid in zip(matrix.unbind(axis), wanted.slices, strict=True)
        if grid
    ]
    return struct.pack(f"<BH{len(wanted.slices)}B", axis, wanted.block, *wanted.slices) + b"".join(parts)


class _Reader:
    """A cursor over received bytes that never reads past their end."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise MessageError(f"message ends early: {count} bytes announced, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def name(self, taken: Mapping[str, object]) -> str:
        (length,) = self.unpack("<B")
        try:
            name = self.take(length).decode()
        except UnicodeDecodeError:
            raise MessageError("a name is not UTF-8") from None
        if not name or name in taken:
            raise MessageError(f"name {name!r} is empty or repeated")
        return name

    def tensor(self, name: str, agreed: tuple[int, ...] | None = None) -> Tensor:
        code, dimensions = self.unpack("<BB")
        if dimensions > _MAX_DIMENSIONS:
            raise MessageError(f"tensor {name!r} has {dimensions} dimensions; allowed: at most {_MAX_DIMENSIONS}")
        shape = self.unpack(f"<{dimensions}I")
        if agreed is not None:
            _refuse_other_shape(name, shape, agreed)
        count = math.prod(shape)
        if count == 0 and max(shape) > len(self.data):
            raise MessageError(f"tensor {name!r} has the impossible shape {shape}")
        if code in (_SPARSE, _SLICES):
            if agreed is None:
                raise MessageError(
                    f"tensor {name!r} is not written in full; allowed: only where its shape was agreed on"
                )
            tensor = self._sparse(name, count) if code == _SPARSE else self._slices(name, shape)
        else:
            tensor = self._dense(name, code, count)
        # NumPy's test: torch's makes several copies on the way.
        if tensor.is_floating_point() and not bool(np.isfinite(tensor.numpy()).all()):
            raise MessageError(f"tensor {name!r} holds NaN or Inf")
        return tensor.view(shape)

    def _dense(self, name: str, code: int, count: int) -> Tensor:
        if code == _INT8:
            return self._int8(count)
        if code == _LEVELS:
            grid, block = self.unpack("<BH")
            return self._levels(name, grid, block, count)
        if code in _PLAIN:
            return self._plain(_PLAIN[code], count)
        raise MessageError(f"tensor {name!r} has the unknown form {code}")

    def _plain(self, dtype: torch.dtype, count: int) -> Tensor:
        raw = self.take(count * dtype.itemsize)
        if not raw:
            tensor = torch.empty(0, dtype=dtype)
        else:
            tensor = torch.frombuffer(bytearray(raw), dtype=dtype)
        return tensor.float() if dtype.is_floating_point else tensor

    def _int8(self, count: int) -> Tensor:
        blocks = blocks_of(count, BLOCK)
        scales = np.frombuffer(self.take(blocks * 4), dtype="<f4")
        levels = np.frombuffer(self.take(count), dtype=np.int8)
        values = np.zeros((blocks, BLOCK), dtype=np.float32)
        values.reshape(-1)[:count] = levels
        with np.errstate(all="ignore"):  # a scale may be anything: the caller refuses what is not finite
            values *= scales[:, None]
        return torch.from_numpy(values.reshape(-1)[:count])

    def _levels(self, name: str, grid: int, block: int, count: int) -> Tensor:
        if grid not in _GRIDS or not block:
            raise MessageError(f"tensor {name!r} has the unknown grid {grid} or blocks of {block}")
        # Both are there before anything is made of them.
        scales = self.take(4 * blocks_of(count, block))
        packed = self.take(packed_bytes(count, _GRIDS[grid]))
        try:
            codes = unpack(packed, count, _GRIDS[grid])
        except ValueError as error:
            raise MessageError(f"tensor {name!r}: {error}") from None
        return dequantize(_floats(scales), torch.from_numpy(codes), _GRIDS[grid], block)

    def _sparse(self, name: str, count: int) -> Tensor:
        code, kept = self.unpack("<BI")
        if not 1 <= kept <= count:
            raise MessageError(f"tensor {name!r} sends {kept} of {count} values")
        low, length = _positions_shape(count, kept)
        lows, highs = self.take(-(-low * kept // 8)), self.take(-(-length // 8))
        try:
            where = unpack_bits(lows, kept, low).astype(np.int64)
            ones = np.flatnonzero(unpack_bits(highs, length, 1))
        except ValueError as error:
            raise MessageError(f"tensor {name!r}: {error}") from None
        if len(ones) != kept:
            raise MessageError(f"tensor {name!r} names {len(ones)} positions for {kept} values")
        where |= (ones - np.arange(kept)) << low
        if bool((np.diff(where) <= 0).any()) or int(where[-1]) >= count:
            raise MessageError(f"tensor {name!r} names positions that repeat or lie outside")
        values = self._dense(name, code, kept)
        if not values.is_floating_point():
            raise MessageError(f"tensor {name!r} is sparse and holds integers")
        tensor = torch.zeros(count)
        tensor[torch.from_numpy(where)] = values
        return tensor

    def _slices(self, name: str, shape: tuple[int, ...]) -> Tensor:
        axis, block = self.unpack("<BH")
        if axis > 1 or len(shape) != 2:
            raise MessageError(f"tensor {name!r} of shape {shape} has no slices along {axis}")
        grids = self.take(shape[axis])
        length = shape[1 - axis]
        zero = torch.zeros(length)
        slices = [self._levels(name, grid, block, length) if grid else zero for grid in grids]
        return torch.stack(slices, axis) if slices else torch.zeros(shape)


def _floats(raw: bytes) -> Tensor:
    """Little-endian float32 as a tensor of its own."""
    return torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32))
