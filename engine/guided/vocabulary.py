"""The model's tokenizer as the grammar engine sees it: plain text only, no text that turns into a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llguidance import LLTokenizer, TokenizerWrapper

from engine.guided.distinct import TokensByPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PROBE = '{"a b": [1, "c"]}\n'      # has what byte-level vocabularies write otherwise than it is


class GrammarVocabulary:
    """tokenizer: llguidance's. token_bytes: the bytes of each token, empty for special ones and for padding.

    A schema may hold the text of a special token ("<|im_end|>" as a label): the model must spell it out, or its output would
    end there. Tokenizers find special tokens by their text, so they are given another one, which no output can hold.

    Raises ValueError for a tokenizer whose tokens would be taken for other text than theirs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self.tokenizer = LLTokenizer(_for_grammars(tokenizer), n_vocab=max(vocab_size, len(tokenizer)),
                                     eos_token=list(end_tokens))
        self.size = self.tokenizer.vocab_size
        special, text = self.tokenizer.is_special_token, self.tokenizer.decode_bytes
        self.token_bytes = [b"" if special(i) else text([i]) for i in range(self.size)]
        probe = self.text(tokenizer.backend_tokenizer.encode(PROBE, add_special_tokens=False).ids)
        if probe.lstrip(b" ") != PROBE.encode():         # some write a space before any text
            raise ValueError(f"guided decoding does not understand this tokenizer: {PROBE!r} is {probe!r} to it; set "
                             "model.tokenizer to a folder with the tokenizer.json that the model's makers publish")

    def tokenize(self, text: bytes) -> list[int]:
        """As the model's tokenizer would, or greedily where that does not give back the same bytes."""
        tokens = self.tokenizer.tokenize_bytes(text)
        return tokens if self.text(tokens) == text else self.tokenizer.greedy_tokenize(text.decode())

    def text(self, tokens: Sequence[int]) -> bytes:
        return b"".join([self.token_bytes[token] for token in tokens])

    @cached_property
    def by_prefix(self) -> TokensByPrefix:
        return TokensByPrefix(self.token_bytes)


class MarkedVocabulary(GrammarVocabulary):
    """The same, but for `markers` (text -> token), which are text like any other: the tokens around tool calls.

    Wherever their text stands, it is tokenised as the marker; a marker inside a JSON string is its text there.
    """

    def __init__(self, plain: GrammarVocabulary, markers: dict[str, int], end_tokens: Sequence[int]) -> None:
        self._plain, self.size = plain, plain.size
        self._markers = {text.encode(): token for text, token in markers.items()}
        self._cut = re.compile(b"(" + b"|".join(map(re.escape, self._markers)) + b")")
        self.token_bytes = list(plain.token_bytes)
        for text, token in self._markers.items():
            self.token_bytes[token] = text
        wrapped = TokenizerWrapper(_Wrapped(self, end_tokens[0]))
        self.tokenizer = LLTokenizer(wrapped, n_vocab=self.size, eos_token=list(end_tokens))

    def tokenize(self, text: bytes) -> list[int]:
        tokens: list[int] = []
        for i, part in enumerate(self._cut.split(text)):
            tokens += [self._markers[part]] if i % 2 else self._plain.tokenize(part)
        return tokens


class _Wrapped:
    """What LLTokenizer asks of a tokenizer. Tokens without text are special: no grammar of ours names them."""

    bos_token_id = None

    def __init__(self, vocabulary: MarkedVocabulary, end_token: int) -> None:
        self._vocabulary, self.eos_token_id = vocabulary, end_token
        pieces = vocabulary.token_bytes
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or b"<special %d>" % i for i, piece in enumerate(pieces)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._vocabulary.tokenize(text if isinstance(text, bytes) else text.encode())


def _for_grammars(tokenizer: PreTrainedTokenizerFast) -> str:
    """tokenizer.json, in which the special tokens, and those llguidance takes for special, have other names.

    Some conversions put steps of other kinds of vocabulary before a byte-level decoder, and llguidance would go by those.
    """
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    names: dict[str, str] = {}
    for token in spec["added_tokens"]:
        content = token["content"]
        if token["special"] or (content.startswith("<") and content.endswith(">")):
            names[content] = f"\0special {token['id']}"
            token |= {"content": names[content], "special": True, "normalized": False}
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    else:                                                # Unigram: [text, score]
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    byte_level = [step for step in (spec["decoder"] or {}).get("decoders", ()) if step["type"] == "ByteLevel"]
    if byte_level:
        spec["decoder"], model["byte_fallback"] = byte_level[0], False
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None})
