"""The runner: turns a plan into launches on the compute stream, forward and sample apart, and brings the tokens back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import sampler
from engine.automata import Automata
from engine.cuda_graphs import CudaGraphs, graph_sizes, padded, unbeaten
from engine.layers.attention import KVCache, StepInputs
from engine.mixed_steps import WORTH, Shape, Shapes, shape_of, tiles_of
from engine.models.decoder import Decoder
from engine.plan import StepPlan, rehearsal
from engine.prefix_groups import MIN_ROWS
from engine.request import TokenLogprobs
from engine.row_table import RING, RowTable
from kernels import ops

MEASURED = 1024         # rows up to which decode steps of every size are timed; those of more take as long as they have FLOP
FEW = 64                # rows below which decode attention has several ways
TWO = np.array([2], dtype=np.int32)


@dataclass(slots=True)
class Graphs:
    sizes: list[int]                 # padded numbers of rows, ascending
    shapes: Shapes
    plain: CudaGraphs[int]           # decode steps ...
    shared: CudaGraphs[int]          # ... that say which rows share a prefix
    mixed: CudaGraphs[Shape]
    sample: CudaGraphs[int]


@dataclass(slots=True, eq=False)
class Step:
    """A step in flight."""

    plan: StepPlan
    logits: Tensor
    tokens: Tensor | None = None     # [S] on the host, once `done`
    logprobs: sampler.LogprobsOut | None = None
    done: torch.cuda.Event | None = None


class Runner:
    """sharing: plans may say which decode rows share a prefix."""

    def __init__(self, model: Decoder, table: RowTable, caches: KVCache, automata: Automata, use_graphs: bool,
                 sharing: bool, max_step_tokens: int) -> None:
        self.model, self.table, self.caches, self._automata = model, table, caches, automata
        self.device = table.device
        self.steps = self.graph_steps = 0
        rows, vocab = table.max_rows, model.spec.vocab_size
        self._pinned = self.device.type == "cuda"
        self._sharing = sharing
        self._host_tokens = [torch.empty(rows, dtype=torch.int32, pin_memory=self._pinned) for _ in range(RING)]
        self._host_mask = [torch.empty(0, -(-vocab // 32), dtype=torch.int32) for _ in range(RING)]
        # Ids, positions and slots of a step or rehearsal: some that there are, also where the kernels that write them do not run.
        self._inputs = [torch.zeros(rows + max(max_step_tokens, 2), dtype=torch.int32, device=self.device) for _ in range(3)]
        self._one_each = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        self._logits: Tensor | None = None
        self._graphs: Graphs | None = None
        # One buffer for all graphs: an output of its own for each would keep the outputs of every size alive.
        self._last = torch.empty(rows, model.spec.hidden_size, dtype=model.dtype, device=self.device)
        if use_graphs and self._pinned:
            self._logits = torch.empty(rows, vocab, dtype=model.dtype, device=self.device)
            pool = torch.cuda.graph_pool_handle()
            self._graphs = Graphs(
                graph_sizes(rows), Shapes(model.token_flops(), rows, table.max_len, max_step_tokens),
                CudaGraphs(lambda n: self._decode(n, sharing=False), pool),
                CudaGraphs(lambda n: self._decode(n, sharing=True), pool),
                CudaGraphs(self._forward_mixed, pool), CudaGraphs(self._sample_and_commit, pool))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what steps launch, load what those with prompts need, capture the graphs: with dummies for all rows."""
        table = self.table
        ops.copy_pages(self.caches.storage, torch.zeros(1, 2, dtype=torch.int32, device=self.device))
        table.rows.fill_(table.dummy)
        table.sampled_rows.fill_(table.dummy)
        if self._graphs is not None:
            self._compile(self._graphs)
        if self._pinned:
            for sharing in (False, True) if self._sharing else (False,):
                small = rehearsal(table.dummy, 1, TWO, sharing)
                for shape in self._graphs.shapes.full(sharing) if self._graphs is not None else ():
                    self._launch_mixed(small, shape_of(small), shape)
            for plan in self._rehearsals():
                for _ in range(WORTH if self._graphs is not None else 1):        # until it has a graph
                    self._mixed(plan)
            self.graph_steps = 0
        if graphs := self._graphs:
            graphs.plain.prepare(graphs.sizes[::-1])
            graphs.shared.prepare(self._shared_sizes(graphs)[::-1])
            graphs.sample.prepare(graphs.sizes[::-1])
            graphs.sizes = unbeaten(graphs.sizes, {n: graphs.plain.seconds(n) for n in graphs.sizes if n <= MEASURED})
            torch.cuda.empty_cache()             # what the first runs outside the captures used

    def _shared_sizes(self, graphs: Graphs) -> list[int]:
        return [n for n in graphs.sizes if n >= MIN_ROWS and self._sharing]

    def _compile(self, graphs: Graphs) -> None:
        """Compile what steps launch, which would be one kernel after another when they are first launched.

        Decode steps of more than MEASURED rows have no kernels of their own. Beside prompts any number of rows decodes, for which
        attention has ways of its own between two sizes, if few.
        """
        plain = sorted({n for size in graphs.sizes for n in (size, size - 1) if n and (n == size or n < FEW)})
        with ops.compiling(), self.model.one_block_of_each_kind():
            for plan in self._rehearsals():
                self._forward_mixed(shape_of(plan))
            for sizes, sharing in ((plain, False), (self._shared_sizes(graphs), True)):
                for n in sizes:
                    if n <= MEASURED:
                        self._decode(n, sharing)
            for n in graphs.sizes:
                if n <= MEASURED:
                    self._sample_and_commit(n)

    def _rehearsals(self) -> Iterator[StepPlan]:
        """Steps of dummy rows: the largest that is to have a graph, and every variant."""
        table, graphs = self.table, self._graphs
        for sharing, few in ((False, 1), (True, MIN_ROWS)) if self._sharing else ((False, 1),):
            for decode in sorted({min(few, table.max_rows), table.max_rows}, reverse=True):        # keys are split, and not
                largest = graphs.shapes.most_tokens - decode if graphs is not None else 0
                for tokens in (largest, 2):
                    if tokens >= 2:
                        rest = min(table.max_rows, tokens // 2)
                        yield rehearsal(table.dummy, decode, np.full(rest, min(tokens // rest, table.max_len)), sharing)

    # --- forward ---

    def launch_forward(self, plan: StepPlan) -> Step:
        """Apply the staged writes and run the model over the plan; returns at once."""
        self.steps += 1
        n = plan.num_decode
        if n < plan.rows.size:
            return self._mixed(plan)
        sharing = plan.shared is not None
        if self._graphs is not None:
            graphs, size = self._graphs.shared if sharing else self._graphs.plain, padded(self._graphs.sizes, n)
            self._stage_decode(plan, size)
            self._flush(plan, size)
            self.graph_steps += 1
            return Step(plan, graphs.replay(size)[:n])
        self._stage_decode(plan, n)
        self._flush(plan, n)
        return Step(plan, self._decode(n, sharing, self._max_context(plan)))

    def _max_context(self, plan: StepPlan) -> int:
        """On CUDA always the same, since kernels are compiled for what follows from it; lengths are read on the device."""
        return self.table.max_len if self._pinned else int(plan.starts[: plan.num_decode].max(initial=0)) + 1

    def _stage_decode(self, plan: StepPlan, size: int) -> None:
        """Stage the plan's rows with one query, and dummies after them up to `size`."""
        n = plan.num_decode
        if not size:
            return
        self.table.stage_step(_filled(plan.rows[:n], size, self.table.dummy), _filled(plan.starts[:n], size, 0))
        if plan.shared is not None and plan.prefix_tiles is not None:
            self.table.stage_prefixes(_filled(plan.shared, size, 0), plan.prefix_tiles)

    def _flush(self, plan: StepPlan, size: int) -> None:
        """Stage the rows that sample, dummies after them up to `size`, send all that is staged, and copy the plan's pages."""
        rows, positions = plan.rows[plan.sampled], (plan.starts + plan.counts - 1)[plan.sampled]
        self.table.stage_sampled(_filled(rows, size, self.table.dummy), _filled(positions, size, 0))
        copies = self.table.flush(plan.copies.ravel())
        if plan.copies.size:
            ops.copy_pages(self.caches.storage, copies.view(-1, 2))

    def _prefixes(self, n: int, sharing: bool) -> tuple[Tensor | None, Tensor | None]:
        return (self.table.shared[:n], self.table.prefix_tiles[: -(-n // MIN_ROWS)]) if sharing else (None, None)

    def _decode(self, n: int, sharing: bool, max_context: int | None = None) -> Tensor:
        """One query for each of the first n rows of the table -> logits [n, V]. The captured part: reads device state alone."""
        table = self.table
        ids, positions, slots = self._first_inputs(n)
        self._expand_decode(n, ids, positions, slots)
        inputs = StepInputs(ids, positions, slots, table.block_table, table.rows[:n], n, max_context or table.max_len,
                            *self._prefixes(n, sharing))
        return self._logits_of(self.model(inputs, self.caches.layers))

    def _expand_decode(self, n: int, ids: Tensor, positions: Tensor, slots: Tensor) -> None:
        table = self.table
        ops.expand(table.tokens, table.block_table, table.rows[:n], table.starts[:n], self._one_each[: n + 1], 1, table.page_size,
                   ids, positions, slots)

    def _logits_of(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden, self._logits[: hidden.shape[0]] if self._logits is not None else None)

    # --- forward, of steps in which some rows have several queries ---

    def _mixed(self, plan: StepPlan) -> Step:
        graphs, exact = self._graphs, shape_of(plan)
        return self._launch_mixed(plan, exact, graphs.shapes.of(exact, graphs.mixed.captured) if graphs is not None else None)

    def _launch_mixed(self, plan: StepPlan, exact: Shape, shape: Shape | None) -> Step:
        """exact: the plan's own shape; shape: what to run it in, None for as it is."""
        graphs, sampled = self._graphs, plan.sampled.size
        self._stage_decode(plan, (shape or exact).decode)
        self._stage_rest(plan, shape or exact)
        self._flush(plan, padded(graphs.sizes, sampled) if graphs is not None else sampled)
        if graphs is None or shape is None:
            self._forward_mixed(exact, self._max_context(plan))
        elif shape in graphs.mixed.captured:
            graphs.mixed.replay(shape)
            self.graph_steps += 1
        else:
            graphs.mixed.launch_and_capture(shape)
        return Step(plan, self._logits_of(self._last[:sampled]))

    def _stage_rest(self, plan: StepPlan, shape: Shape) -> None:
        """Stage the rest of the plan's rows; dummy rows make up for what the shape has more of."""
        table, n = self.table, plan.num_decode
        rows, starts, counts = plan.rows[n:], plan.starts[n:], plan.counts[n:]
        tiles = tiles_of(counts)
        spare = shape.tokens - int(counts.sum())
        fill = np.diff(np.append(np.arange(0, spare, table.max_len), spare))            # a row has so many positions at most
        cu_q = np.concatenate([[0], np.cumsum(_filled(np.concatenate([counts, fill]), shape.rest, 0))])
        ends = np.concatenate([np.arange(n), shape.decode + cu_q[1 : rows.size + 1] - 1])[plan.sampled]
        unused = np.full((shape.tiles - tiles.shape[0], 2), [[0, table.max_len]])       # past the queries of its row: no work
        table.stage_rest(_filled(rows, shape.rest, table.dummy), _filled(starts, shape.rest, 0), cu_q,
                         np.concatenate([tiles, unused]), _filled(ends, self._most_sampled(shape), 0))

    def _most_sampled(self, shape: Shape) -> int:
        return min(self.table.max_rows, shape.decode + shape.rest)

    def _forward_mixed(self, shape: Shape, max_context: int | None = None) -> Tensor:
        """The staged rows -> the hidden states that rows sample from, in `_last`. Captured: reads device state alone."""
        table, n = self.table, shape.decode
        ids, positions, slots = self._first_inputs(n + shape.tokens)
        if n:
            self._expand_decode(n, ids[:n], positions[:n], slots[:n])
        rest = table.rest_rows[: shape.rest], table.rest_starts[: shape.rest], table.rest_cu_q[: shape.rest + 1]
        ops.expand(table.tokens, table.block_table, *rest, shape.tokens, table.page_size, ids[n:], positions[n:], slots[n:])
        size = self._most_sampled(shape)
        inputs = StepInputs(ids, positions, slots, table.block_table, table.rows[:n], n, max_context or table.max_len,
                            *self._prefixes(n, shape.sharing), *rest, table.tiles[: shape.tiles], table.ends[:size])
        return self._last[:size].copy_(self.model(inputs, self.caches.layers))

    def _first_inputs(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, slots = (whole[:n] for whole in self._inputs)
        return ids, positions, slots

    # --- sample ---

    def launch_sample(self, step: Step, mask: np.ndarray | None) -> None:
        """Sample the step's rows, commit the tokens to the row table and start their way to the host; returns at once."""
        plan, n = step.plan, step.plan.sampled.size
        step.tokens = self._host_tokens[self.steps % RING][:n]
        automata = self._automata if plan.by_automata else None
        graphs = self._graphs            # if there are any, logits, rows and positions are where the one of the sampling looks
        if graphs is not None and n and mask is None and automata is None and not plan.special:
            step.tokens.copy_(graphs.sample.replay(padded(graphs.sizes, n))[:n], non_blocking=True)
        elif n:
            rows, positions = self.table.sampled_rows[:n], self.table.sampled_positions[:n]
            device_mask = masked = None
            if mask is not None:
                device_mask = torch.from_numpy(mask).to(self.device, non_blocking=True)
                masked = torch.from_numpy(plan.guided).to(self.device, non_blocking=True)
            tokens, step.logprobs = sampler.sample(step.logits, self.table, rows, positions, plan.special, device_mask, masked,
                                                   automata)
            step.tokens.copy_(self._commit(tokens, rows, positions), non_blocking=True)
            if automata is not None:
                automata.advance(self.table.grammar, rows, tokens)
        if self._pinned:
            step.done = torch.cuda.Event()
            step.done.record()

    def _sample_and_commit(self, n: int) -> Tensor:
        """The first n rows of the table, whose logits a graph has left in the buffer -> tokens [n]. Captured."""
        assert self._logits is not None, "captured with the graphs of the forward pass, which make the buffer"
        rows, positions = self.table.sampled_rows[:n], self.table.sampled_positions[:n]
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


def _filled(values: np.ndarray, size: int, filler: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - values.size, filler, dtype=np.int32)])
