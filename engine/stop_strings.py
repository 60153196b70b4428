"""Stop strings: the text of a row as it grows, searched where a stop string may have just ended."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\ufffd"      # how bytes are decoded that are no character, or not yet


class StopStrings:
    """The text is that of all tokens decoded together. Few are decoded each time: those of the last piece of text, which say what
    the next one looks like after them (with a space, or without), and what came since."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer.backend_tokenizer, stop
        self._tokens: list[int] = []
        self._first = self._next = 0         # tokens where the last piece begins, and where it ends
        self._piece = self._text = ""

    def find(self, token: int) -> str | None:
        """Take in the next token; the text before the earliest stop string that ends in it, None if there is none."""
        self._tokens.append(token)
        text, before = self._decode(self._first), len(self._text)
        if len(text) <= len(self._piece) or text.endswith(UNFINISHED):
            return None
        if text.startswith(self._piece):
            self._text += text[len(self._piece) :]
        else:                                # a byte that comes to nothing spoils those beside it: what was text is none now
            self._text, before = self._decode(0), 0
        self._first, self._next = self._next, len(self._tokens)
        self._piece = self._decode(self._first)
        found = [at for s in self._stop if (at := self._text.find(s, max(0, before - len(s) + 1))) >= 0]
        return self._text[: min(found)] if found else None

    def _decode(self, first: int) -> str:
        return self._tokenizer.decode(self._tokens[first:], skip_special_tokens=True)
