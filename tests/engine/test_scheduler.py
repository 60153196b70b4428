"""The scheduler on random traces, with a fake device that has no model but knows what a model would have to see.

What the model will say after each prompt is fixed beforehand, whatever the batch. The device writes to each KV slot a hash of the
writer's tokens up to that position, and before a row's token is sampled, all that its attention would read must be the hashes of
its own tokens: a page shared wrongly, reused too early, or not computed shows at once. Completions must be what was fixed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import TURN_END as END
from models import tiny_tokenizer

from engine import admission, prefix_groups
from engine.automata import Automata
from engine.block_pool import BlockPool, Node
from engine.config import EngineConfig
from engine.guided.automaton import TokenAutomaton
from engine.plan import StepPlan
from engine.prefix_groups import PrefixGroups
from engine.request import Completion, FinishReason, Request, SamplingParams, TokenLogprobs
from engine.row_table import RowTable
from engine.rows import Live
from engine.scheduler import STEPS_AHEAD, Scheduler
from engine.window import Waiting
from kernels import ref

PAGE = 4
LETTERS = np.frombuffer(b"abcde", dtype=np.uint8).astype(np.int32)      # tokens of the byte-level tokenizer
TOKENIZER = tiny_tokenizer()
MIX = np.random.default_rng(0).integers(1, 2**63, size=(END + 1, 512), dtype=np.uint64)


# --- what a request should come to ---


@dataclass(eq=False)
class Script:
    """The tokens a grammar wants, for the rows that have one. Indices count output tokens."""

    tokens: np.ndarray
    forced: list[bool]
    accepting: set[int]
    valid: bool                      # all outputs that may end pass the final check
    ends: int                        # the model samples the end token here, if the grammar lets it
    error: int                       # the grammar engine gives up on the row when this many are accepted ...
    fill_error: int                  # ... or when it fills the mask for this one ...
    garbage: int                     # ... so that this is sampled
    min_tokens: int
    minimal: np.ndarray
    automaton: TokenAutomaton | None = None

    def start(self) -> ScriptGuide:
        return ScriptGuide(self)

    def check(self, text: str) -> str:
        return text

    def close(self, tokens: Sequence[int], budget: int) -> np.ndarray:
        assert budget >= self.min_tokens
        assert list(tokens) == self.tokens[: len(tokens)].tolist(), "the row's tokens are not what the guide accepted"
        if self.valid and len(tokens) in self.accepting:
            return np.array(tokens, dtype=np.int32)
        return np.concatenate([np.array(tokens[: budget - self.min_tokens], dtype=np.int32), self.minimal])


class ScriptGuide:
    def __init__(self, script: Script) -> None:
        self.script, self.at, self.broken = script, 0, False

    def accept(self, tokens: Sequence[int]) -> int:
        if self.broken:
            return 0
        assert list(tokens) == self.script.tokens[self.at : self.at + len(tokens)].tolist()
        self.at += len(tokens)
        return len(tokens)

    def forced(self) -> list[int]:
        end = self.at
        while end < len(self.script.forced) and self.script.forced[end]:
            end += 1
        return self.script.tokens[self.at : end].tolist()

    @property
    def finished(self) -> bool:
        return self.at == self.script.tokens.size and self.error is None

    @property
    def accepting(self) -> bool:
        return self.at in self.script.accepting

    @property
    def error(self) -> str | None:
        return "gave up" if self.broken or self.at == self.script.error else None


@dataclass(eq=False)
class Job:
    request: Request
    outputs: np.ndarray              # more than the row may have: the device may run past its end
    script: Script | None
    expected: Completion
    sequence: np.ndarray = field(init=False)
    hashes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sequence = np.concatenate([self.request.prompt, self.outputs])
        self.hashes = hashes(self.sequence)

    def sample(self, guide: ScriptGuide | None, position: int) -> int:
        if guide is not None and guide.broken:
            return guide.script.garbage
        if guide is not None and guide.at == guide.script.ends and guide.accepting:
            return END
        return int(self.sequence[position])


def hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 for each position, of all tokens up to it."""
    return np.cumsum(MIX[tokens, np.arange(tokens.size)], dtype=np.uint64)


def stops(params: SamplingParams) -> set[int]:
    return {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}


