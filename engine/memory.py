"""How much memory there is for keys and values: the worst step is run once through the real path, the pool gets the rest.

Of that, packed weights may keep a copy that is ready for products of many rows. Those take as long as they have FLOP, so that a
tenth fewer rows at once cost little, while unpacking a 7B's weights takes 5 ms in every step of more than some 300 rows.
"""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.layers.attention import StepInputs
from engine.models.decoder import Decoder
from engine.row_table import RowTable
from kernels import ops

GRAPH_RESERVE = 2 << 30      # bytes kept for the pool of CUDA graphs and for what the allocator cannot reuse


def page_bytes(model: Decoder, page_size: int) -> int:
    spec = model.spec
    return 2 * spec.num_layers * spec.num_kv_heads * page_size * spec.head_dim * model.kv_dtype.itemsize


def size_pool(config: EngineConfig, model: Decoder, table: RowTable, max_step_tokens: int) -> int:
    """Pages of the KV pool, the dummy page included, after the model has unpacked its weights where there is room.

    Raises ValueError saying what to set if not even one row fits.
    """
    size = page_bytes(model, table.page_size)
    if config.kv_pages is not None:
        pages, bound = config.kv_pages, f"engine.kv_pages={config.kv_pages}"
    elif table.device.type == "cuda":
        _worst_step(model, table, max_step_tokens)
        free, total = torch.cuda.mem_get_info(table.device)
        reserved, peak = torch.cuda.memory_reserved(table.device), torch.cuda.max_memory_allocated(table.device)
        others = total - free - reserved
        budget = int(total * config.gpu_memory) - others - peak - GRAPH_RESERVE
        torch.cuda.empty_cache()
        model.unpack(min(config.unpack_share * budget, budget - (table.pages_per_row + 1) * size))
        budget -= model.unpacked_bytes()
        pages, bound = budget // size, f"engine.gpu_memory={config.gpu_memory} of {total / 2**30:.1f} GiB"
    else:
        most = table.max_rows * table.pages_per_row + 1
        pages, bound = min(most, int(config.cpu_kv_gib * 2**30) // size), f"engine.cpu_kv_gib={config.cpu_kv_gib}"
    if pages < table.pages_per_row + 1:
        need = (table.pages_per_row + 1) * size
        left = max(pages, 0) * size
        raise ValueError(f"the model does not fit: {bound} leaves {left / 2**30:.2f} GiB for keys and values, and one row of "
                         f"engine.max_model_len={table.max_len} tokens needs {need / 2**30:.2f} GiB. Lower "
                         "engine.max_model_len or engine.max_step_tokens, raise that limit, or take a smaller model")
    return int(min(pages, table.max_rows * table.pages_per_row + 1))


@torch.inference_mode()
def _worst_step(model: Decoder, table: RowTable, tokens: int) -> None:
    """A step of the most tokens and the most logits, all on the dummy page; what it launches is compiled first, many at once."""
    device = table.device
    caches = model.make_cache(1, table.page_size).layers
    length = min(tokens, table.max_len)
    counts = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    cu_q = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
    rows = torch.full((len(counts),), table.dummy, dtype=torch.int32, device=device)
    starts = torch.zeros_like(rows)
    ids, positions, slots = torch.empty(3, tokens, dtype=torch.int32, device=device).unbind()
    ops.expand(table.tokens, table.block_table, rows, starts, cu_q, length, table.page_size, ids, positions, slots)
    work = [(i, at) for i, n in enumerate(counts) for at in range(0, n, ops.QUERY_TILE)]
    tiles = torch.tensor(work, dtype=torch.int32, device=device)
    ends = torch.arange(table.max_rows, dtype=torch.int32, device=device) % tokens
    step = StepInputs(ids, positions, slots, table.block_table, rows[:0], 0, 0,
                      rest_rows=rows, rest_starts=starts, rest_cu_q=cu_q, tiles=tiles, ends=ends)
    dummies = torch.full((table.max_rows,), table.dummy, dtype=torch.int32, device=device)

    def run() -> None:
        ops.sample(model.logits(model(step, caches)), table.params, dummies, torch.zeros_like(dummies))

    with ops.compiling(), model.one_block_of_each_kind():
        run()
    run()
    torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also where it came up while a graph was captured, or a library under torch ran into it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
