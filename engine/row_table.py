"""Per-request state on the device: one permanent row per live request, changed only by staged writes.

Everything a kernel reads per row lives in one flat int32 tensor, so that a step's changes are one packed copy and one launch:

    tokens       [R + 1, length]   token ids, prompt and output
    block_table  [R + 1, pages]    KV pages; row R is the dummy row of graph padding and points at page 0, the dummy page
    params       [R + 1, 8]        sampling parameters (columns: kernels/ref.py), floats by their bits
    rows, starts [R] each          the step at hand: table row and query position of each of its rows with one query
    shared       [R]               tokens of the prefix that a decode row of the step shares with its neighbours, and
    prefix_tiles [R / 8, 2]        the runs of such rows (kernels/ref.py, decode_attention); what is not used is 0
    rest_rows, rest_starts [N]     table row and first query position of each of its other rows, mostly with several queries,
    rest_cu_q    [N + 1]           where their queries stand among the rest's, and
    tiles        [M, 2]            the work list of prefill attention (kernels/ref.py, prefill_attention)
    ends         [R]               for each row that samples, where its last query stands among the step's tokens,
    sampled_rows, sampled_positions [R]   its table row, and the position of that query
    grammar      [R + 1]           state of the token automaton a row is held to (engine/automata.py), 0: none

Writes are applied on the compute stream in launch order, which makes reuse of rows and pages safe without any other barrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams
from kernels import ops, ref
from kernels.shapes import cdiv, next_power_of_2

RING = 3     # pinned buffers in flight: the two steps of the overlap and the one being written


def most_rest(tokens: int, max_rows: int, max_len: int) -> tuple[int, int]:
    """Most rows of the rest, and tiles of them, among so many tokens; dummy rows that fill up the tokens included. Of a row whose
    prefix is there up to its last token, one query alone is left."""
    rows = min(max_rows, tokens)
    return rows + cdiv(tokens, max_len), next_power_of_2(rows + cdiv(tokens, ref.QUERY_TILE))


class RowTable:
    """max_step_tokens: the most queries that the rows of the rest have in a step."""

    def __init__(self, max_rows: int, max_len: int, page_size: int, device: torch.device, max_step_tokens: int) -> None:
        self.max_rows, self.max_len, self.page_size, self.device = max_rows, max_len, page_size, device
        self.dummy = max_rows
        self.pages_per_row = -(-max_len // page_size)
        rest, tiles = most_rest(max_step_tokens, max_rows, max_len)
        shapes = {"tokens": (max_rows + 1, max_len + 1), "block_table": (max_rows + 1, self.pages_per_row),
                  "params": (max_rows + 1, ref.PARAM_COLUMNS), "rows": (max_rows,), "starts": (max_rows,),
                  "shared": (max_rows,), "prefix_tiles": (max(1, max_rows // 8), 2), "rest_rows": (rest,), "rest_starts": (rest,),
                  "rest_cu_q": (rest + 1,), "tiles": (tiles, 2), "ends": (max_rows,), "sampled_rows": (max_rows,),
                  "sampled_positions": (max_rows,), "grammar": (max_rows + 1,)}
        self.size = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        total = sum(self.size.values())
        if total >= 2**31:
            raise ValueError(f"engine.max_rows={max_rows} x engine.max_model_len={max_len} overflows the row table: lower one")
        self.state = torch.zeros(total, dtype=torch.int32, device=device)
        self.offset: dict[str, int] = {}
        self.width = {name: shape[-1] for name, shape in shapes.items()}
        views, at = {}, 0
        for name, shape in shapes.items():
            views[name], self.offset[name] = self.state[at : at + self.size[name]].view(shape), at
            at += self.size[name]
        self.tokens, self.block_table, self.params = views["tokens"], views["block_table"], views["params"]
        self.rows, self.starts, self.grammar = views["rows"], views["starts"], views["grammar"]
        self.shared, self.prefix_tiles = views["shared"], views["prefix_tiles"]
        self.rest_rows, self.rest_starts, self.rest_cu_q = views["rest_rows"], views["rest_starts"], views["rest_cu_q"]
        self.tiles, self.ends = views["tiles"], views["ends"]
        self.sampled_rows, self.sampled_positions = views["sampled_rows"], views["sampled_positions"]
        self._pinned = device.type == "cuda"
        self._ring: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._turn = 0
        self._begin()

    # --- staging: collected until flush() ---

    def _begin(self) -> None:
        self._dst: list[np.ndarray] = []
        self._len: list[np.ndarray] = []
        self._data: list[np.ndarray] = []

    def _stage(self, dst: np.ndarray, lengths: np.ndarray, data: np.ndarray) -> None:
        self._dst.append(dst)
        self._len.append(lengths)
        self._data.append(data)

    def _stage_runs(self, name: str, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, values: np.ndarray) -> None:
        """The tensor `name` [row, starts[i] : ends[i]] = values[row, starts[i] : ends[i]] of each of `rows`."""
        lengths = ends - starts
        before = np.repeat(np.cumsum(lengths) - lengths, lengths)
        column = np.arange(before.size) - before + np.repeat(starts, lengths)
        at = self.offset[name] + rows.astype(np.int64) * self.width[name] + starts
        self._stage(at, lengths, values[np.repeat(rows, lengths), column])

    def stage_tokens(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, tokens: np.ndarray) -> None:
        """tokens[row, starts[i] : ends[i]] of each of `rows`, out of `tokens` int32 [R, length] of all rows."""
        self._stage_runs("tokens", rows, starts, ends, tokens)

    def stage_pages(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, pages: np.ndarray) -> None:
        """block_table[row, starts[i] : ends[i]] of each of `rows`, out of `pages` int32 [R, pages] of all rows."""
        self._stage_runs("block_table", rows, starts, ends, pages)

    def stage_params(self, rows: np.ndarray, params: Sequence[SamplingParams]) -> None:
        values = np.zeros((rows.size, ref.PARAM_COLUMNS), dtype=np.int32)
        values.view(np.float32)[:, [ref.TEMPERATURE, ref.TOP_P, ref.MIN_P]] = [(p.temperature, p.top_p, p.min_p) for p in params]
        values[:, ref.TOP_K] = [p.top_k for p in params]
        seeds = np.array([p.seed & 0xFFFFFFFFFFFFFFFF for p in params], dtype=np.uint64)
        values.view(np.uint32)[:, ref.SEED_LOW], values.view(np.uint32)[:, ref.SEED_HIGH] = seeds & 0xFFFFFFFF, seeds >> 32
        at = self.offset["params"] + rows.astype(np.int64) * ref.PARAM_COLUMNS
        self._stage(at, np.full(rows.size, ref.PARAM_COLUMNS), values.ravel())

    def stage_grammar(self, rows: np.ndarray, states: np.ndarray) -> None:
        self._stage(self.offset["grammar"] + rows, np.ones(rows.size, dtype=np.int64), states)

    def _stage_heads(self, **arrays: np.ndarray) -> None:
        """Each from the start of the tensor of its name. Raises IndexError for one that would run into the next tensor."""
        for name, array in arrays.items():
            if array.size > self.size[name]:
                raise IndexError(f"{array.size} values for the row table's {name}, which holds {self.size[name]}")
        self._stage(np.array([self.offset[name] for name in arrays]), np.array([array.size for array in arrays.values()]),
                    np.concatenate([array.ravel() for array in arrays.values()]))

    def stage_step(self, rows: np.ndarray, starts: np.ndarray) -> None:
        self._stage_heads(rows=rows, starts=starts)

    def stage_rest(self, rows: np.ndarray, starts: np.ndarray, cu_q: np.ndarray, tiles: np.ndarray, ends: np.ndarray) -> None:
        self._stage_heads(rest_rows=rows, rest_starts=starts, rest_cu_q=cu_q, tiles=tiles, ends=ends)

    def stage_sampled(self, rows: np.ndarray, positions: np.ndarray) -> None:
        self._stage_heads(sampled_rows=rows, sampled_positions=positions)

    def stage_prefixes(self, shared: np.ndarray, tiles: np.ndarray) -> None:
        """`shared` of the step's decode rows, `tiles` int32 [M, 2], M at most prefix_tiles' length."""
        padded = np.zeros(self.prefix_tiles.numel(), dtype=np.int32)
        padded[: tiles.size] = tiles.ravel()
        self._stage_heads(shared=shared, prefix_tiles=padded)

    def discard_staged(self) -> None:
        """Forget what was staged: the rows it was for have left."""
        self._begin()

    def flush(self, extra: np.ndarray) -> Tensor:
        """Apply what was staged, in one copy and one launch; returns `extra` (int32) on the device."""
        dst, lengths = np.concatenate(self._dst), np.concatenate(self._len)
        segments = np.empty((dst.size, 3), dtype=np.int32)
        head = extra.size + segments.size
        segments[:, 0], segments[:, 2] = dst, lengths
        segments[:, 1] = head + np.cumsum(lengths) - lengths
        packed = self._copy([extra, segments.ravel(), *self._data])
        self._begin()
        ops.apply_writes(self.state, packed, packed[extra.size : head].view(-1, 3))
        return packed[: extra.size]

    def _copy(self, arrays: list[np.ndarray]) -> Tensor:
        size = sum(a.size for a in arrays)
        if not self._pinned:
            return torch.from_numpy(np.concatenate(arrays, dtype=np.int32, casting="same_kind"))
        if len(self._ring) < RING:
            self._ring.append((torch.empty(max(size, 1 << 16), dtype=torch.int32, pin_memory=True), torch.cuda.Event()))
        buffer, event = self._ring[self._turn % len(self._ring)]
        assert event is not None
        event.synchronize()          # returns at once unless the copy that used this buffer is still under way
        if buffer.numel() < size:
            buffer = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
        np.concatenate(arrays, out=buffer.numpy()[:size], casting="same_kind")
        packed = torch.empty(size, dtype=torch.int32, device=self.device)
        packed.copy_(buffer[:size], non_blocking=True)
        event.record()
        self._ring[self._turn % len(self._ring)] = (buffer, event)
        self._turn += 1
        return packed