def plain_job(name: int, prompt: np.ndarray, params: SamplingParams, max_len: int, rng: random.Random) -> Job:
    ends = rng.choice([0.0, 0.05, 0.3])
    outputs = np.array([END if rng.random() < ends else rng.choice(LETTERS) for _ in range(max_len + 2)], dtype=np.int32)
    for i in range(min(params.min_tokens, outputs.size)):
        while outputs[i] in stops(params):
            outputs[i] = rng.choice(LETTERS)
    limit = min(params.max_tokens, max_len - prompt.size)
    done, reason, text = limit, FinishReason.LENGTH, None
    said = ""
    for i, token in enumerate(outputs[:limit].tolist()):
        if token in stops(params):
            done, reason = i, FinishReason.STOP
            break
        said += chr(token) if token != END else ""
        cuts = [len(said) - len(s) for s in params.stop if said.endswith(s)] if token != END else []
        if cuts and i + 1 >= params.min_tokens:
            done, reason, text = i + 1, FinishReason.STOP, said[: min(cuts)]
            break
    expected = Completion(name, outputs[:done], reason, prompt.size, text=text)
    return Job(Request(name, prompt, params), outputs, None, expected)


def guided_job(name: int, prompt: np.ndarray, params: SamplingParams, max_len: int, rng: random.Random) -> Job:
    n = rng.randint(1, 12)
    tokens = np.array(rng.choices(LETTERS.tolist(), k=n), dtype=np.int32)
    share, minimal = rng.choice([0.0, 0.3, 0.8]), rng.randint(1, 5)
    script = Script(tokens, [rng.random() < share for _ in range(n)], {n, *rng.choices(range(n), k=2)}, rng.random() < 0.8,
                    rng.randint(0, 2 * n), rng.randint(0, 6 * n), rng.randint(0, 6 * n), rng.choice([END, *LETTERS]), minimal,
                    np.full(minimal, LETTERS[0], dtype=np.int32))
    if rng.random() < 0.5:
        by_automaton(script)
    limit = min(params.max_tokens, max_len - prompt.size)
    guide, forced = ScriptGuide(script), 0

    def settle() -> tuple[np.ndarray, FinishReason]:
        produced = tokens[: guide.at]
        if script.min_tokens > limit:
            return produced, FinishReason.STOP if guide.accepting and guide.error is None else FinishReason.ERROR
        closed = script.close(produced.tolist(), limit)
        return closed, FinishReason.STOP if np.array_equal(closed, produced) else FinishReason.LENGTH_CLOSED

    while True:
        run = guide.forced()[: limit - guide.at] if guide.error is None else []
        forced += guide.accept(run)
        if not guide.finished and guide.at < limit:
            guide.broken = guide.at == script.fill_error
        if guide.finished or guide.at == limit or guide.error is not None or (guide.at == script.ends and guide.accepting):
            result = settle()
            break
        guide.accept(tokens[guide.at : guide.at + 1].tolist())
    expected = Completion(name, *result, prompt.size, forced_tokens=forced)
    outputs = np.concatenate([tokens, np.full(max_len + 2, LETTERS[1], dtype=np.int32)])
    if script.automaton is not None:
        outputs[[n, *({script.ends} & script.accepting)]] = END          # which the device samples before the host knows
    return Job(Request(name, prompt, params, grammar=script), outputs, script, expected)


