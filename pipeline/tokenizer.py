"""Text to tokens and back: a model's own fast tokenizer and chat template, for many rows at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from engine.gguf import GgufFile, find_gguf
from engine.models.spec import ModelError
from pipeline.gguf_tokenizer import gguf_tokenizer
from pipeline.input.formats import first_line


def load_tokenizer(model: Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder (tokenizer.json) or GGUF file. `chat_template`: in place of the model's own.

    tokenizer.json is taken as it stands and no code of the model's is run. Raises ModelError.
    """
    if (gguf := find_gguf(model)) is not None:
        tokenizer = gguf_tokenizer(GgufFile(gguf))
    elif (model / "tokenizer.json").exists():
        tokenizer = _from_folder(model)
    else:
        raise ModelError(f"{model} has no tokenizer.json: give model.tokenizer, a folder that has one, or write one with "
                         "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    if isinstance(tokenizer.chat_template, dict):          # several, by purpose
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        _check_syntax(tokenizer)
    # Some tokenizer.json files ask to be cut or padded to a length; prompts never are.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _from_folder(model: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(model, local_files_only=True)
    except Exception as error:      # tokenizers has no class of its own, and transformers takes the files as it wants them to be
        raise ModelError(f"{model}: its tokenizer.json, or what goes with it, cannot be read ({type(error).__name__}: "
                         f"{first_line(error)}); fetch it again, or give model.tokenizer, a folder with another") from error


def _check_syntax(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whether a template accepts a conversation is asked row by row; one that is no Jinja fails on every row alike."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(f"model.chat_template: line {error.lineno}: {error.message}") from None
    except Exception:
        return      # of this conversation: rows that come to the same say so


class RowTokenizer:
    """What the rows of a job need of a tokenizer. Batches use all cores; safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.chat_template: str | None = tokenizer.chat_template
        self.special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._backend = tokenizer.backend_tokenizer

    def render_chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]], tools: Sequence[Any] | None = None) -> list[str]:
        """Each conversation as text, with the header of the answer, by transformers' sandboxed Jinja.

        Encode them without special tokens: the template has written these. Raises what the template raises of any, mostly
        jinja2.TemplateError.
        """
        batch: Any = [list(messages) for messages in conversations]
        texts = self.tokenizer.apply_chat_template(
            batch, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True)
        return list(map(str, texts))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[np.ndarray]:
        """int32 [tokens] for each text. `add_special_tokens`: whatever the model starts or ends a text with."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_plain(self, text: str) -> np.ndarray:
        """int32 [tokens]; special tokens in `text` are text like any other, and none are added."""
        return np.array(self._plain_backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode_batch(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """The text of each row, special tokens left out, otherwise exactly as generated."""
        return self._backend.decode_batch([np.asarray(row).tolist() for row in tokens], skip_special_tokens=True)

    def decode_marked(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """The text of each row, special tokens with theirs: tool calls may be marked by them."""
        return self._backend.decode_batch([np.asarray(row).tolist() for row in tokens], skip_special_tokens=False)

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes of text, in UTF-8, that one token stands for at most: a vocabulary writes no byte or space shorter than it is."""
        return max(len(token.encode()) for token in self._backend.get_vocab(with_added_tokens=True))

    @functools.cached_property
    def _plain_backend(self) -> Any:
        # A copy, because this is a switch of the whole tokenizer; made only for the rows that need it.
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = True
        return backend
