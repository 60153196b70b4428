"""Kernels compiled ahead of their launch, for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import triton
import triton.language as tl

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def _add_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def _wrong_kernel(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "never")
    tl.store(x, 1)


class Hopper:
    """As much of Triton's driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_ahead() -> None:
    from triton import compiler
    from triton.runtime.jit import JITFunction

    from kernels.ahead import compiling

    triton.runtime.driver.set_active(Hopper())
    launch, compile_one, threads, others = JITFunction.run, compiler.compile, [], []

    def compiled_by(*args, **options):
        threads.append(threading.get_ident())
        return compile_one(*args, **options)

    compiler.compile = compiled_by
    x = torch.zeros(64, dtype=torch.int32)
    with compiling():
        for block in (16, 32, 64, 16):
            _add_kernel[(1,)](x, 64, BLOCK=block)
    assert not x.any(), "a kernel ran"
    assert len(threads) == 3 and threading.get_ident() not in threads, threads
    kernels = _add_kernel.device_caches[0][0]
    assert len(kernels) == 3 and all("sm_90" in kernel.asm["ptx"] for kernel in kernels.values())
    assert JITFunction.run is launch
    for block in (16, 32, 64):          # none is compiled anew
        _add_kernel.warmup(x, 64, BLOCK=block, grid=(1,))
    assert len(threads) == 3
    try:
        with compiling():
            _wrong_kernel[(1,)](x, BLOCK=16)
    except Exception as error:
        assert "never" in str(error)
    else:
        raise AssertionError("an error was lost")
    assert JITFunction.run is launch
    with compiling():
        _add_kernel[(1,)](x, 64, BLOCK=32)
        _add_kernel[(1,)](x, 64, BLOCK=128)
        thread = threading.Thread(target=lambda: others.append(_add_kernel.warmup(x, 64, BLOCK=64, grid=(1,))))
        thread.start()
        thread.join()
    assert len(kernels) == 4 and len(others) == 1 and "sm_90" in others[0].asm["ptx"]


def test_kernels_compile_in_threads_and_do_not_run() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([sys.executable, __file__], cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": cache},
                              capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_ahead()
