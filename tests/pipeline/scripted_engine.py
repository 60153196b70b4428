"""A model and an engine that follow a script: the real pipeline without weights and torch.

The output depends on the prompt, the seed and the schema alone. What a prompt may say: `FAIL` (the engine
fails on it, each time), `FAILONCE`, `SLOW` (takes 200 turns), `LONG` (hits max_tokens), `HANG` (the engine answers no more, not
even to signals), `BREAK` (it gives up). Where SCRIPTED_HEALED is in the environment, nothing fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jinja2
import numpy as np

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError
from engine.guided.simple import validator_of
from engine.guided.tools import ToolCheck
from engine.request import Completion, EngineError, EngineStats, FinishReason, Request
from pipeline.config import RunConfig
from pipeline.estimate import ModelSize

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}TOOLS {{ tools | tojson }}\n{# a call: <tool_call> #}{% endif %}<|im_start|>assistant\n"
)


class ScriptedTokenizer:
    """UTF-8 bytes as tokens, and two special tokens above them."""

    longest_token = max(map(len, SPECIAL))

    def __init__(self, chat_template: str | None = TEMPLATE) -> None:
        self.chat_template, self.special_tokens = chat_template, SPECIAL
        self._compiled = (
            jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(chat_template)
            if chat_template
            else None
        )

    def render_chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]], tools: Sequence[Any] | None = None) -> list[str]:
        return [self._compiled.render(messages=messages, tools=tools) for messages in conversations]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[np.ndarray]:
        return [np.array(self._encode(text), dtype=np.int32) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = list(text.encode())
        for number, token in enumerate(SPECIAL):
            if token in text:
                raw = token.encode()
                joined = bytes(ids) if max(ids) < 256 else None
                if joined is None:
                    out, at = [], 0
                    while at < len(ids):
                        if ids[at : at + len(raw)] == list(raw):
                            out.append(256 + number)
                            at += len(raw)
                        else:
                            out.append(ids[at])
                            at += 1
                    ids = out
                else:
                    parts = joined.split(raw)
                    ids = list(parts[0])
                    for part in parts[1:]:
                        ids += [256 + number, *part]
        return ids

    def encode_plain(self, text: str) -> np.ndarray:
        return np.array(list(text.encode()), dtype=np.int32)

    def decode_marked(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return self.decode_batch(tokens)

    def decode_batch(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [
            bytes(t for t in ids if t < 256).decode("utf-8", "replace") for ids in (np.asarray(ids).tolist() for ids in tokens)
        ]


@dataclass(eq=False)
class ScriptedGrammar:
    spec: GuideSpec
    min_tokens: int = 4
    check: Callable[[str], Any] = str

    def __post_init__(self) -> None:
        if self.spec.kind == "tools":
            self.check = ToolCheck(*self.spec.read_tools()).check
        elif self.spec.kind in ("schema", "loose"):
            self.check = validator_of(json.loads(self.spec.text)).check

    def text(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def close(self, tokens: Sequence[int], budget: int) -> np.ndarray:
        """An output that says HUGE can be mended, others cannot."""
        text = bytes(tokens).decode()
        if "HUGE" not in text:
            raise ValueError("cannot be closed")
        return np.frombuffer(text.replace("HUGE", "").encode(), np.uint8).astype(np.int32)


class ScriptedGrammars:
    def get(self, source: Any) -> ScriptedGrammar:
        spec = source if isinstance(source, GuideSpec) else GuideSpec.of(source)
        if "REFUSED" in spec.text and spec.kind != "loose":
            raise SchemaError("/properties/REFUSED", "cannot be kept")
        return ScriptedGrammar(spec)


class ScriptedEngine:
    """Holds `max_rows` rows, each for `turns` turns; a turn sleeps `delay` seconds."""

    def __init__(
        self, max_model_len: int = 4096, max_rows: int = 32, turns: int = 2, delay: float = 0.0, window: int = 256,
        gpu: str | None = None,
    ) -> None:
        self.max_model_len, self.max_rows, self.gpu = max_model_len, max_rows, gpu
        self._turns, self._delay, self._window = turns, delay, window
        self._waiting: deque[Request] = deque()
        self._running: dict[Hashable, tuple[Request, int]] = {}
        self._began: dict[Hashable, float] = {}
        self._aborted: list[Completion] = []
        self._failed_once: set[bytes] = set()
        self._prompt = self._generated = self._steps = self._finished = 0
        self.submitted: list[str] = []
        self.keep = False

    def submit(self, request: Request) -> None:
        if request.adapter:
            raise ValueError("this engine has no LoRA adapters")
        if not request.prompt.size:
            raise ValueError("the prompt has no tokens")
        if self.keep:
            self.submitted.append(ScriptedTokenizer().decode_batch([request.prompt])[0])
        self._waiting.append(request)

    def room(self) -> int:
        return self._window - len(self._waiting)

    def step(self) -> list[Completion]:
        if self._delay:
            time.sleep(self._delay)
        self._steps += 1
        while self._waiting and len(self._running) < self.max_rows:
            request = self._waiting.popleft()
            self._prompt += request.prompt.size
            turns = 200 if b"SLOW" in _text(request) else self._turns
            self._began[request.id] = time.monotonic()
            if b"HANG" in _text(request):
                print("the scripted engine hangs", file=sys.stderr, flush=True)
                hashlib.pbkdf2_hmac("sha256", b"a call that does not return", b"", 10**9)
            if b"BREAK" in _text(request):
                raise EngineError("the scripted engine is broken")
            self._running[request.id] = (request, self._steps + turns)
        done = [request for request, end in self._running.values() if end <= self._steps]
        completions = [self._complete(request) for request in done] + self._aborted
        self._aborted = []
        for request in done:
            del self._running[request.id]
        self._finished += len(completions)
        return completions

    def overdue(self, seconds: float) -> list[Hashable]:
        return [id for id in self._running if self._began[id] < time.monotonic() - seconds]

    def abort(self, ids: Iterable[Hashable] | None = None) -> None:
        for request in [*self._waiting, *(request for request, _ in self._running.values())]:
            if ids is None or request.id in ids:
                self._aborted.append(Completion(request.id, np.zeros(0, np.int32), FinishReason.ABORTED, request.prompt.size))
                self._running.pop(request.id, None)
        gone = {completion.id for completion in self._aborted}
        self._waiting = deque(request for request in self._waiting if request.id not in gone)

    @property
    def pending(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._aborted)

    def stats(self) -> EngineStats:
        return EngineStats(
            len(self._running),
            len(self._waiting),
            len(self._running),
            self.max_rows,
            self._prompt,
            0,
            self._generated,
            0,
            self._steps,
            0,
            0,
            self._finished,
        )

    def close(self) -> None:
        pass

    def _complete(self, request: Request) -> Completion:
        text, size = _text(request), request.prompt.size
        empty = np.zeros(0, np.int32)
        if b"FAILONCE" in text:
            if text not in self._failed_once:
                self._failed_once.add(text)
                return Completion(request.id, empty, FinishReason.ERROR, size, error="failed once")
        elif b"FAIL" in text and "SCRIPTED_HEALED" not in os.environ:
            return Completion(request.id, empty, FinishReason.ERROR, size, error="scripted failure")
        seed = request.params.seed if request.params.temperature > 0 else 0
        draw = random.Random(hashlib.blake2b(text + seed.to_bytes(8, "big"), digest_size=8).digest())
        output = _output(request.grammar.spec, text, draw) if request.grammar else f"echo {draw.getrandbits(32):08x}"
        tokens = np.frombuffer(output.encode(), np.uint8).astype(np.int32)
        reason = FinishReason.STOP
        if b"LONG" in text:
            tokens, reason = tokens[: request.params.max_tokens], FinishReason.LENGTH
        self._generated += len(tokens)
        return Completion(request.id, tokens, reason, size)


class ScriptedModel:
    """The factory's product. `SCRIPTED_*` in the environment set the engine's script when it runs as a process of its own."""

    engines: ClassVar[list[ScriptedEngine]] = []

    def __init__(self, config: RunConfig, **script: Any) -> None:
        self.config, self.script = config, script
        self.loads = 0

    def fingerprint(self) -> dict[str, str]:
        return {"model.source": self.config.model.source}

    def tokenizer(self) -> ScriptedTokenizer:
        template = self.config.model.chat_template
        return ScriptedTokenizer(TEMPLATE if template is None else (template.strip() and template) or None)

    def grammars(self) -> ScriptedGrammars:
        return ScriptedGrammars()

    def size(self, device: str) -> ModelSize:
        return ModelSize(10**8, 2 * 10**8, 2 * 10**4)

    def max_model_len(self) -> int:
        return self.config.engine.max_model_len or 4096

    def load(self, progress: Callable[[str], None]) -> ScriptedEngine:
        progress("loading weights")
        self.loads += 1
        script = {
            name: float(os.environ[f"SCRIPTED_{name.upper()}"])
            for name in ("turns", "delay")
            if f"SCRIPTED_{name.upper()}" in os.environ
        }
        engine = ScriptedEngine(self.max_model_len(), self.config.engine.max_rows or 32, **{**script, **self.script})
        ScriptedModel.engines.append(engine)
        return engine


def _text(request: Request) -> bytes:
    return bytes(token for token in request.prompt.tolist() if token < 256)


def _output(spec: GuideSpec, prompt: bytes, draw: random.Random) -> str:
    """With tools, a prompt may say CALL: else an output that may be text is text."""
    if spec.kind == "tools":
        _, tools, choice = spec.read_tools()
        if choice == "auto" and b"CALL" not in prompt:
            return "no tool is needed"
        call = {"name": tools[0].name, "arguments": _instance(tools[0].parameters, draw)}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return spec.text if spec.kind == "regex" else json.dumps(_instance(json.loads(spec.text), draw))


def _instance(schema: Any, draw: random.Random) -> Any:
    """A value that fits: enough of JSON Schema for the tasks of the project."""
    if not isinstance(schema, dict):
        return None
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    match schema.get("type"):
        case "object":
            return {name: _instance(sub, draw) for name, sub in schema.get("properties", {}).items()}
        case "array":
            return [_instance(schema.get("items"), draw) for _ in range(schema.get("minItems", 0))]
        case "string":
            return f"{draw.getrandbits(64):016x}"[: schema.get("maxLength", 16)]
        case "boolean":
            return draw.random() < 0.5
        case "integer":
            return draw.randint(0, 9)
        case "number":
            return draw.random()
    return None
