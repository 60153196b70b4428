"""After a step that failed: every row goes back to the window and runs again, fewer at once, until that works.

Out of memory: half as many tokens a step from then on, and with few tokens half as many rows. Any other error: half as many rows
until each row of the failing step has ended; so the steps halve down to the row that is at fault, which alone ends as ERROR.
Steps that fail whichever row runs end the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

import torch

from engine.memory import is_out_of_memory
from engine.outputs import in_one_line
from engine.plan import StepPlan
from engine.request import Completion, EngineError
from engine.scheduler import Scheduler

MIN_STEP_TOKENS = 256    # fewer save no memory worth having
MOST_BLAMED = 32         # rows that fail alone, one after another, before the engine itself is held to be at fault

_log = logging.getLogger(__name__)


class Recovery:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._fits = scheduler.row_limit         # rows that memory allows, as far as is known
        self._suspects: set[Hashable] = set()    # of a step that failed, as long as they have not ended
        self._blamed = 0
        self._logged: set[str] = set()

    def failed(self, plan: StepPlan, error: Exception, where: str) -> None:
        """`plan` did not run, no step is in flight. `where`: the traceback. Raises EngineError if fewer rows would not help."""
        scheduler = self._scheduler
        rows = [row for row in plan.rows.tolist() if scheduler.rows.active[row]]
        reason = in_one_line(error)
        out_of_memory = is_out_of_memory(error)
        if not out_of_memory and where not in self._logged:      # once for each place: a step is tried again many times
            self._logged.add(where)
            _log.warning("a step of %d rows failed\n%s", len(rows), where)
        if out_of_memory:
            self._shrink(plan, reason)
        elif len(rows) > 1:
            self._suspects = {scheduler.live[row].waiting.request.id for row in rows}
            scheduler.row_limit = len(rows) // 2
            _log.warning("a step of %d rows failed (%s): running them again, %d at once", len(rows), reason, scheduler.row_limit)
        elif rows:
            self._blamed += 1
            if self._blamed > MOST_BLAMED:
                raise EngineError(f"steps fail whichever row runs ({reason})") from error
            scheduler.fail(rows[0], error)
        scheduler.evacuate()

    def ended(self, completions: Iterable[Completion]) -> None:
        """To be told of every request that has ended."""
        for completion in completions:
            self._suspects.discard(completion.id)
            if completion.error is None:
                self._blamed = 0
        if not self._suspects:
            self._scheduler.row_limit = self._fits

    def _shrink(self, plan: StepPlan, reason: str) -> None:
        """What a step needs grows with its tokens, those of rows that decode among them, and with the rows that it samples."""
        scheduler = self._scheduler
        tokens = min(scheduler.max_step_tokens, max(MIN_STEP_TOKENS, plan.num_tokens // 2))
        rows = min(self._fits, tokens)           # not of row_limit, which a row at fault may have lowered
        if tokens == scheduler.max_step_tokens:
            rows = max(1, min(rows, plan.rows.size) // 2)
        if (rows, tokens) == (self._fits, scheduler.max_step_tokens):
            raise EngineError(f"out of memory in a step of {plan.rows.size} row and {plan.num_tokens} tokens: lower "
                              f"engine.gpu_memory, or free the device of what else runs there ({reason})")
        self._fits, scheduler.row_limit = rows, min(scheduler.row_limit, rows)
        scheduler.max_step_tokens = tokens
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("out of memory in a step of %d rows and %d tokens: going on with at most %d rows and %d tokens a step",
                     plan.rows.size, plan.num_tokens, rows, tokens)
