"""Stop strings: the text of a row as it grows, searched where a stop string may have just ended."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class StopStrings:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer.backend_tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text = ""

    def find(self, token: int) -> str | None:
        """Take in the next token; the text before the earliest stop string that ends in it, None if there is none."""
        chunk = self._stream.step(self._tokenizer, token)
        if not chunk:
            return None
        before = len(self._text)
        self._text += chunk
        found = [at for s in self._stop if (at := self._text.find(s, max(0, before - len(s) + 1))) >= 0]
        return self._text[: min(found)] if found else None
