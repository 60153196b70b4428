"""The table of all token automata: rows step as their own automaton would, and memory stays within its bound while it grows."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

import engine.automata
from engine.automata import Automata, _Column
from engine.guided.automaton import TokenAutomaton, token_automaton
from engine.guided.regular import choice_dfa
from engine.guided.token_trie import Vocabulary

VOCAB = 264


def automaton(choice: str) -> TokenAutomaton:
    """Tokens 0..255 are bytes, 256 ends."""
    made = token_automaton(choice_dfa([choice, "?"], 1000), Vocabulary([bytes([i]) for i in range(256)]), list, [256], VOCAB)
    assert made is not None
    return made


def bytes_of(automata: Automata) -> int:
    return sum(c.device.nbytes for c in vars(automata).values() if isinstance(c, _Column))


def test_tables_stay_within_their_bound_also_while_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 200_000
    monkeypatch.setattr(engine.automata, "MAX_BYTES", bound)
    automata, peak = Automata(VOCAB, torch.device("cpu")), 0
    append = _Column.append

    def watched(column: _Column, values: np.ndarray) -> int:
        nonlocal peak
        before, old = bytes_of(automata), column.device
        at = append(column, values)
        peak = max(peak, before + column.device.nbytes if column.device is not old else before)
        return at

    monkeypatch.setattr(_Column, "append", watched)
    made = [automaton(f"{i} " * 8) for i in range(100, 160)]
    states = [automata.place(one) for one in made]
    placed = [(one, state) for one, state in zip(made, states, strict=True) if state]
    assert 10 < len(placed) < len(made)
    assert bound / 3 < peak <= bound
    for one, state in placed:                                    # all that grew moved with what it held
        assert automata.place(one) == state
        own = 0
        for byte in f"{100 + made.index(one)} ".encode() * 8:
            own = one.step(own, byte)
            state = int(automata.step(np.array([state]), np.array([byte]))[0])
        assert automata.finished[state] and one.finished[own]
    assert (automata._table.device[: len(automata._table.host)].numpy() == automata._table.host).all()


def test_automata_without_room_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.automata, "MAX_BYTES", 1)
    automata, refused = Automata(VOCAB, torch.device("cpu")), automaton("yes")
    kept = weakref.ref(refused.next)
    assert automata.place(refused) == 0
    del refused
    gc.collect()
    assert kept() is None
