"""The GGUF container: metadata and tensors of one file, mapped into memory. Format: ggml's `docs/gguf.md`, versions 2 and 3."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.gguf_quants import BLOCK_TYPES, UNSUPPORTED_NAMES, BlockType, dequantize
from engine.models.config_keys import COUNT, SIZE, TEXT, check_keys
from engine.models.errors import ModelError

_KINDS = {"general.architecture": TEXT, "general.file_type": COUNT, "general.alignment": SIZE, "split.count": COUNT}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that the folder `path` holds in place of safetensors; None where there is none."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} .gguf files: give the path of one of them")
    return files[0]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape`: slowest dimension first, as torch counts."""

    shape: tuple[int, ...]
    kind: BlockType
    start: int      # byte offset in the file
    size: int       # bytes


class GgufFile:
    """An open GGUF file. `metadata`: its keys and values; `tensors`: by the file's names. No more is read until asked for.

    Raises ModelError for a file that is no GGUF, is cut short or holds a storage type that we do not unpack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: fetch it again, or give a folder of safetensors")
            # Copy on write: torch wants writable memory, and nothing that writes to it reaches the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            self._parse()
        except (struct.error, RecursionError):
            raise ModelError(f"{path} is cut short or damaged: fetch it again") from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor: packed types as float32, plain ones as a view of the file in their own dtype."""
        return dequantize(self._raw(name), self.tensors[name].kind, self.tensors[name].shape)

    def read_blocks(self, name: str) -> torch.Tensor:
        """One matrix of a packed type as it is stored, a view of the file: uint8 [rows, bytes of a row's blocks]."""
        return self._raw(name).view(self.tensors[name].shape[0], -1)

    def _raw(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return torch.frombuffer(self._map, dtype=torch.uint8, count=info.size, offset=info.start)

    def _parse(self) -> None:
        reader = _Reader(self._map)
        version = reader.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} has GGUF version {version}; versions 2 and 3, little-endian, are supported")
        n_tensors, n_keys = reader.scalar("Q"), reader.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar("I"))
        check_keys(self.metadata, _KINDS, str(self.path))
        if self.metadata.get("split.count", 1) > 1:
            raise ModelError(f"{self.path} is one part of a split GGUF: join the parts with llama-gguf-split --merge")

        table = []
        for _ in range(n_tensors):
            name = reader.string()
            dims = reader.scalars("Q", reader.scalar("I"))
            table.append((name, tuple(reversed(dims)), reader.scalar("I"), reader.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-reader.at // alignment) * alignment
        self.tensors = {name: self._info(name, shape, kind, data + offset) for name, shape, kind, offset in table}

    def _info(self, name: str, shape: tuple[int, ...], number: int, start: int) -> TensorInfo:
        kind = BLOCK_TYPES.get(number)
        if kind is None:
            raise ModelError(
                f"{self.path}: tensor {name} is stored as {UNSUPPORTED_NAMES.get(number, f'type {number}')}, which is not "
                f"supported; supported: {', '.join(k.name for k in BLOCK_TYPES.values())}")
        weights = 1
        for size in shape:
            weights *= size
        size = weights // kind.weights * kind.bytes
        if not weights or weights % kind.weights or start + size > len(self._map):
            raise ModelError(f"{self.path} is cut short or damaged at tensor {name}: fetch it again")
        return TensorInfo(shape, kind, start, size)


class _Reader:
    """A cursor over the head of the file, behind the magic."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.at = buffer, 4

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.buffer, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return values

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        size = self.scalar("Q")
        if self.at + size > len(self.buffer):
            raise struct.error("string beyond the end of the file")
        self.at += size
        return self.buffer[self.at - size:self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ModelError(f"the GGUF file's metadata holds an unknown value type {kind}: damaged, or newer than version 3")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            return list(self.scalars(_SCALARS[item], count))
        return [self.value(item) for _ in range(count)]
