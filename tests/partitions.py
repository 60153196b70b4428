"""Gluon kernels with warp specialisation on a CPU: every partition is a thread, and what is asynchronous comes late.

A copy lands when its group is waited for, and holds NaN until then; TMA's lands as late as it likes, and what it takes back from
shared memory it reads when that is waited for; a product reads its operands at once, or when it is waited for. So a kernel that
waits too little, hands memory over too early or waits for what cannot come gives NaN or fails here. Layouts are left out:
tests/kernels/test_compile.py has them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from layoutless import run_ptx
from torch import Tensor

from kernels import hopper

SECONDS = 60        # a wait of this long is a deadlock
_counting = threading.Lock()

Number = int | float | Tensor


@dataclass
class Pointer:
    """Into a tensor, in elements."""

    base: Tensor
    at: Number = 0

    def __add__(self, offset: Number) -> Pointer:
        return Pointer(self.base, self.at + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.base.dtype)

    def place(self, mask: Tensor | bool | None) -> tuple[Tensor, Tensor]:
        """(index, mask), of one shape."""
        at, there = torch.broadcast_tensors(torch.as_tensor(self.at).long(), torch.as_tensor(True if mask is None else mask))
        assert bool(((at >= 0) & (at < _flat(self.base).numel()) | ~there).all()), "out of bounds"
        return torch.where(there, at, 0), there


def _flat(base: Tensor) -> Tensor:
    """All that lies behind its first element, as a pointer sees it."""
    return base.as_strided((base.untyped_storage().nbytes() // base.element_size() - base.storage_offset(),), (1,))


def _load(pointer: Pointer, mask: Tensor | bool | None = None, other: float = 0, cache_modifier: str = "") -> Tensor:
    at, there = pointer.place(mask)
    values = _flat(pointer.base)[at]
    return torch.where(there, values, torch.tensor(other).to(values.dtype))


def _store(pointer: Pointer, value: Number, mask: Tensor | bool | None = None, eviction_policy: str = "") -> None:
    at, there = pointer.place(mask)
    _flat(pointer.base)[at[there]] = torch.as_tensor(value).expand(at.shape)[there].to(pointer.base.dtype)


def _atomic_add(pointer: Pointer, value: int, sem: str) -> Tensor:
    with _counting:
        before = _load(pointer)
        _store(pointer, before + value)
    return before


@dataclass
class Memory:
    """Shared memory."""

    data: Tensor
    layout: object = None

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: int) -> Memory:
        return Memory(self.data[int(i)])

    def slice(self, start: int, length: int) -> Memory:
        return Memory(self.data.narrow(0, start, length))

    def permute(self, order: Sequence[int]) -> Memory:
        return Memory(self.data.permute(*order))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert (value.shape, value.dtype) == (self.data.shape, self.data.dtype)
        self.data.copy_(value)


@dataclass
class Barrier:
    """An mbarrier (PTX ISA): a phase ends when `count` have arrived and as many bytes as are expected, and the next begins."""

    count: int = 0
    left: int = 0
    expected: int = 0       # bytes that are not there yet
    phase: int = 0
    change: threading.Condition = field(default_factory=threading.Condition)


@dataclass
class Described:
    """A tensor as TMA has it, in blocks."""

    base: Tensor
    block: Sequence[int]
    layout: object

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @classmethod
    def from_tensor(cls, base: Tensor, block: Sequence[int], layout: object) -> Described:
        assert base.stride(-1) == 1
        return cls(base, block, layout)

    def part(self, at: Sequence[Number]) -> Tensor:
        """What there is of the block that begins there."""
        return self.base[tuple(slice(int(first), int(first) + size) for first, size in zip(at, self.block, strict=True))]


@dataclass
class Product:
    """Of a and b, plus acc."""

    a: Tensor | Memory
    b: Memory
    acc: Tensor | Product | None
    result: Tensor | None = None
    waited_for: bool = False

    def compute(self) -> None:
        acc = self.acc
        if isinstance(acc, Product):        # products of one sum come in their order
            acc.wait()
            acc = acc.result
        a = self.a.data if isinstance(self.a, Memory) else self.a
        result = a.double() @ self.b.data.double()
        self.result = (result if acc is None else result + acc.double()).float()

    def wait(self) -> None:
        if self.result is None:
            self.compute()
        self.waited_for = True


class Partition(threading.local):
    """What a thread has begun and not waited for."""

    copies: list[tuple[Memory, Tensor]]
    groups: list[list[tuple[Memory, Tensor]]]
    products: list[Product]
    stores: list[tuple[Described, Sequence[Number], Memory, bool]]
    landing: list[threading.Thread]
    threads: int
    program: tuple[int, ...]        # that it is of


class Chip:
    """The names that a kernel uses, by what they do here. `seed` draws how the partitions' turns interleave."""

    def __init__(self, seed: int) -> None:
        self._mine, self._broken, self._draw = Partition(), threading.Event(), random.Random(seed)

    def names(self) -> dict[str, Any]:
        types = {name: getattr(torch, name) for name in ("float16", "float32", "bfloat16", "uint8", "int16", "int32", "int64")}
        layouts = dict.fromkeys(("SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout",
                                 "SwizzledSharedLayout"), lambda *args: None)
        gl = SimpleNamespace(
            **types, **layouts, float8e4nv=torch.float8_e4m3fn, load=_load, store=_store, atomic_add=_atomic_add,
            static_range=range, exp2=torch.exp2, rsqrt=torch.rsqrt, where=_where, zeros_like=torch.zeros_like,
            reshape=torch.reshape, permute=lambda x, order: x.permute(*order), split=lambda x: x.unbind(-1),
            constexpr=object, NVMMASharedLayout=SimpleNamespace(get_default_for=lambda shape, dtype: None),
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            convert_layout=lambda x, layout, assert_trivial=False: x,
            inline_asm_elementwise=_inline_assembly, join=lambda a, b: torch.stack((a, b), -1),
            broadcast=lambda a, b: torch.broadcast_tensors(a, b),
            allocate_shared_memory=_allocate, warp_specialize=self._run,
            program_id=lambda axis: self._mine.program[axis])
        return {
            "gl": gl, "lines": lambda width, each, warps=4: None, "async_load": self._copy, "barrier": lambda: None,
            "reinterpret": lambda memory, dtype, shape, layout: Memory(memory.data.view(dtype).view(*shape)),
            "fence_async_shared": lambda: None, "after": lambda overlap: None, "prefetch": lambda pointers: None,
            "async_copy": SimpleNamespace(commit_group=self._commit, wait_group=self._wait_group),
            "arrive_when_copied": self._arrive_when_copied,
            "mbarrier": SimpleNamespace(init=_init, wait=self._wait, arrive=self._arrive, expect=self._expect,
                                        MBarrierLayout=lambda: None),
            "TensorDescriptor": Described, "tma_load": self._bring, "tma": SimpleNamespace(store_wait=self._wait_stores),
            "tma_store": lambda target, at, source: self._mine.stores.append((target, at, source, False)),
            "tma_add": lambda target, at, source: self._mine.stores.append((target, at, source, True)),
            "warpgroup_mma": self._multiply, "warpgroup_mma_wait": self._wait_products,
        }

    def begin(self, program: tuple[int, ...]) -> None:
        """What this thread does from here on is the program's."""
        self._mine.program = program

    def _run(self, partitions: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]) -> None:
        errors: list[BaseException] = []
        program = self._mine.program

        def run(function: Callable[..., None], args: tuple, threads: int) -> None:
            mine = self._mine
            mine.threads, mine.program = threads, program
            mine.copies, mine.groups, mine.products, mine.stores, mine.landing = [], [], [], [], []
            try:
                function(*args)
                for thread in mine.landing:
                    thread.join()
                assert not (mine.copies or any(mine.groups) or mine.products or mine.stores), "not waited for"
            except BaseException as error:
                errors.append(error)
                self._broken.set()

        threads = [threading.Thread(target=run, args=(*partition, 32 * each))
                   for partition, each in zip(partitions, (4, *warps), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _pause(self) -> None:
        if self._draw.random() < 0.3:
            time.sleep(self._draw.random() * 2e-3)

    def _wait(self, barrier: Barrier, phase: int, pred: bool = True) -> None:
        if not pred:
            return
        self._pause()
        with barrier.change:
            done = barrier.change.wait_for(lambda: barrier.phase != phase or self._broken.is_set(), SECONDS)
        assert done and not self._broken.is_set(), "deadlock, or another partition has failed"

    def _arrive(self, barrier: Barrier, count: int, size: int = 0) -> None:
        """size: bytes that have arrived."""
        self._pause()
        with barrier.change:
            barrier.left -= count
            barrier.expected -= size
            assert barrier.left >= 0, "too many have arrived"
            if not barrier.left and not barrier.expected:
                barrier.left, barrier.phase = barrier.count, barrier.phase ^ 1
                barrier.change.notify_all()

    def _copy(self, target: Memory, source: Pointer, mask: Tensor | None = None, eviction_policy: str = "") -> None:
        values = _load(source, None if mask is None else mask.expand(target.data.shape))
        assert list(values.shape) == target.shape
        target.data.fill_(float("nan") if target.dtype.is_floating_point else -1)
        self._mine.copies.append((target, values))

    def _commit(self) -> None:
        self._mine.groups.append(self._mine.copies)
        self._mine.copies = []

    def _arrive_when_copied(self, barrier: Barrier) -> None:
        """In a thread of its own, as late as it likes, but after the ones before."""
        copies, earlier, threads = self._mine.copies, self._mine.landing[-1:], self._mine.threads

        def land() -> None:
            self._pause()
            for thread in earlier:
                thread.join()
            for target, values in copies:
                target.store(values)
            self._arrive(barrier, threads)

        self._mine.copies = []
        self._mine.landing.append(threading.Thread(target=land))
        self._mine.landing[-1].start()

    def _expect(self, barrier: Barrier, size: int) -> None:
        with barrier.change:
            barrier.expected += size
        self._arrive(barrier, 1)

    def _bring(self, source: Described, at: Sequence[Number], ready: Barrier, target: Memory) -> None:
        """In a thread of its own, as late as it likes; 0 past the matrix."""
        assert list(source.block) == target.shape
        target.data.fill_(float("nan"))

        def land() -> None:
            self._pause()
            part = source.part(at)
            target.data.zero_()
            target.data[tuple(map(slice, part.shape))] = part
            self._arrive(ready, 0, target.data.nbytes)

        self._mine.landing.append(threading.Thread(target=land))
        self._mine.landing[-1].start()

    def _wait_stores(self, outstanding: int) -> None:
        self._pause()
        while len(self._mine.stores) > outstanding:
            target, at, source, added = self._mine.stores.pop(0)
            assert list(target.block) == source.shape
            part = target.part(at)
            values = source.data[: part.shape[0], : part.shape[1]]
            part.copy_(part + values if added else values)

    def _wait_group(self, outstanding: int) -> None:
        self._pause()
        while len(self._mine.groups) > outstanding:
            for target, values in self._mine.groups.pop(0):
                target.store(values)

    def _multiply(self, a: Tensor | Memory, b: Memory, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
        asked = Product(a, b, acc if use_acc else None)
        if self._draw.random() < 0.5:
            asked.compute()
        self._mine.products.append(asked)
        return asked if is_async else self._wait_products(0, (asked,))

    def _wait_products(self, outstanding: int, deps: Sequence[Tensor | Product]) -> Any:
        self._pause()
        while len(self._mine.products) > outstanding:
            self._mine.products.pop(0).wait()
        results = tuple(dep.result if isinstance(dep, Product) and dep.waited_for else dep for dep in deps)
        return results if len(results) > 1 else results[0]


def _inline_assembly(asm: str, constraints: str, args: Sequence[Tensor], dtype: torch.dtype | tuple[torch.dtype, ...],
                     is_pure: bool, pack: int) -> Any:
    """Elements in the order of memory are packed into registers, as the compiler does with those of a lane."""
    outputs, shape = constraints.count("="), args[0].shape
    registers = [arg.expand(shape).contiguous().view(-1, pack).view(torch.int32).numpy().view(np.uint32) for arg in args]
    columns = [part[:, i] for part in registers for i in range(part.shape[1])]
    results = run_ptx(asm, {f"${outputs + i}": column for i, column in enumerate(columns)})
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    each = outputs // len(kinds)
    made = [torch.from_numpy(np.stack([results[f"${each * i + j}"] for j in range(each)], 1)).view(kind).view(shape)
            for i, kind in enumerate(kinds)]
    return tuple(made) if isinstance(dtype, tuple) else made[0]


def _where(condition: Tensor | bool, a: Number, b: Number) -> Tensor:
    return torch.where(torch.as_tensor(condition), a, b)


def activate(x: Tensor, gelu: bool) -> Tensor:
    """See pointwise.activate, which is for Triton's interpreter: for `others` of `emulated`."""
    return functional.gelu(x, approximate="tanh") if gelu else functional.silu(x)


def gate(low: Tensor, up: Tensor, gelu: bool, dtype: torch.dtype) -> Tensor:
    """See pointwise.gate, likewise."""
    return (activate(low, gelu).to(dtype).float() * up).to(dtype)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.left = count


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if dtype == torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)], shape=shape)
    return Memory(torch.full(shape, float("nan")).to(dtype) if dtype.is_floating_point else torch.full(shape, -1, dtype=dtype))


