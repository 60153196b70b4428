"""One tokenizer and one backend for all tests of guided decoding."""

from __future__ import annotations

import pytest
from guided_cases import PADDED, byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

from engine.guided.llg import LLGuidanceBackend


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def backend(tokenizer: PreTrainedTokenizerFast) -> LLGuidanceBackend:
    return LLGuidanceBackend(tokenizer, PADDED, [0, 1], threads=1)