def by_automaton(script: Script) -> None:
    """The same as states 0 .. n of an automaton, with a class for each token; that never fails."""
    n, width = script.tokens.size, END + 1
    script.error, script.fill_error = -1, -1
    for i in script.accepting - {n}:
        script.forced[i] = False                         # an output that may end here need not go on
    step = np.full((n + 1, width), -1, dtype=np.int16)
    step[np.arange(n), script.tokens] = np.arange(1, n + 1)
    final = np.isin(np.arange(n + 1), list(script.accepting))
    step[final, END] = np.flatnonzero(final)
    size = np.zeros(n + 1, dtype=np.int32)
    for i in reversed(range(n)):
        size[i] = size[i + 1] + 1 if script.forced[i] else 0
    masks = np.zeros((n + 1, 4 * -(-width // 32)), dtype=np.uint8)
    bits = np.packbits(step >= 0, axis=1, bitorder="little")
    masks[:, : bits.shape[1]] = bits
    at = np.arange(n + 1, dtype=np.int32)
    script.automaton = TokenAutomaton(np.arange(width, dtype=np.int16), step, masks.view(np.int32), at, final, at == n,
                                      script.valid, script.tokens, at, size, at + size)


def make_jobs(count: int, max_len: int, rng: random.Random) -> list[Job]:
    """Prompts from a few stems, some of them twice or more (n > 1); every kind of parameter the scheduler looks at."""
    stems = [np.array(rng.choices(LETTERS.tolist(), k=max_len - 1), dtype=np.int32) for _ in range(2)]
    jobs: list[Job] = []
    while len(jobs) < count:
        stem = rng.choice(stems)[: rng.randint(0, rng.choice([max_len // 2, max_len - 2]))]
        tail = rng.choices(LETTERS.tolist(), k=rng.randint(1, min(6, max_len - 1 - stem.size)))
        prompt = np.concatenate([stem, np.array(tail, dtype=np.int32)])
        max_tokens = rng.choice([1, rng.randint(1, max_len), 10 * max_len, 10 * max_len])
        params = SamplingParams(
            max_tokens=max_tokens, min_tokens=rng.choice([0, 0, 1, min(3, max_tokens), max_tokens]),
            ignore_eos=rng.random() < 0.3, logprobs=rng.choice([None, None, 1]), presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            stop_token_ids=rng.choice([(), (), (), (int(LETTERS[4]),)]),
            stop=rng.choice([(), (), (), (), ("ab",), ("b", "cdd"), ("aa", "a")]))
        make = guided_job if rng.random() < 0.3 else plain_job
        for _ in range(rng.choice([1, 1, 2, 5])):
            jobs.append(make(len(jobs), prompt, params, max_len, rng))
    return jobs[:count]


# --- the device ---


class FakeDevice:
    """What the runner and the GPU do with a plan. A launch takes effect at once, as it does for all later ones."""

    def __init__(self, table: RowTable, automata: Automata, num_pages: int) -> None:
        self.table, self.automata = table, automata
        self.kv = np.zeros(num_pages * PAGE, dtype=np.uint64)

    def launch(self, plan: StepPlan, jobs: list[Job], pages: list[np.ndarray], guides: list[ScriptGuide | None]) -> np.ndarray:
        """`jobs`, `pages` and `guides` by the plan's rows; returns the tokens sampled."""
        table = self.table
        table.stage_step(plan.rows, plan.starts)
        table.flush(np.empty(0, dtype=np.int32))
        ref.copy_pages(torch.from_numpy(self.kv.view(np.int64).reshape(1, -1, PAGE)), torch.from_numpy(plan.copies))
        n, total = plan.rows.size, plan.num_tokens
        cu_q = np.concatenate([[0], np.cumsum(plan.counts)]).astype(np.int32)
        ids, positions, slots = torch.empty(3, total, dtype=torch.int32).unbind()
        ref.expand(table.tokens, table.block_table, table.rows[:n], table.starts[:n], torch.from_numpy(cu_q),
                   int(plan.counts.max()), PAGE, ids, positions, slots)
        for i, job in enumerate(jobs):
            span, start, end = slice(cu_q[i], cu_q[i + 1]), int(plan.starts[i]), int(plan.starts[i] + plan.counts[i])
            where = slots[span].numpy()
            np.testing.assert_array_equal(ids[span].numpy(), job.sequence[start:end], "the device has other tokens than the row")
            np.testing.assert_array_equal(positions[span].numpy(), np.arange(start, end))
            assert set(where // PAGE) <= set(pages[i].tolist()) - {0}, "a row writes to a page that it does not hold"
            self.kv[where] = job.hashes[start:end]
        for i, job in enumerate(jobs):
            self.check_prefix(int(plan.rows[i]), job, int(plan.starts[i] + plan.counts[i]))
        if plan.shared is not None:
            self.check_shared(plan, jobs)
        at = (plan.starts + plan.counts - 1)[plan.sampled]
        tokens = [jobs[i].sample(guides[i], at[k] + 1) for k, i in enumerate(plan.sampled.tolist())]
        sampled, rows = torch.tensor(tokens, dtype=torch.int32), torch.from_numpy(plan.rows[plan.sampled])
        self.check_states(plan, jobs, at)
        ref.commit(table.tokens, rows, torch.from_numpy(at), sampled, torch.empty_like(sampled))
        self.automata.advance(table.grammar, rows, sampled)
        return sampled.numpy()

    def check_states(self, plan: StepPlan, jobs: list[Job], at: np.ndarray) -> None:
        """Sampled rows are where their tokens lead, but for those past their end; without an automaton they are at 0."""
        for k, i in enumerate(plan.sampled.tolist()):
            row, script = int(plan.rows[i]), jobs[i].script
            state, produced = int(self.table.grammar[row]), int(at[k]) + 1 - jobs[i].request.prompt.size
            if script is None or script.automaton is None:
                assert state == 0
            elif END not in jobs[i].outputs[:produced]:
                assert state == self.automata.place(script.automaton) + produced

    def check_prefix(self, row: int, job: Job, length: int) -> None:
        """What attention of this row reads is its own prefix."""
        positions = np.arange(length)
        pages = self.table.block_table[row].numpy()[positions // PAGE]
        read = self.kv[pages * PAGE + positions % PAGE]
        np.testing.assert_array_equal(read, job.hashes[:length], f"row {row} reads what is not its own")

    def check_shared(self, plan: StepPlan, jobs: list[Job]) -> None:
        """The rows of a tile may all read the prefix through the first one's pages; every row that shares is in one tile."""
        covered = np.zeros(plan.num_decode, dtype=int)
        assert plan.shared.size == plan.num_decode
        for at, count in plan.prefix_tiles.tolist():
            covered[at : at + count] += 1
            assert 0 < count <= ref.PREFIX_TILE
            assert len(set(plan.shared[at : at + count].tolist())) == 1
            for i in range(at, at + count):
                assert 0 < plan.shared[i] <= plan.starts[i]
                self.check_prefix(int(plan.rows[at]), jobs[i], int(plan.shared[i]))
        np.testing.assert_array_equal(covered, plan.shared > 0)


# --- the loop, as in Engine.step ---


@dataclass
class Setting:
    jobs: int = 30
    max_rows: int = 4
    max_len: int = 32
    spare_pages: int = 4             # beyond what one row of max_len needs
    spare_tokens: int = 4            # of a step, beyond one for each row
    depth: int = 2
    window: int = 16
    sharing: bool = True
    aborts: float = 0.0              # chance, each turn
    failures: float = 0.0            # chance that a step does not run


class Trace:
    def __init__(self, setting: Setting, seed: int) -> None:
        self.rng = random.Random(seed)
        self.setting = setting
        self.table = RowTable(setting.max_rows, setting.max_len, PAGE, torch.device("cpu"), 64)
        pages = self.table.pages_per_row + 1 + setting.spare_pages
        self.pool = BlockPool(pages, PAGE)
        config = EngineConfig(depth=setting.depth, window=setting.window, prefix_sharing=setting.sharing)
        self.budget = setting.max_rows + setting.spare_tokens
        groups = PrefixGroups(setting.max_rows, PAGE, token_bytes=1 << 40) if setting.sharing else None
        automata = Automata(END + 1, torch.device("cpu"))
        automata.jump = self.rng.choice([1, 2, 3, 100])
        self.scheduler = Scheduler(config, self.table, self.pool, self.budget, (END,), automata, TOKENIZER, groups)
        self.device = FakeDevice(self.table, automata, pages)
        self.jobs = make_jobs(setting.jobs, setting.max_len, self.rng)
        self.done: dict[int, Completion] = {}
        self.aborted: set[int] = set()
        self.inflight: deque[tuple[StepPlan, np.ndarray, dict[int, TokenLogprobs]]] = deque()
        self.steps = self.steps_with_groups = self.steps_with_copies = self.by_automata = 0

    def run(self) -> None:
        coming, turns = deque(self.jobs), 0
        while coming or self.scheduler.pending:
            for _ in range(min(len(coming), self.scheduler.room(), self.rng.randint(0, 8))):
                request = coming.popleft().request
                self.scheduler.submit(Waiting(request, request.prompt))
            if self.rng.random() < self.setting.aborts:
                self.abort()
            self.turn()
            turns += 1
            assert turns < 400 * len(self.jobs) + 400, "the rows make no headway"
        self.check_end()

    def abort(self) -> None:
        ids = set(self.rng.sample(range(len(self.jobs)), k=min(3, len(self.jobs)))) | {"stranger"}
        wanted = None if self.rng.random() < 0.05 else ids
        self.aborted |= {job.request.id for job in self.jobs} if wanted is None else ids
        self.scheduler.abort(wanted)
        self.check()

    def turn(self) -> None:
        while len(self.inflight) >= self.setting.depth:
            self.scheduler.retire(*self.inflight.popleft())
        self.scheduler.refill()
        plan = self.scheduler.schedule()
        if plan is not None and self.rng.random() < self.setting.failures:
            self.fail(plan)
        elif plan is not None:
            self.check_plan(plan)
            self.inflight.append((plan, *self.launch(plan)))
            self.steps += 1
            self.steps_with_groups += plan.shared is not None
            self.steps_with_copies += plan.copies.size > 0
        elif self.inflight:
            self.scheduler.retire(*self.inflight.popleft())
        self.check()
        for completion in self.scheduler.finished():
            assert completion.id not in self.done, "a request came back twice"
            self.done[completion.id] = completion
            self.check_completion(completion)

    def fail(self, plan: StepPlan) -> None:
        """The step does not run: garbage is where it would have written."""
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
            at = np.arange(start, start + count)
            self.device.kv[self.scheduler.rows.pages[row, at // PAGE] * PAGE + at % PAGE] = 0
        while self.inflight:
            self.scheduler.retire(*self.inflight.popleft())
        self.scheduler.evacuate()
        self.scheduler.row_limit = self.rng.randint(1, self.setting.max_rows)

    def launch(self, plan: StepPlan) -> tuple[np.ndarray, dict[int, TokenLogprobs]]:
        live = self.scheduler.live
        guides: list[ScriptGuide | None] = [live[row].guide for row in plan.rows.tolist()]
        assert plan.guides == [guides[i] for i in plan.sampled[plan.guided].tolist()]
        for guide in plan.guides:
            guide.broken = guide.at == guide.script.fill_error
        self.by_automata += int(plan.by_automata)
        pages = [self.scheduler.rows.pages[row, : self.scheduler.rows.num_pages[row]] for row in plan.rows.tolist()]
        tokens = self.device.launch(plan, [self.job(live[row]) for row in plan.rows.tolist()], pages, guides)
        logprobs = {s.index: TokenLogprobs(int(tokens[s.index]), 0.0, ()) for s in plan.special if s.params.logprobs is not None}
        return tokens, logprobs

    def job(self, live: Live) -> Job:
        return self.jobs[live.waiting.request.id]

    # --- checks ---

    def check_plan(self, plan: StepPlan) -> None:
        assert len(set(plan.rows.tolist())) == plan.rows.size > 0
        assert plan.num_tokens <= self.budget
        assert (plan.counts > 0).all()
        assert (plan.counts[: plan.num_decode] == 1).all()
        if plan.shared is None:
            assert (np.diff(plan.starts[: plan.num_decode]) <= 0).all(), "the longest rows come first"
        scheduler, special = self.scheduler, {s.index: s for s in plan.special}
        for k, i in enumerate(plan.sampled.tolist()):
            row, length = int(plan.rows[i]), int(plan.starts[i] + plan.counts[i])
            job = self.job(scheduler.live[row])
            params, produced = job.request.params, length - job.request.prompt.size
            assert produced >= 0, "sampled before the whole prompt was computed"
            assert length < job.request.prompt.size + params.max_tokens
            assert length < self.setting.max_len
            if job.script is not None and job.script.automaton is not None:
                assert plan.by_automata
                assert scheduler.live[row].guide is None
            elif job.script is not None:
                guide = scheduler.live[row].guide
                assert guide.at == produced, "the grammar is not where the row is"
                assert not (guide.at < len(job.script.forced) and job.script.forced[guide.at]), "sampled although forced"
            if params.has_penalties or params.min_tokens or params.logprobs is not None:
                assert (special[k].row, special[k].length, special[k].prompt_len) == (row, length, job.request.prompt.size)
                if job.script is None:
                    forbidden = stops(params) if produced < params.min_tokens else set()
                    assert set(special[k].forbidden.tolist()) == forbidden

    def check(self) -> None:
        """After every turn: counts agree, and every computed page, held or cached, still holds what it stands for."""
        scheduler = self.scheduler
        scheduler.check_integrity()
        for row, live in scheduler.live.items():
            if scheduler.rows.arrived[row] and not scheduler.rows.fresh[row]:        # has run: the device knows its pages
                self.device.check_prefix(row, self.job(live), int(scheduler.rows.computed[row]))
        stack: list[tuple[Node, bytes]] = [(node, b"") for node in self.pool._root.children.values()]
        while stack:
            node, before = stack.pop()
            prefix = before + (node.key if node.tokens is None else node.tokens.tobytes())
            if node.page:
                want = hashes(np.frombuffer(prefix, dtype=np.int32))[node.depth * PAGE - PAGE :]
                cached = self.device.kv[node.page * PAGE :][: want.size]
                np.testing.assert_array_equal(cached, want, "a cached page was written")
            stack.extend((child, prefix) for child in node.children.values())

    def check_completion(self, got: Completion) -> None:
        job = self.jobs[got.id]
        want, prompt = job.expected, job.request.prompt
        assert got.prompt_tokens == prompt.size
        assert 0 <= got.cached_tokens < prompt.size
        if got.finish_reason is FinishReason.ABORTED:
            assert got.id in self.aborted
            np.testing.assert_array_equal(got.tokens, job.outputs[: got.tokens.size])
            assert got.tokens.size <= min(job.request.params.max_tokens, self.setting.max_len - prompt.size)
        else:
            assert (got.finish_reason, got.tokens.tolist(), got.text) == (want.finish_reason, want.tokens.tolist(), want.text)
            assert got.forced_tokens == want.forced_tokens
            assert (got.error is not None) == (want.finish_reason is FinishReason.ERROR)
        if job.request.params.logprobs is None:
            assert got.logprobs is None
            return
        entries = got.logprobs or []                     # None where it never ran
        for entry, token in zip(entries, got.tokens.tolist(), strict=True):
            assert entry is None or entry.token == token, "each token has its own"
        if got.finish_reason is not FinishReason.LENGTH_CLOSED:
            assert entries.count(None) <= got.forced_tokens, "only what is forced is not sampled"

    def check_end(self) -> None:
        assert sorted(self.done) == list(range(len(self.jobs)))
        while self.inflight:
            self.scheduler.retire(*self.inflight.popleft())
        self.check()
        assert not self.scheduler.finished()
        stats = self.scheduler.stats(self.steps, 0)
        assert (stats.running, stats.waiting, stats.kv_pages_used, stats.finished) == (0, 0, 0, len(self.jobs))
        assert stats.cached_tokens == sum(c.cached_tokens for c in self.done.values())
        assert self.pool.alloc(self.pool.usable).size == self.pool.usable
        assert not self.pool._root.children, "the prefix tree keeps what nobody needs"


@pytest.fixture(scope="module", autouse=True)
def small_numbers() -> Iterator[None]:
    """The forecast trusts what few rows show, and guesses low; few rows with short prefixes are decoded as groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "MIN_SEEN", 4)
        patch.setattr(admission, "QUANTILE", 0.1)
        patch.setattr(prefix_groups, "EVERY", 3)
        patch.setattr(prefix_groups, "MIN_ROWS", 2)
        patch.setattr(prefix_groups, "MIN_TOKENS", PAGE)
        yield


settings_strategy = st.builds(
    Setting, jobs=st.integers(1, 40), max_rows=st.integers(1, 6), max_len=st.integers(8, 48), spare_pages=st.integers(0, 30),
    spare_tokens=st.integers(0, 40), depth=st.sampled_from([1, 2]), window=st.integers(1, 40), sharing=st.booleans(),
    aborts=st.sampled_from([0.0, 0.0, 0.05, 0.3]), failures=st.sampled_from([0.0, 0.0, 0.02, 0.2]))


@given(setting=settings_strategy, seed=st.integers(0, 2**32 - 1))
@example(setting=Setting(jobs=34, max_rows=3, max_len=45, spare_pages=0, spare_tokens=14, depth=1, window=25, sharing=True),
         seed=34)       # a row takes its prefix, and then there is no page for it to run
@example(setting=Setting(jobs=3, max_rows=1, max_len=12, spare_pages=0), seed=18)      # all but the page that a row copies from
def test_random_traces(setting: Setting, seed: int) -> None:
    Trace(setting, seed).run()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_trace_preempts_shares_and_learns(depth: int) -> None:
    """The same on one long trace, which is known to reach the rare paths."""
    trace = Trace(Setting(jobs=400, max_rows=8, max_len=40, spare_pages=8, depth=depth, aborts=0.02), seed=depth)
    trace.run()
    stats = trace.scheduler.stats(trace.steps, 0)
    assert stats.preemptions > 15
    assert stats.cached_tokens > 0.2 * stats.prompt_tokens
    reasons = [c.finish_reason for c in trace.done.values()]
    assert set(reasons) == set(FinishReason)
    assert stats.forced_tokens > 50
    assert trace.steps_with_groups > 50
    assert trace.steps_with_copies > 20
    assert trace.by_automata > 50


def test_no_more_rows_are_let_in_than_the_next_steps_can_compute() -> None:
    """Steps are full as long as requests wait for nothing else, and all come out."""
    table, pool, budget, own = RowTable(64, 64, PAGE, torch.device("cpu"), 64), BlockPool(2000, PAGE), 64, 10
    scheduler = Scheduler(EngineConfig(), table, pool, budget, (END,), Automata(END + 1, torch.device("cpu")))
    stem, rng = np.full(5 * PAGE, LETTERS[0]), np.random.default_rng(0)
    for i in range(200):
        prompt = np.concatenate([stem, rng.choice(LETTERS, own)])
        scheduler.submit(Waiting(Request(i, prompt, SamplingParams(max_tokens=4, ignore_eos=True)), prompt))
    done: list[Completion] = []
    while scheduler.pending:
        scheduler.refill()
        rows = np.array(sorted(scheduler.live))
        begun = np.maximum(scheduler.rows.computed[rows], scheduler.rows.shared_pages[rows] * PAGE)
        assert int((scheduler.rows.known[rows] - begun).sum()) < STEPS_AHEAD * budget + own + PAGE
        plan = scheduler.schedule()
        table.discard_staged()
        assert plan.num_tokens == budget or not len(scheduler.window) or len(scheduler.live) == table.max_rows
        scheduler.retire(plan, np.full(plan.sampled.size, LETTERS[1]), {})
        done += scheduler.finished()
    assert sorted(c.id for c in done) == list(range(200))
    assert {c.tokens.size for c in done} == {4}


def test_the_forecast_counts_prefixes_that_are_still_to_be_computed() -> None:
    """Four rows are in the middle of their prefixes when four more come, of whose prefixes only one fits beside these."""
    table, pool = RowTable(8, 64, PAGE, torch.device("cpu"), 64), BlockPool(41, PAGE)
    scheduler = Scheduler(EngineConfig(), table, pool, 16, (END,), Automata(END + 1, torch.device("cpu")))
    prompts = [np.repeat(LETTERS[[i // 2, 4]], [10 * PAGE, 1]) for i in range(8)]    # two to a prefix of 10 pages
    coming = deque(Waiting(Request(i, p, SamplingParams(max_tokens=2, ignore_eos=True)), p) for i, p in enumerate(prompts))
    while coming or scheduler.pending:
        for _ in range(min(4, len(coming))):
            scheduler.submit(coming.popleft())
        scheduler.refill()
        paths = {live.waiting.path[-1]: live.waiting.path for live in scheduler.live.values()}
        assert 10 * len(paths) + len(scheduler.live) <= pool.usable
        plan = scheduler.schedule()
        table.discard_staged()
        scheduler.retire(plan, np.full(plan.sampled.size, LETTERS[1]), {})
        scheduler.finished()
    assert scheduler.stats(0, 0).preemptions == 0


@given(st.lists(st.integers(0, 400), max_size=40))
def test_tiles_of_shared_prefixes_fit_the_row_table(sizes: list[int]) -> None:
    """However rows fall into groups, with the least size that a group has outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_groups, "MIN_ROWS", 16)
        groups = PrefixGroups(sum(sizes) + 1, PAGE, token_bytes=1 << 40)
        paths: dict[int, list[Node]] = {}
        for size in sizes:
            node = Node(Node(None, b""), b"")
            paths |= {len(paths) + i: [node] for i in range(size)}
        for path in paths.values():
            groups.join(path)
        for _ in range(3):
            rows, shared, tiles = groups.arrange(np.arange(sum(sizes), dtype=np.int32), lambda: paths)
    assert sorted(rows.tolist()) == list(range(sum(sizes)))
    if max(sizes, default=0) >= 16:
        assert int((shared > 0).sum()) == sum(size for size in sizes if size >= 16)
        assert len(tiles) <= RowTable(max(1, rows.size), 16, 16, torch.device("cpu"), 64).prefix_tiles.shape[0]
    else:
        assert shared is tiles is None
