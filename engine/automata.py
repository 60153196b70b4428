"""The token automata of all grammars in use, in one table: on the device, which steps rows by itself, and in numpy.

A row's state is a number over all automata, 0 for a row without one. The device masks a row's logits by its state and moves the
state on by the token it samples, so rows under an automaton are planned ahead like free ones. The host learns the token a step
later and takes the same step in its copy, for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.guided.automaton import TokenAutomaton
from kernels import ops, ref

MAX_BYTES = 256 << 20    # of all tables on the device, also while they grow; grammars beyond are left to their guides
# So many forced tokens or more a row takes in one chunk, not one by one. On a GPU a chunk makes the whole step a mixed one, which
# is launched without a graph; on a CPU it costs nothing.
JUMP = {"cuda": 8, "cpu": 2}


@dataclass(slots=True)
class _Column:
    """An array that grows, and its copy on the device."""

    host: np.ndarray
    device: Tensor

    def capacity(self, more: int) -> int:
        """Places on the device once `more` values are appended: at least twice as many where they do not fit."""
        fits = len(self.host) + more <= len(self.device)
        return len(self.device) if fits else max(2 * len(self.device), len(self.host) + more)

    def append(self, values: np.ndarray) -> int:
        """Returns where they begin."""
        at, capacity = len(self.host), self.capacity(len(values))
        self.host = np.concatenate([self.host, values])
        if capacity > len(self.device):
            grown = torch.zeros(capacity, *self.device.shape[1:], dtype=self.device.dtype, device=self.device.device)
            grown[: len(self.device)] = self.device
            self.device = grown
        self.device[at : len(self.host)] = torch.from_numpy(values).to(self.device.device)
        return at


class Automata:
    """final, finished, sound, chain, chain_start, chain_size and chain_end: as in TokenAutomaton, over all states."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.jump = JUMP[device.type]

        def column(dtype: type, *shape: int) -> _Column:
            values: np.ndarray = np.zeros(shape, dtype=dtype)
            return _Column(values, torch.from_numpy(values).to(device))

        self._table = column(np.int32, 1, ref.STATE_COLUMNS)
        self._next, self._classes = column(np.int32, 1), column(np.int16, 1, vocab_size)
        self._masks = column(np.int32, 1, -(-vocab_size // 32))
        self.final = self.finished = self.sound = np.zeros(1, dtype=bool)
        self.chain, self.chain_start, self.chain_size, self.chain_end = (np.zeros(n, dtype=np.int32) for n in (0, 1, 1, 1))
        self._placed: dict[TokenAutomaton, int] = {}     # of those refused none is kept: they are as large

    def place(self, automaton: TokenAutomaton) -> int:
        """The state in which its rows begin; 0 if there is no room for it."""
        if automaton not in self._placed:
            if not self._has_room(automaton):
                return 0
            self._placed[automaton] = self._append(automaton)
        return self._placed[automaton]

    def _has_room(self, automaton: TokenAutomaton) -> bool:
        """Whether the tables stay within MAX_BYTES: one that grows is there twice for a moment."""
        total = moved = 0
        for column, more in ((self._table, len(automaton.final)), (self._next, automaton.next.size), (self._classes, 1),
                             (self._masks, len(automaton.masks))):
            now, capacity = len(column.device), column.capacity(more)
            total += column.device.nbytes // now * capacity
            moved = max(moved, column.device.nbytes if capacity > now else 0)
        return total + moved <= MAX_BYTES

    def _append(self, automaton: TokenAutomaton) -> int:
        states, kinds = automaton.next.shape
        base = len(self.final)
        table = np.zeros((states, ref.STATE_COLUMNS), dtype=np.int32)
        table[:, ref.STATE_MASK] = self._masks.append(automaton.masks) + automaton.mask_of
        step = automaton.next.astype(np.int32)
        table[:, ref.STATE_NEXT] = self._next.append(np.where(step >= 0, step + base, -1).ravel()) + np.arange(states) * kinds
        table[:, ref.STATE_CLASSES] = self._classes.append(automaton.classes[None])
        self._table.append(table)
        self.final = np.concatenate([self.final, automaton.final])
        self.finished = np.concatenate([self.finished, automaton.finished])
        self.sound = np.concatenate([self.sound, np.full(states, automaton.sound)])
        self.chain_start = np.concatenate([self.chain_start, automaton.chain_start + len(self.chain)])
        self.chain_size = np.concatenate([self.chain_size, automaton.chain_size])
        self.chain_end = np.concatenate([self.chain_end, automaton.chain_end + base])
        self.chain = np.concatenate([self.chain, automaton.chain])
        return base

    # --- on the host ---

    def step(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The next states, int32 [n]; -1 where the token is not allowed. States above 0."""
        line = self._table.host[states]
        kind = self._classes.host[line[:, ref.STATE_CLASSES], tokens]
        return self._next.host[line[:, ref.STATE_NEXT] + kind]

    # --- on the device ---

    def warm_up(self, states: Tensor, dtype: torch.dtype) -> None:
        """Compile the kernels for logits of this type, so that no step of the job waits for them."""
        rows = torch.zeros(1, dtype=torch.int32, device=states.device)
        self.mask(torch.zeros(1, self._classes.host.shape[1], dtype=dtype, device=states.device), states, rows)
        self.advance(states, rows, rows)

    def mask(self, logits: Tensor, states: Tensor, rows: Tensor) -> None:
        """Forbid in logits [S, V] what the states of these table rows forbid; `states` of all rows of the table."""
        ops.mask_by_state(logits, states, rows, self._table.device, self._masks.device)

    def advance(self, states: Tensor, rows: Tensor, tokens: Tensor) -> None:
        ops.advance(states, rows, tokens, self._table.device, self._next.device, self._classes.device)
