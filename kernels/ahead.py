"""Kernels compiled ahead of their first launch, many at a time.

Triton compiles a kernel when it is first launched: one after another, a second or two each, a minute for all that a 4-bit 7B
launches. Its passes, LLVM and ptxas leave Python's lock, so threads share them out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from triton import AsyncCompileMode, FutureKernel
from triton.runtime._async_compile import active_mode
from triton.runtime.jit import JITFunction

MOST_THREADS = 32       # each runs its own ptxas; what does not leave the lock bounds them before
_one_at_a_time = Lock()


@contextmanager
def compiling() -> Iterator[None]:
    """Within, kernels that this thread launches do not run: they are compiled, as many at a time as there are processors to use.

    What they would write keeps what it has, memory that was never written too. All are compiled when this ends; an error in one
    of them is raised at the latest then. Other threads launch as ever, or wait here.
    """
    owner = get_ident()

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> Any:
        if get_ident() != owner:
            return launch(self, *args, warmup=warmup, **options)
        kernel = launch(self, *args, warmup=True, **options)
        if isinstance(kernel, FutureKernel) and kernel.future is not None and kernel.future.done():
            kernel.result()     # from here on Triton knows it at the next launch: 3.6 would work out anew which one that is
        return kernel

    with _one_at_a_time, ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS)) as pool:
        launch = JITFunction.run
        JITFunction.run = compile_only
        try:
            with AsyncCompileMode(pool):
                yield
        finally:
            JITFunction.run = launch
            active_mode.set(None)       # which Triton 3.6 leaves as it is after an error
