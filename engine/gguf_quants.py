"""GGUF's block formats, turned into float32, or into integers with scales.

A quantised row is a run of blocks; a block holds its scales and the packed integers of 32 or 256 weights. Layouts: ggml's
`ggml-common.h`. Every unpacker takes raw blocks, uint8 [n, block bytes], and returns float32 [n, weights a block]. Where blocks
can be kept as integers there are `*_integers` too: codes uint8 [n, groups, weights a group], scales float32 [n, groups, 1] and
minimums likewise, weight = code * scale - minimum; minimum None: weight = (code - middle) * scale, middle 8 or 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Weights unpacked at a time. The arrays between stay in the cache, and torch runs operations of this size on one thread: its
# barrier after each of them costs ten times the work itself where other processes hold the cores.
_CHUNK = 1 << 14


def _half(raw: torch.Tensor, at: int) -> torch.Tensor:
    return raw[:, at:at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low halves of all bytes, then the high halves: uint8 [n, b] -> [n, 2b]."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bit j of a little-endian 32-bit word, as 16 or 0: uint8 [n, 4] -> [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts & 1) << 4).flatten(1)


Integers = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _q4_0_integers(raw: torch.Tensor) -> Integers:
    return _nibbles(raw[:, 2:])[:, None], _half(raw, 0)[:, None], None


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    return (_nibbles(raw[:, 2:]).to(torch.int8) - 8) * _half(raw, 0)


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    return _nibbles(raw[:, 4:]) * _half(raw, 0) + _half(raw, 2)


def _q5_0(raw: torch.Tensor) -> torch.Tensor:
    return ((_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).to(torch.int8) - 16) * _half(raw, 0)


def _q5_1(raw: torch.Tensor) -> torch.Tensor:
    return (_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])) * _half(raw, 0) + _half(raw, 2)


def _q8_0_integers(raw: torch.Tensor) -> Integers:
    return raw[:, None, 2:] ^ 128, _half(raw, 0)[:, None], None        # of two's complement, plus 128


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 2:].view(torch.int8) * _half(raw, 0)


def _k_scales(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of the 8 sub-blocks of Q4_K and Q5_K: two float32 [n, 8, 1]. They are 6-bit integers in 12 bytes."""
    a, b, c = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scale = torch.cat((a & 63, (c & 15) | (a >> 6 << 4)), dim=1)
    minimum = torch.cat((b & 63, (c >> 4) | (b >> 6 << 4)), dim=1)
    return (scale * _half(raw, 0))[:, :, None], (minimum * _half(raw, 2))[:, :, None]


def _k_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Four runs of 32 bytes, each two sub-blocks: uint8 [n, 128] -> [n, 8, 32]."""
    runs = packed.view(-1, 4, 1, 32)
    return torch.cat((runs & 15, runs >> 4), dim=2).view(-1, 8, 32)


def _q4_k_integers(raw: torch.Tensor) -> Integers:
    return _k_nibbles(raw[:, 16:].contiguous()), *_k_scales(raw)


def _q4_k(raw: torch.Tensor) -> torch.Tensor:
    scale, minimum = _k_scales(raw)
    return (_k_nibbles(raw[:, 16:].contiguous()) * scale - minimum).flatten(1)


def _q5_k(raw: torch.Tensor) -> torch.Tensor:
    scale, minimum = _k_scales(raw)
    shifts = torch.arange(8, dtype=torch.uint8)[None, :, None]
    high = (raw[:, None, 16:48] >> shifts & 1) << 4
    return ((_k_nibbles(raw[:, 48:].contiguous()) | high) * scale - minimum).flatten(1)


def _q6_k_integers(raw: torch.Tensor) -> Integers:
    low = raw[:, :128].reshape(-1, 2, 1, 64)                       # [n, half, 1, 64 bytes]
    low = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[:, None]
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    codes = (low | high << 4).view(-1, 16, 16) + 96                # 32 is the middle of six bits
    return codes, (raw[:, 192:208].view(torch.int8) * _half(raw, 208))[:, :, None], None


def _q6_k(raw: torch.Tensor) -> torch.Tensor:
    codes, scale, _ = _q6_k_integers(raw)
    return ((codes ^ 128).view(torch.int8) * scale).flatten(1)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One storage type of GGUF. Either plain numbers of `dtype`, or blocks that `unpack` turns into float32."""

    name: str
    weights: int                                              # weights a block
    bytes: int                                                # bytes a block
    dtype: torch.dtype = torch.float32                        # of what is read
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None
    integers: Callable[[torch.Tensor], Integers] | None = None
    bits: int = 0                                             # of the codes that `integers` gives, 4 or 8


# By GGUF's type number.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2, torch.float16),
    30: BlockType("BF16", 1, 2, torch.bfloat16),
    2: BlockType("Q4_0", 32, 18, unpack=_q4_0, integers=_q4_0_integers, bits=4),
    3: BlockType("Q4_1", 32, 20, unpack=_q4_1),
    6: BlockType("Q5_0", 32, 22, unpack=_q5_0),
    7: BlockType("Q5_1", 32, 24, unpack=_q5_1),
    8: BlockType("Q8_0", 32, 34, unpack=_q8_0, integers=_q8_0_integers, bits=8),
    12: BlockType("Q4_K", 256, 144, unpack=_q4_k, integers=_q4_k_integers, bits=4),
    13: BlockType("Q5_K", 256, 176, unpack=_q5_k),
    14: BlockType("Q6_K", 256, 210, unpack=_q6_k, integers=_q6_k_integers, bits=8),
}
# Only to name what is refused.
UNSUPPORTED_NAMES = {10: "Q2_K", 11: "Q3_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
                     22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


def dequantize(raw: torch.Tensor, kind: BlockType, shape: tuple[int, ...]) -> torch.Tensor:
    """Raw bytes, uint8 [bytes], as a tensor of `shape`: float32, or the stored dtype as a view where nothing is packed."""
    if kind.unpack is None:
        return raw.view(kind.dtype).view(shape)
    blocks = raw.view(-1, kind.bytes)
    out = torch.empty(blocks.shape[0], kind.weights, dtype=torch.float32)
    step = _CHUNK // kind.weights
    for start in range(0, blocks.shape[0], step):
        out[start:start + step] = kind.unpack(blocks[start:start + step])
    return out.view(shape)
