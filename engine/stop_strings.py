"""Stop strings: the text of a row as it grows, searched where a stop string may have just ended."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class StopStrings:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer.backend_tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._longest = max(map(len, stop))
        self._text = ""

    def find(self, tokens: Sequence[int]) -> str | None:
        """Take in new tokens; the text before the earliest stop string once there is one, else None."""
        for token in tokens:
            chunk = self._stream.step(self._tokenizer, token)
            if not chunk:
                continue
            start = max(0, len(self._text) - self._longest + 1)
            self._text += chunk
            ends = [at for s in self._stop if (at := self._text.find(s, start)) >= 0]
            if ends:
                return self._text[: min(ends)]
        return None
