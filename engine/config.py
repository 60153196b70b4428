"""EngineConfig: everything the engine can be told. Frozen: what is found out at load time lives elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

GPU_ROWS, CPU_ROWS = 2048, 32     # max_rows where it is not set
MOST_ROWS = 65_535                # a grid of CUDA's has no more programs along its last dimensions


@dataclass(frozen=True, slots=True)
class EngineConfig:
    device: str = "auto"                 # auto | cuda | cuda:N | cpu
    dtype: str = "auto"                  # auto: bfloat16 on CUDA, or float16 for integer weights that come in it, float32 on CPU
    quantization: str = "stored"         # weights: stored (as they come) | fp8 (made from plain ones) | dense (GGUF unpacked)
    kv_dtype: str = "auto"               # keys and values: auto (as dtype) | fp8 (half the memory of 16 bits)
    max_model_len: int | None = None     # longest prompt + output, in tokens; None: what the model was trained for, at most 8192
    max_rows: int | None = None          # rows running at once; None: 2048 on CUDA, 32 on CPU
    max_step_tokens: int | None = None   # tokens of one step; None: 16384 on CUDA, 1024 on CPU
    gpu_memory: float = 0.92             # share of the GPU's memory for weights, activations and keys and values
    unpack_share: float = 0.1            # of what keys and values have, the most for unpacked copies of packed weights
    cpu_kv_gib: float = 2.0              # size of the KV pool on CPU
    kv_pages: int | None = None          # fixed size of the KV pool, in pages (tests); None: from the memory left
    page_size: int = 32                  # token slots of a KV page
    depth: int = 2                       # steps in flight; 1: synchronous
    cuda_graphs: bool = True
    prefix_sharing: bool = True
    window: int = 8192                   # requests held ahead of admission, ordered by prefix

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"engine.dtype={self.dtype}: give auto, bfloat16, float16 or float32")
        if self.quantization not in ("stored", "fp8", "dense"):
            raise ValueError(f"engine.quantization={self.quantization}: give stored, fp8 or dense")
        if self.kv_dtype not in ("auto", "fp8"):
            raise ValueError(f"engine.kv_dtype={self.kv_dtype}: give auto or fp8")
        if self.depth not in (1, 2):
            raise ValueError("engine.depth must be 1 or 2")
        if self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ValueError("engine.page_size must be a power of two of at least 16")
        for name in ("max_model_len", "max_rows", "max_step_tokens", "kv_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"engine.{name}={value}: give at least 1, or null to leave it to the engine")
        if self.max_rows is not None and self.max_rows > MOST_ROWS:
            raise ValueError(f"engine.max_rows={self.max_rows}: give at most {MOST_ROWS}")
        if self.window < 1 or self.cpu_kv_gib <= 0:
            raise ValueError(f"engine.window={self.window} and engine.cpu_kv_gib={self.cpu_kv_gib:g} must be above 0")
        if not 0.05 <= self.gpu_memory <= 0.99:
            raise ValueError("engine.gpu_memory must lie between 0.05 and 0.99")
        if not 0 <= self.unpack_share < 1:
            raise ValueError(f"engine.unpack_share={self.unpack_share:g}: give a share of at least 0 (never unpack) and below 1")
