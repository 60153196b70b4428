"""The model's tokenizer as the grammar engine sees it: plain text only, no text that turns into a special token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class GrammarVocabulary:
    """tokenizer: llguidance's. token_bytes: the bytes of each token, empty for special ones and for padding.

    A schema may hold the text of a special token ("<|im_end|>" as a label): the model must spell it out, or its output would
    end there. Tokenizers find special tokens by their text, so they are given another one, which no output can hold.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self.tokenizer = LLTokenizer(_without_special_text(tokenizer), n_vocab=max(vocab_size, len(tokenizer)),
                                     eos_token=list(end_tokens))
        self.size = self.tokenizer.vocab_size
        special, text = self.tokenizer.is_special_token, self.tokenizer.decode_bytes
        self.token_bytes = [b"" if special(i) else text([i]) for i in range(self.size)]

    def tokenize(self, text: bytes) -> list[int]:
        """As the model's tokenizer would, or greedily where that does not give back the same bytes."""
        tokens = self.tokenizer.tokenize_bytes(text)
        return tokens if self.text(tokens) == text else self.tokenizer.greedy_tokenize(text.decode())

    def text(self, tokens: Sequence[int]) -> bytes:
        return b"".join([self.token_bytes[token] for token in tokens])


def _without_special_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """tokenizer.json, in which the special tokens, and those llguidance takes for special, have other names."""
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
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None})
