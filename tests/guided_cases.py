"""What the tests of guided decoding share: a tokenizer made on the spot, and walks through a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.guided.llg import LLGrammar, LLGuidanceBackend

PADDED = 640  # columns of the logits: more than there are tokens, as models have it
CORPUS = [
    '{"label": "positive", "score": 0.75, "reason": "the text is short and friendly", "tags": ["a", "b"]}',
    '{"name": "Ada", "age": 36, "address": {"street": "1 Main St", "city": "London"}, "active": true, "notes": null}',
] * 20


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|stop|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def accepts(backend: LLGuidanceBackend, grammar: LLGrammar, text: str) -> bool:
    """Whether `text` can come out of `grammar`, token by token."""
    tokens = grammar.vocabulary.tokenize(text.encode())
    guide = grammar.start()
    return guide.accept(tokens) == len(tokens) and guide.accepting


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def walk(backend: LLGuidanceBackend, grammar: LLGrammar, seed: int, budget: int, begin: Sequence[int] = ()
         ) -> tuple[list[int], bool]:
    """A random walk through the masks, half of the time towards the end: (tokens, whether it ended by itself)."""
    random = np.random.default_rng(seed)
    mask = np.zeros((1, PADDED // 32), dtype=np.int32)
    closers = np.array([bool(p) and not p.strip(b'"}],: ') for p in grammar.vocabulary.token_bytes])
    guide, tokens = grammar.start(), list(begin)[:budget]
    assert guide.accept(tokens) == len(tokens)
    while len(tokens) < budget and not guide.finished:
        step = guide.forced()[: budget - len(tokens)]
        if not step:
            backend.fill([guide], mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
            assert not bits[len(grammar.vocabulary.token_bytes) :].any()
            pool = np.flatnonzero(bits & closers) if random.random() < 0.5 else np.flatnonzero(bits)
            pool = pool if len(pool) else np.flatnonzero(bits)
            if not len(pool):
                return tokens, False
            step = [int(random.choice(pool))]
            if step[0] in (0, 1):
                assert guide.accepting or guide.error
                return tokens, guide.accepting
        taken = guide.accept(step)
        tokens += step[:taken]
        if taken < len(step):
            assert guide.error
            return tokens, False
    return tokens, guide.accepting
