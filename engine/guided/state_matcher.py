"""Matchers over the bytes as the closing search wants them: for backends that have none of their own."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from engine.guided.closing import END, ByteMatcher


class ByteByByte(ByteMatcher):
    """What follows from consume_token and rollback."""

    def try_consume_tokens(self, tokens: list[int]) -> int:
        for taken, byte in enumerate(tokens):
            if not self.consume_token(byte):
                return taken
        return len(tokens)

    def consume_tokens(self, sampled_tokens: list[int]) -> bool:
        return self.try_consume_tokens(sampled_tokens) == len(sampled_tokens)

    def validate_tokens(self, tokens: list[int]) -> int:
        taken = self.try_consume_tokens(tokens)
        self.rollback(taken)
        return taken


@dataclass(slots=True)
class StateMatcher(ByteByByte):
    """Of a finite automaton. moves: state -> byte -> state; END is no move. finals: states where the output may end."""

    moves: Mapping[int, Mapping[int, int]]
    finals: Set[int]
    state: int
    before: list[int] = field(default_factory=list)

    def deep_copy(self) -> StateMatcher:
        return StateMatcher(self.moves, self.finals, self.state, list(self.before))

    def consume_token(self, sampled_token: int) -> bool:
        after = self.moves.get(self.state, {}).get(sampled_token) if sampled_token != END else None
        if after is None:
            return False
        self.before.append(self.state)
        self.state = after
        return True

    def rollback(self, num_tokens: int) -> bool:
        if num_tokens:
            self.state = self.before[-num_tokens]
            del self.before[-num_tokens:]
        return True

    def is_accepting(self) -> bool:
        return self.state in self.finals

    def compute_ff_bytes(self) -> bytes:
        out, state = bytearray(), self.state
        while state not in self.finals and len(moves := self.moves.get(state, {})) == 1 and len(out) < 1 << 16:
            (byte, state), = moves.items()
            out.append(byte)
        return bytes(out)

    def compute_bitmask(self) -> bytes:
        bits = sum(1 << byte for byte in self.moves.get(self.state, {}) if byte != END)
        return (bits | self.is_accepting() << END).to_bytes(33, "little")
