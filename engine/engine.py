"""The engine: requests in, completions out, over paged and continuously batched steps."""

from __future__ import annotations

import gc
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.automata import Automata
from engine.block_pool import BlockPool
from engine.config import CPU_ROWS, GPU_ROWS, EngineConfig
from engine.guided.grammar import GrammarBackend
from engine.memory import size_pool
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.plan import StepPlan
from engine.prefix_groups import PrefixGroups
from engine.recovery import Recovery
from engine.request import Completion, EngineError, EngineStats, Request
from engine.row_table import RowTable
from engine.rows import MAX_STOP_IDS
from engine.runner import Runner, Step
from engine.scheduler import Scheduler
from engine.weights import Checkpoint
from engine.window import Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAKEN = 256                  # requests taken in between two steps, some 8 ms, once as many wait as there are rows
DEFAULT_CONTEXT = 8192       # the most taken unasked of what a model was trained for: a row of the table costs as much


class Engine:
    """One model on one device. Not thread-safe: the thread that makes it submits and steps.

    `weight_bytes`: what the weights take of its memory as they are kept, without unpacked copies.
    `guided` compiles and fills grammar masks, `tokenizer` is needed for stop strings, `progress` hears of the start-up.
    Raises ValueError for a configuration that cannot work, saying what to set.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, tokenizer: PreTrainedTokenizerFast | None = None,
                 guided: GrammarBackend | None = None, progress: Callable[[str], None] = lambda message: None) -> None:
        spec = checkpoint.spec
        if len(spec.eos_token_ids) > MAX_STOP_IDS:
            raise ValueError(f"the model's config names {len(spec.eos_token_ids)} tokens as eos_token_id; at most {MAX_STOP_IDS}")
        self.config, self.vocab_size = config, spec.vocab_size
        self.device = _device(config.device)
        _check_fp8(config, spec, self.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.device.index is not None:
            torch.cuda.set_device(self.device)       # kernels, streams and events are this thread's current device's
        dtype = getattr(torch, spec.run_dtype(config.dtype, self.device.type))
        self.max_model_len = config.max_model_len or min(spec.max_positions, DEFAULT_CONTEXT)
        max_rows = config.max_rows or (GPU_ROWS if on_gpu else CPU_ROWS)
        max_step_tokens = max(config.max_step_tokens or (16384 if on_gpu else 1024), max_rows)
        self._tokenizer, self._guided = tokenizer, guided

        progress("loading weights")
        model = Decoder(spec, dtype, self.max_model_len, self.device, config.quantization, config.kv_dtype == "fp8")
        model.load(checkpoint)
        self.weight_bytes = model.weight_bytes()
        progress(f"weights {self.weight_bytes / 2**30:.2f} GiB")
        progress("sizing the KV pool")
        table = RowTable(max_rows, self.max_model_len, config.page_size, self.device, max_step_tokens)
        pages = size_pool(config, model, table, max_step_tokens)
        if unpacked := model.unpacked_bytes():
            progress(f"weights unpacked for steps of many rows too, {unpacked / 2**30:.2f} GiB (engine.unpack_share)")
        caches = model.make_cache(pages, config.page_size)
        self._pool = BlockPool(pages, config.page_size)
        self._table = table
        windowed = any(layer.window for layer in spec.layers)            # a window hides the prefix: there is nothing to share
        token_bytes = 2 * spec.num_kv_heads * spec.head_dim * model.kv_dtype.itemsize
        groups = PrefixGroups(max_rows, config.page_size, token_bytes) if config.prefix_sharing and not windowed else None
        automata = Automata(spec.vocab_size, self.device)
        self._scheduler = Scheduler(config, table, self._pool, max_step_tokens, spec.eos_token_ids, automata, tokenizer, groups)
        self._recovery = Recovery(self._scheduler)
        self._runner = Runner(model, table, caches, automata, config.cuda_graphs, groups is not None, max_step_tokens)
        self._inflight: deque[Step] = deque()
        progress("capturing CUDA graphs" if on_gpu and config.cuda_graphs else "ready")
        self._runner.warm_up()
        automata.warm_up(table.grammar, dtype)
        gc.collect()
        gc.freeze()          # the heap so far lives as long as the engine: later collections need not walk it

    # --- requests ---

    def submit(self, request: Request) -> None:
        """Queue a request; raises ValueError for one that can never run."""
        n, params = request.prompt.size, request.params
        if n == 0:
            raise ValueError("the prompt has no tokens")
        if n >= self.max_model_len:
            raise ValueError(f"the prompt has {n} tokens, which leaves no room in engine.max_model_len={self.max_model_len}")
        if int(request.prompt.view(np.uint32).max()) >= self.vocab_size:      # negative ones are large then
            raise ValueError(f"the prompt has a token outside the model's vocabulary of {self.vocab_size}")
        if len(params.stop_token_ids) + len(self._scheduler.rows.end_ids) > MAX_STOP_IDS:
            raise ValueError(f"at most {MAX_STOP_IDS - len(self._scheduler.rows.end_ids)} stop_token_ids")
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if request.grammar is not None and self._guided is None:
            raise ValueError("a grammar needs a grammar backend")
        if request.adapter is not None:
            raise ValueError("this engine has no LoRA adapters")
        self._scheduler.submit(Waiting(request, request.prompt))

    def room(self) -> int:
        """How many more requests it would like to hold before the next step: the window fills while the device computes."""
        scheduler = self._scheduler
        return min(scheduler.room(), max(TAKEN, scheduler.row_limit - len(scheduler.window)))

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""
        return self._scheduler.pending

    def overdue(self, seconds: float) -> list[Hashable]:
        """Requests that have been running for more than so many seconds; a walk over the rows, to be asked now and then."""
        return self._scheduler.overdue(seconds)

    def abort(self, ids: Iterable[Hashable] | None = None) -> None:
        """End these requests (None: all); they come back from step() as ABORTED, with what they have produced."""
        self._scheduler.abort(ids)

    # --- the step loop ---

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One turn: read the oldest step in flight, plan and launch the next one; returns the requests that finished.

        Raises EngineError where not even fewer rows at once would help (engine/recovery.py).
        """
        while len(self._inflight) >= self.config.depth:
            self._retire()
        self._scheduler.refill()
        plan = self._scheduler.schedule()
        failure: Exception | None = None
        where = ""
        if plan is not None:
            try:
                self._inflight.append(self._launch(plan))
            except Exception as error:
                where = traceback.format_exc()
                failure = error.with_traceback(None)             # whose frames would keep the step's tensors alive
        elif self._inflight:
            self._retire()
        if plan is not None and failure is not None:
            self._recover(plan, failure, where)
        done = self._scheduler.finished()
        self._recovery.ended(done)
        return done

    def _launch(self, plan: StepPlan) -> Step:
        step = self._runner.launch_forward(plan)
        mask = None
        if plan.guides and self._guided is not None:
            mask = self._runner.mask_buffer(len(plan.guides))
            self._guided.fill(plan.guides, mask)                 # while the forward pass runs
        self._runner.launch_sample(step, mask)
        return step

    def _recover(self, plan: StepPlan, failure: Exception, where: str) -> None:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                raise EngineError(f"the GPU no longer answers ({error})") from failure
        while self._inflight:
            self._retire()
        self._recovery.failed(plan, failure, where)

    def _retire(self) -> None:
        step = self._inflight.popleft()
        self._scheduler.retire(step.plan, *self._runner.wait(step))

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Pull requests as there is room for them; yield completions as rows finish, in any order."""
        source, more = iter(requests), True
        while more or self.pending:
            for _ in range(self.room() if more else 0):
                request = next(source, None)
                if request is None:
                    more = False
                    break
                self.submit(request)
            yield from self.step()

    # --- state ---

    @property
    def gpu(self) -> str | None:
        """UUID of the GPU that it computes on; None: it computes on the CPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None

    def stats(self) -> EngineStats:
        return self._scheduler.stats(self._runner.steps, self._runner.graph_steps)

    def check_integrity(self) -> None:
        """Raise AssertionError if rows, pages and their counts disagree."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Drop the device memory; the engine cannot be used afterwards."""
        while self._inflight:
            self._runner.wait(self._inflight.popleft())
        del self._runner, self._scheduler, self._recovery, self._table, self._pool
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"engine.device={name}: no such device; there are auto, cuda, cuda:N and cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine.device={name}, but torch sees no CUDA device: set engine.device=cpu or install torch with CUDA")
    return device


def _check_fp8(config: EngineConfig, spec: ModelSpec, device: torch.device) -> None:
    """Raise ValueError where something is to be FP8 on a GPU that does not have it; on the CPU torch does."""
    if device.type == "cpu" or (has := torch.cuda.get_device_capability(device)) >= (8, 9):
        return
    stored = spec.quantization is not None and spec.quantization.fp8
    for asked, what, instead in ((config.kv_dtype == "fp8", "engine.kv_dtype=fp8", "leave it at auto"),
                                 (config.quantization == "fp8", "engine.quantization=fp8", "leave it at stored"),
                                 (stored, "the model's FP8 weights", "take the model in another format")):
        if asked:
            raise ValueError(f"{what}: FP8 needs a GPU of compute capability 8.9 or more, and this one has {has[0]}.{has[1]}; "
                             f"{instead}")
