"""Kernels compiled ahead of their first launch, many at a time.

Triton compiles a kernel when it is first launched: one after another, a second or two each, a minute for all that a 4-bit 7B
launches. Its passes, LLVM and ptxas leave Python's lock, so threads share them out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction


@contextmanager
def compiling() -> Iterator[None]:
    """Within, kernels that are launched do not run: they are compiled, as many at a time as there are processors to use.

    What they would write keeps what it has, memory that was never written too. All are compiled when this ends; an error in one
    of them is raised then.
    """
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, AsyncCompileMode(pool):
            yield
    finally:
        JITFunction.run = launch
