"""The runner: turns a plan into launches on the compute stream, forward and sample apart, and brings the tokens back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import sampler
from engine.automata import Automata
from engine.cuda_graphs import CudaGraphs, graph_sizes
from engine.layers.attention import KVCache, StepInputs
from engine.models.decoder import Decoder
from engine.plan import StepPlan
from engine.prefix_groups import MIN_ROWS
from engine.request import TokenLogprobs
from engine.row_table import RING, RowTable
from kernels import ops

SHARING_ALWAYS = 64     # decode rows from which on a step always asks for shared prefixes: too cheap then to matter
NO_TILES = np.empty((0, 2), dtype=np.int32)


@dataclass(slots=True, eq=False)
class Step:
    """A step in flight."""

    plan: StepPlan
    logits: Tensor
    rows: Tensor                     # [S] table rows of the sampled rows, on the device
    positions: Tensor                # [S] position of the token they are sampled from
    graphed: bool = False            # a graph ran it: logits, rows and positions are where the graph of the sampling looks
    tokens: Tensor | None = None     # [S] on the host, once `done`
    logprobs: sampler.LogprobsOut | None = None
    done: torch.cuda.Event | None = None


class Runner:
    """sharing: plans may say which decode rows share a prefix."""

    def __init__(self, model: Decoder, table: RowTable, caches: KVCache, automata: Automata, use_graphs: bool,
                 sharing: bool) -> None:
        self.model, self.table, self.caches, self._automata = model, table, caches, automata
        self.device = table.device
        self.steps = self.graph_steps = 0
        rows, vocab = table.max_rows, model.spec.vocab_size
        self._pinned = self.device.type == "cuda"
        self._sharing = sharing
        self._host_tokens = [torch.empty(rows, dtype=torch.int32, pin_memory=self._pinned) for _ in range(RING)]
        self._host_mask = [torch.empty(0, -(-vocab // 32), dtype=torch.int32) for _ in range(RING)]
        self._one_each = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        self._logits: Tensor | None = None
        self._graphs: dict[str, CudaGraphs] = {}
        if use_graphs and self._pinned:
            # One buffer for all graphs: an output of its own for each would keep the logits of every size alive.
            self._logits = torch.empty(rows, vocab, dtype=model.dtype, device=self.device)
            pool, sizes = torch.cuda.graph_pool_handle(), graph_sizes(rows)
            plain = [n for n in sizes if n <= SHARING_ALWAYS] if sharing else sizes
            shared = [n for n in sizes if n >= MIN_ROWS] if sharing else []
            self._graphs = {"plain": CudaGraphs(lambda n: self._decode(n, sharing=False), plain, pool),
                            "shared": CudaGraphs(lambda n: self._decode(n, sharing=True), shared, pool),
                            "sample": CudaGraphs(self._sample_and_commit, sizes, pool)}

    def warm_up(self) -> None:
        """Capture the graphs, all rows being dummies meanwhile; this also compiles and loads what steps with prompts need."""
        self.table.rows.fill_(self.table.dummy)
        ops.copy_pages(self.caches.storage, torch.zeros(1, 2, dtype=torch.int32, device=self.device))
        for graphs in self._graphs.values():
            graphs.capture()
        if self._graphs:
            torch.cuda.empty_cache()             # what the first runs outside the captures used

    # --- forward ---

    def launch_forward(self, plan: StepPlan) -> Step:
        """Apply the staged writes and run the model over the plan; returns at once."""
        self.steps += 1
        n = plan.num_decode
        if n < plan.rows.size:
            return self._mixed(plan)
        sharing = self._asks_for_prefixes(plan)
        if self._graphs:
            graphs = self._graphs["shared" if sharing else "plain"]
            size = graphs.padded(n)
            self._stage(plan, sharing, size - n)
            self.graph_steps += 1
            return Step(plan, graphs.replay(size)[:n], self.table.rows[:n], self.table.starts[:n], graphed=True)
        self._stage(plan, sharing)
        return Step(plan, self._decode(n, sharing, self._max_context(plan)), self.table.rows[:n], self.table.starts[:n])

    def _asks_for_prefixes(self, plan: StepPlan) -> bool:
        """By the number of rows alone where it can be, so that a step finds its kernels compiled and its graph captured."""
        return plan.shared is not None or (self._sharing and plan.num_decode >= SHARING_ALWAYS)

    def _max_context(self, plan: StepPlan) -> int:
        """On CUDA always the same, since kernels are compiled for what follows from it; lengths are read on the device."""
        return self.table.max_len if self._pinned else int(plan.starts[: plan.num_decode].max(initial=0)) + 1

    def _stage(self, plan: StepPlan, sharing: bool, padding: int = 0, extra: np.ndarray | None = None) -> Tensor:
        """Stage the plan's rows, `padding` dummies after them, flush, and copy its pages; returns `extra` on the device."""
        rows, starts = plan.rows, plan.starts
        if padding:
            rows = np.concatenate([rows, np.full(padding, self.table.dummy, dtype=np.int32)])
            starts = np.concatenate([starts, np.zeros(padding, dtype=np.int32)])
        self.table.stage_step(rows, starts)
        if sharing:
            shared = np.zeros(rows.size, dtype=np.int32)
            if plan.shared is not None:
                shared[: plan.num_decode] = plan.shared
            self.table.stage_prefixes(shared, plan.prefix_tiles if plan.prefix_tiles is not None else NO_TILES)
        extra = np.empty(0, dtype=np.int32) if extra is None else extra
        sent = self.table.flush(np.concatenate([extra, plan.copies.ravel()]))
        if plan.copies.size:
            ops.copy_pages(self.caches.storage, sent[extra.size :].view(-1, 2))
        return sent[: extra.size]

    def _prefixes(self, n: int, sharing: bool) -> tuple[Tensor | None, Tensor | None]:
        return (self.table.shared[:n], self.table.prefix_tiles[: -(-n // MIN_ROWS)]) if sharing else (None, None)

    def _decode(self, n: int, sharing: bool, max_context: int | None = None) -> Tensor:
        """One query for each of the first n rows of the table -> logits [n, V]. The captured part: reads device state alone."""
        table = self.table
        ids, positions, slots = self._empty(n)
        ops.expand(table.tokens, table.block_table, table.rows[:n], table.starts[:n], self._one_each[: n + 1], 1, table.page_size,
                   ids, positions, slots)
        inputs = StepInputs(ids, positions, slots, table.block_table, table.rows[:n], n, max_context or table.max_len,
                            *self._prefixes(n, sharing))
        return self.model.logits(self.model(inputs, self.caches.layers), self._logits[:n] if self._logits is not None else None)

    def _mixed(self, plan: StepPlan) -> Step:
        table, n = self.table, plan.num_decode
        sharing = n > 0 and self._asks_for_prefixes(plan)
        counts = plan.counts[n:]
        cu_q = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        ends = np.concatenate([np.arange(n, dtype=np.int32), n + cu_q[1:] - 1])
        sampled_rows = plan.rows[plan.sampled]
        positions_of = (plan.starts + plan.counts - 1)[plan.sampled]
        parts = [cu_q, ends[plan.sampled].astype(np.int32), sampled_rows, positions_of, _tiles(counts).ravel()]
        extra = self._stage(plan, sharing, extra=np.concatenate(parts))
        rest_cu_q, at, rows, positions, tiles = torch.split(extra, [p.size for p in parts])
        total = plan.num_tokens
        ids, where, slots = self._empty(total)
        expand = (table.tokens, table.block_table)
        if n:
            ops.expand(*expand, table.rows[:n], table.starts[:n], self._one_each[: n + 1], 1, table.page_size,
                       ids[:n], where[:n], slots[:n])
        rest = slice(n, plan.rows.size)
        ops.expand(*expand, table.rows[rest], table.starts[rest], rest_cu_q, int(counts.max()), table.page_size,
                   ids[n:], where[n:], slots[n:])
        inputs = StepInputs(ids, where, slots, table.block_table, table.rows[:n], n, self._max_context(plan),
                            *self._prefixes(n, sharing), table.rows[rest], table.starts[rest], rest_cu_q, tiles.view(-1, 2))
        hidden = self.model(inputs, self.caches.layers)
        return Step(plan, self.model.logits(hidden[at]), rows, positions)

    def _empty(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, slots = torch.empty(3, n, dtype=torch.int32, device=self.device).unbind()
        return ids, positions, slots

    # --- sample ---

    def launch_sample(self, step: Step, mask: np.ndarray | None) -> None:
        """Sample the step's rows, commit the tokens to the row table and start their way to the host; returns at once."""
        plan, n = step.plan, step.plan.sampled.size
        step.tokens = self._host_tokens[self.steps % RING][:n]
        automata = self._automata if plan.by_automata else None
        if step.graphed and mask is None and automata is None and not plan.special:
            graphs = self._graphs["sample"]
            step.tokens.copy_(graphs.replay(graphs.padded(n))[:n], non_blocking=True)
        elif n:
            device_mask = masked = None
            if mask is not None:
                device_mask = torch.from_numpy(mask).to(self.device, non_blocking=True)
                masked = torch.from_numpy(plan.guided).to(self.device, non_blocking=True)
            tokens, step.logprobs = sampler.sample(step.logits, self.table, step.rows, step.positions, plan.special, device_mask,
                                                   masked, automata)
            step.tokens.copy_(self._commit(tokens, step.rows, step.positions), non_blocking=True)
            if automata is not None:
                automata.advance(self.table.grammar, step.rows, tokens)
        if self._pinned:
            step.done = torch.cuda.Event()
            step.done.record()

    def _sample_and_commit(self, n: int) -> Tensor:
        """The first n rows of the table, whose logits a graph has left in the buffer -> tokens [n]. Captured."""
        assert self._logits is not None, "captured with the graphs of the forward pass, which make the buffer"
        rows, positions = self.table.rows[:n], self.table.starts[:n]
        tokens, _ = sampler.sample(self._logits[:n], self.table, rows, positions, [], None, None, None)
        return self._commit(tokens, rows, positions)

    def _commit(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        out = torch.empty_like(tokens)
        ops.commit(self.table.tokens, rows, positions, tokens, out)
        return out

    def mask_buffer(self, n: int) -> np.ndarray:
        """Pinned int32 [n, ceil(V / 32)] for the step at hand; free again RING steps later."""
        turn = self.steps % RING
        if self._host_mask[turn].shape[0] < n:
            self._host_mask[turn] = torch.empty(n, self._host_mask[turn].shape[1], dtype=torch.int32, pin_memory=self._pinned)
        return self._host_mask[turn][:n].numpy()

    @staticmethod
    def wait(step: Step) -> tuple[np.ndarray, dict[int, TokenLogprobs]]:
        """The step's tokens, int32 [S], and log-probabilities by index; blocks until they are there."""
        if step.done is not None:
            step.done.synchronize()
        assert step.tokens is not None, "the step was not sampled"
        return step.tokens.numpy(), step.logprobs.read() if step.logprobs is not None else {}


def _tiles(counts: np.ndarray) -> np.ndarray:
    """The work list of prefill attention: (row, first query) for each tile of QUERY_TILE queries, int32 [M, 2]."""
    tiles = -(-counts // ops.QUERY_TILE)
    row = np.repeat(np.arange(counts.size), tiles)
    first = (np.arange(row.size) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * ops.QUERY_TILE
    return np.stack([row, first], axis=1).astype(np.int32)