class Launch:
    """A kernel that is launched as ever: kernel[grid](...). Programs run one after the other, or `together`."""

    def __init__(self, function: FunctionType, chip: Chip, gl: SimpleNamespace, together: bool) -> None:
        self._function, self._chip, self._gl, self._together = function, chip, gl, together

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            def run(program: tuple[int, ...]) -> None:
                self._chip.begin(program)
                self._function(*(Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args), **constants)

            self._gl.num_programs = lambda axis: grid[axis]
            programs = list(product(*map(range, grid)))
            with ThreadPoolExecutor(len(programs) if self._together else 1) as pool:
                list(pool.map(run, programs))
        return launch


def emulated(module: ModuleType, kernel: str, together: bool = False, **others: Any) -> SimpleNamespace:
    """The module's functions over a Chip; `kernel` is launched by them; `others` take the place of names in it.

    together: its programs wait for each other.
    """
    chip = Chip(seed=0)
    names = chip.names()
    known = vars(hopper) | vars(module)         # what the module has from there may use more of it
    space: dict[str, Any] = {name: value.value if type(value).__name__ == "constexpr" else value
                             for name, value in known.items()} | names | others
    for name, value in known.items():
        function = getattr(value, "fn", value)      # of what is compiled, also what another module has
        mine = isinstance(function, FunctionType) and (function is not value or function.__module__ == module.__name__)
        if mine and name not in names and name not in others:
            space[name] = FunctionType(function.__code__, space, name, function.__defaults__, function.__closure__)
    space[kernel] = Launch(space[kernel], chip, names["gl"], together)
    return SimpleNamespace(**space)
