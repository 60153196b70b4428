"""Gluon's kernels in Triton's interpreter: layouts say which lane has an element, and there are no lanes, so they are left out.

What the kernels compute is tested so, PTX included; that the layouts fit, Triton checks when it compiles (tests/kernels/
test_compile.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


class _Language(ModuleType):
    """triton.experimental.gluon.language by what triton.language has: each op with its layouts dropped."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *args, **kwargs: None
        return getattr(tl, name)

    @staticmethod
    def arange(start: int, end: int, layout: None) -> Any:
        return tl.arange(start, end)

    @staticmethod
    def full(shape: list[int], value: float, dtype: tl.dtype, layout: None) -> Any:
        return tl.full(shape, value, dtype)

    @staticmethod
    def full_like(like: Any, value: float) -> Any:
        return tl.full(like.shape, value, like.dtype)

    @staticmethod
    def allocate_shared_memory(dtype: tl.dtype, shape: list[int], layout: None, value: Any = None) -> Any:
        return _Shared(shape, value)

    @staticmethod
    def num_ctas() -> int:
        return 1        # programs run one after the other here, so no cluster of them can work together

    @staticmethod
    def convert_layout(value: Any, layout: None, assert_trivial: bool = False) -> Any:
        return value


class _Shared:
    def __init__(self, shape: list[int], value: Any) -> None:
        self.shape, self.value = shape, value

    def load(self, layout: None) -> Any:
        return self.value

    def store(self, value: Any) -> None:
        self.value = value


def _mma(a: Any, b: Any, acc: Any) -> Any:
    return tl.dot(a, b, acc, input_precision="ieee")


def _of_values(function: Any) -> Any:
    return lambda *args: function(*(arg.value if isinstance(arg, tl.constexpr) else arg for arg in args))


@triton.jit
def _nothing(pointers):
    pass


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of that name anew, with interpreted kernels."""
    gluon, ampere, language = ModuleType("gluon"), ModuleType("ampere"), _Language("language")
    gluon.jit, gluon.constexpr_function, gluon.language, ampere.mma_v2 = triton.jit, _of_values, language, _mma
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", _inline_assembly)
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    root = "triton.experimental"
    with pytest.MonkeyPatch.context() as meanwhile:      # Triton itself wants the real one
        for path, fake in {"gluon": gluon, "gluon.language": language, "gluon.language.nvidia.ampere": ampere}.items():
            meanwhile.setitem(sys.modules, f"{root}.{path}", fake)
        meanwhile.setattr(importlib.import_module(root), "gluon", gluon, raising=False)
        meanwhile.setitem(sys.modules, "kernels.fragments", language)
        del sys.modules["kernels.fragments"]        # which it imports, is made anew too
        spec.loader.exec_module(module)
    monkeypatch.setattr(module, "prefetch", _nothing, raising=False)
    return module


# --- the PTX that such kernels hold ---------------------------------------------------------------------------------------------


def _inline_assembly(builder: Any, asm: str, constraints: str, values: list, types: list, pure: bool, pack: int) -> Any:
    """Elements in the order of memory are packed into registers, as the compiler does with those of a lane."""
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    registers = []
    for value in values:
        flat = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1, pack)
        packed = flat.view(np.uint32)
        registers += [packed[:, i] for i in range(packed.shape[1])]
    outputs = constraints.count("=")
    results = run_ptx(asm, dict(zip((f"${i}" for i in range(outputs, outputs + len(registers))), registers, strict=True)))
    handles, at = [], 0
    for kind in types:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        count = max(1, pack * scalar.primitive_bitwidth // 32)        # a register of 16 bits is one too
        flat = np.stack([results[f"${at + i}"] for i in range(count)], axis=1)
        dtype = {16: np.uint16, 32: np.uint32}[scalar.primitive_bitwidth]
        if scalar == tl.float16:
            dtype = np.float16
        if scalar == tl.int16:
            dtype = np.int16
        handles.append(interpreter.TensorHandle(np.ascontiguousarray(flat).view(dtype).reshape(shape), scalar))
        at += count
    return _Call(handles)


class _Call:
    def __init__(self, handles: list) -> None:
        self.handles = handles

    def get_result(self, i: int) -> Any:
        return self.handles[i]


def run_ptx(asm: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is in the registers after these instructions (PTX ISA 8.7), each of uint32 (or, of {a, b}, uint16)."""
    state = dict(registers)

    def value(name: str) -> np.ndarray:
        return state[name] if name in state else np.uint32(int(name, 0))

    for line in re.split(r"[;\n]\s*", asm.strip().strip("{}")):
        if not line.strip() or line.startswith(".reg"):
            continue
        op, rest = line.strip().split(" ", 1)
        names = [name.strip() for name in re.sub(r"[{}]", "", rest).split(",")]
        match op, names:
            case "mov.b32", [low, high, source]:
                state[low], state[high] = (value(source) & 0xFFFF).astype(np.uint16), (value(source) >> 16).astype(np.uint16)
            case "mov.b32", [target, source]:
                state[target] = value(source)
            case "shr.u32", [target, a, b]:
                state[target] = value(a) >> value(b)
            case "prmt.b32", [target, a, b, c]:
                from_bytes = np.stack([value(x) for x in (a, b)], axis=1).view(np.uint8)
                picked = from_bytes[:, [int(value(c)) >> 4 * i & 7 for i in range(4)]]
                state[target] = np.ascontiguousarray(picked).view(np.uint32)[:, 0]
            case "movmatrix.sync.aligned.m8n8.trans.b16", [target, a]:      # a warp's registers one after another
                squares = np.ascontiguousarray(value(a)).view(np.uint16).reshape(-1, 8, 8)
                state[target] = np.ascontiguousarray(squares.transpose(0, 2, 1)).view(np.uint32).reshape(-1)
            case "lop3.b32", [target, a, b, c, "0xea"]:
                state[target] = (value(a) & value(b)) | value(c)
            case "sub.f16x2" | "sub.bf16x2", [target, a, b]:
                kind = torch.float16 if op == "sub.f16x2" else torch.bfloat16
                state[target] = _packed((_halves(value(a), kind) - _halves(value(b), kind)).to(kind))
            case "mul.f16x2" | "mul.bf16x2", [target, a, b]:
                kind = torch.float16 if op == "mul.f16x2" else torch.bfloat16
                state[target] = _packed((_halves(value(a), kind) * _halves(value(b), kind)).to(kind))
            case "fma.rn.f16x2", [target, a, b, c]:
                a, b, c = (_halves(value(name), torch.float16) for name in (a, b, c))
                state[target] = _packed((a * b + c).half())
            case "cvt.rn.f16x2.e4m3x2", [target, a]:
                codes = torch.from_numpy(np.ascontiguousarray(value(a)).view(np.uint8).copy()).view(torch.float8_e4m3fn)
                state[target] = codes.half().numpy().view(np.uint32)
            case _:
                raise ValueError(f"PTX that is not known here: {line}")
    return state


def _halves(register: np.ndarray, kind: torch.dtype) -> torch.Tensor:
    """[registers, 2], or [1, 2] of a constant; in float64, in which sums and products of them are exact."""
    words = np.atleast_1d(np.asarray(register, dtype=np.uint32))
    return torch.from_numpy(words.view(np.int16).copy()).view(kind).double().view(-1, 2)


def _packed(halves: torch.Tensor) -> np.ndarray:
    return halves.view(torch.int16).numpy().view(np.uint32)[:, 0]
