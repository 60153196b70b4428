"""The tokenizer as the grammar engine sees it."""

from __future__ import annotations

import json

import pytest
from guided_cases import CORPUS, PADDED, byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.guided.vocabulary import GrammarVocabulary

TEXT = '{"a b": [1, "é日🙂"]}\n\ta  b'


def with_decoder(steps: list[dict]) -> PreTrainedTokenizerFast:
    spec = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    spec["decoder"] = {"type": "Sequence", "decoders": [*steps, spec["decoder"]]} if steps else {"type": "ByteFallback"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|end|>")


@pytest.mark.parametrize("steps", [
    [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}],
    [{"type": "Fuse"}],
])
def test_a_byte_level_decoder_counts_wherever_it_stands(steps: list[dict]) -> None:
    """As transformers 5.17 writes it for GGUF files: the first steps are of another kind of vocabulary, and do nothing."""
    tokenizer = with_decoder(steps)
    vocabulary = GrammarVocabulary(tokenizer, PADDED, [0])
    ids = tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert vocabulary.text(ids).decode() == TEXT == tokenizer.decode(ids)
    assert vocabulary.text(vocabulary.tokenize(TEXT.encode())).decode() == TEXT


def test_a_tokenizer_that_would_be_misread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not understand this tokenizer.*set model\.tokenizer"):
        GrammarVocabulary(with_decoder([]), PADDED, [0])


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_vocabularies_of_sentencepiece(kind: str) -> None:
    """As Llama 2 and Mistral write them: a space before any text, and single bytes for what has no token."""
    unicode = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "prepend":
        unicode.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        unicode.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    unicode.decoder = decoders.Sequence(space)
    singles = [f"<0x{byte:02X}>" for byte in range(256)]
    unicode.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *singles],
                                                            show_progress=False))
    spec = json.loads(unicode.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]                          # bytes are tokens, not special ones
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>")
    vocabulary = GrammarVocabulary(tokenizer, PADDED, [2])
    ids = tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert vocabulary.text(ids).decode() == " " + TEXT
    assert tokenizer.decode(ids) == TEXT
