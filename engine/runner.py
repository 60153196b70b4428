"""The runner: turns a plan into launches on the compute stream, forward and sample apart, and brings the tokens back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import sampler
from engine.automata import Automata
from engine.cuda_graphs import CudaGraphs, coarse_sizes, graph_sizes
from engine.layers.attention import LayerCache, StepInputs
from engine.models.decoder import Decoder
from engine.request import TokenLogprobs
from engine.row_table import RING, RowTable
from engine.scheduler import StepPlan
from kernels import ops


@dataclass(slots=True, eq=False)
class Step:
    """A step in flight."""

    plan: StepPlan
    logits: Tensor
    rows: Tensor                     # [S] table rows of the sampled rows, on the device
    positions: Tensor                # [S] position of the token they are sampled from
    tokens: Tensor | None = None     # [S] on the host, once `done`
    logprobs: sampler.LogprobsOut | None = None
    done: torch.cuda.Event | None = None


class Runner:
    def __init__(self, model: Decoder, table: RowTable, caches: list[LayerCache], automata: Automata, use_graphs: bool) -> None:
        self.model, self.table, self.caches, self._automata = model, table, caches, automata
        self.device = table.device
        self.steps = self.graph_steps = 0
        rows, vocab = table.max_rows, model.spec.vocab_size
        self._pinned = self.device.type == "cuda"
        self._host_tokens = [torch.empty(rows, dtype=torch.int32, pin_memory=self._pinned) for _ in range(RING)]
        self._host_mask = [torch.empty(0, -(-vocab // 32), dtype=torch.int32) for _ in range(RING)]
        self._one_each = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        self._graphs: CudaGraphs | None = None
        self._logits: Tensor | None = None
        if use_graphs and self._pinned:
            # One buffer for all graphs: an output of its own for each would keep the logits of every size alive.
            self._logits = torch.empty(rows, vocab, dtype=model.dtype, device=self.device)
            pool = torch.cuda.graph_pool_handle()
            self._graphs = CudaGraphs(self._decode, graph_sizes(rows), pool)
            self._sharing_graphs = CudaGraphs(lambda n: self._decode(n, sharing=True), coarse_sizes(rows), pool)

    def warm_up(self) -> None:
        """Capture the graphs, all rows being dummies meanwhile; those with shared prefixes wait until a job needs them."""
        if self._graphs is not None:
            self.table.rows.fill_(self.table.dummy)
            self._graphs.capture_all()

    # --- forward ---

    def launch_forward(self, plan: StepPlan) -> Step:
        """Apply the staged writes and run the model over the plan; returns at once."""
        self.steps += 1
        n = plan.num_decode
        pure = n == plan.rows.size
        rows, starts = plan.rows, plan.starts
        if pure and self._graphs is not None:
            graphs = self._graphs if plan.shared is None else self._sharing_graphs
            size = graphs.padded(n)
            rows = np.concatenate([rows, np.full(size - n, self.table.dummy, dtype=np.int32)])
            starts = np.concatenate([starts, np.zeros(size - n, dtype=np.int32)])
            self._stage(plan, rows, starts)
            self.table.flush(np.empty(0, dtype=np.int32))
            self.graph_steps += 1
            return Step(plan, graphs.replay(size)[:n], self.table.rows[:n], self.table.starts[:n])
        self._stage(plan, rows, starts)
        if pure:
            self.table.flush(np.empty(0, dtype=np.int32))
            logits = self._decode(n, plan.shared is not None, int(starts.max()) + 1)
            return Step(plan, logits, self.table.rows[:n], self.table.starts[:n])
        return self._mixed(plan)

    def _stage(self, plan: StepPlan, rows: np.ndarray, starts: np.ndarray) -> None:
        self.table.stage_step(rows, starts)
        if plan.shared is not None and plan.prefix_tiles is not None:
            padding = np.zeros(rows.size - plan.rows.size, dtype=np.int32)
            self.table.stage_prefixes(np.concatenate([plan.shared, padding]), plan.prefix_tiles)

    def _prefixes(self, n: int, sharing: bool) -> tuple[Tensor | None, Tensor | None]:
        return (self.table.shared[:n], self.table.prefix_tiles) if sharing else (None, None)

    def _decode(self, n: int, sharing: bool = False, max_context: int | None = None) -> Tensor:
        """One query for each of the first n rows of the table -> logits [n, V]. The captured part: reads device state alone."""
        table = self.table
        ids, positions, slots = self._empty(n)
        ops.expand(table.tokens, table.block_table, table.rows[:n], table.starts[:n], self._one_each[: n + 1], 1, table.page_size,
                   ids, positions, slots)
        inputs = StepInputs(ids, positions, slots, table.block_table, table.rows[:n], n, max_context or table.max_len,
                            *self._prefixes(n, sharing))
        return self.model.logits(self.model(inputs, self.caches), self._logits[:n] if self._logits is not None else None)

    def _mixed(self, plan: StepPlan) -> Step:
        table, n = self.table, plan.num_decode
        counts = plan.counts[n:]
        cu_q = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        ends = np.concatenate([np.arange(n, dtype=np.int32), n + cu_q[1:] - 1])
        sampled_rows = plan.rows[plan.sampled]
        positions_of = (plan.starts + plan.counts - 1)[plan.sampled]
        parts = [cu_q, ends[plan.sampled].astype(np.int32), sampled_rows, positions_of, _tiles(counts).ravel()]
        extra = table.flush(np.concatenate(parts))
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
        inputs = StepInputs(ids, where, slots, table.block_table, table.rows[:n], n, int(plan.starts[:n].max(initial=0)) + 1,
                            *self._prefixes(n, plan.shared is not None), table.rows[rest], table.starts[rest], rest_cu_q,
                            tiles.view(-1, 2))
        hidden = self.model(inputs, self.caches)
        return Step(plan, self.model.logits(hidden[at]), rows, positions)

    def _empty(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, slots = torch.empty(3, n, dtype=torch.int32, device=self.device).unbind()
        return ids, positions, slots

    # --- sample ---

    def launch_sample(self, step: Step, mask: np.ndarray | None) -> None:
        """Sample the step's rows, commit the tokens to the row table and start their way to the host; returns at once."""
        plan, n = step.plan, step.plan.sampled.size
        turn = self.steps % RING
        device_mask = masked = None
        if mask is not None:
            device_mask = torch.from_numpy(mask).to(self.device, non_blocking=True)
            masked = torch.from_numpy(plan.guided).to(self.device, non_blocking=True)
        if n:
            automata = self._automata if plan.by_automata else None
            tokens, step.logprobs = sampler.sample(step.logits, self.table, step.rows, step.positions, plan.special, device_mask,
                                                   masked, automata)
            out = torch.empty_like(tokens)
            ops.commit(self.table.tokens, step.rows, step.positions, tokens, out)
            if automata is not None:
                automata.advance(self.table.grammar, step.rows, tokens)
            step.tokens = self._host_tokens[turn][:n]
            step.tokens.copy_(out, non_blocking=True)
        else:
            step.tokens = self._host_tokens[turn][:0]
        if self._pinned:
            step.done = torch.cuda.Event()
            step.done.record()

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
