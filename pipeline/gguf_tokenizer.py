"""The tokenizer a GGUF file describes, rebuilt with `tokenizers`: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

The file holds vocabulary and merges, but names how text is split before merging only by a keyword; the patterns are those of the
models' own tokenizer.json files. A keyword that is not known is refused: a wrong split changes tokens silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.gguf import GgufFile
from engine.gguf_hf import tokenizer_keys
from engine.models.spec import ModelError
from pipeline.input.formats import first_line

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_INSTEAD = "give model.tokenizer, a folder with the model's tokenizer.json"

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = _WORDS + r"|\p{N}" + _TAIL
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _TAIL
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SPLITS = {"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
           "smaug-bpe": _LLAMA3, "tekken": _TEKKEN}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")      # GPT-2's split, each digit apart
_WHOLE_WORDS_FIRST = _BOS_BY_DEFAULT = (_LLAMA3, _TEKKEN)            # a word in the vocabulary is taken without merging


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Raises ModelError for a tokenizer model or split keyword that is not supported."""
    meta = tokenizer_keys(file)
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(meta.get("model", ""))
    if build is None:
        raise ModelError(f"{file.path}: tokenizer {meta.get('model')!r} is not supported; supported: gpt2, llama; {_INSTEAD}")
    for key in ("tokens", "token_type", "merges" if meta["model"] == "gpt2" else "scores"):
        if key not in meta or not meta["tokens"]:
            raise ModelError(f"{file.path}: the GGUF metadata has no tokenizer.ggml.{key}; {_INSTEAD}")
    tokens: list[str] = meta["tokens"]
    tokenizer = build(file, meta)
    tokenizer.add_tokens([
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, meta["token_type"], strict=True) if kind in (_CONTROL, _USER_DEFINED)])

    def named(key: str) -> str | None:
        number = meta.get(f"{key}_token_id")
        return None if number is None else tokens[number]

    by_default = meta["model"] == "llama" or _SPLITS.get(meta.get("pre", "")) in _BOS_BY_DEFAULT
    bos = named("bos") if meta.get("add_bos_token", by_default) else None
    eos = named("eos") if meta.get("add_eos_token", False) else None
    if bos or eos:
        around = [token for token in (bos, "$A", eos) if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(around), pair=None,
            special_tokens=[(token, tokens.index(token)) for token in (bos, eos) if token])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=meta.get("tokenizer.chat_template"), clean_up_tokenization_spaces=False,
        bos_token=named("bos"), eos_token=named("eos"), unk_token=named("unknown"), pad_token=named("padding"))


def _byte_level(file: GgufFile, meta: dict[str, Any]) -> Tokenizer:
    pre = meta.get("pre", "default")
    split = _SPLITS.get(pre)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)     # its own pattern is GPT-2's
    pre_tokenizer: pre_tokenizers.PreTokenizer
    if split is not None:
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    elif pre in _SINGLE_DIGITS:
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre == "gpt-2":
        pre_tokenizer = byte_level
    else:
        raise ModelError(f"{file.path}: how {pre!r} splits text is not known; {_INSTEAD}")
    # Unused entries only pad the embedding; text never yields them.
    vocab = {token: i for i, (token, kind) in enumerate(zip(meta["tokens"], meta["token_type"], strict=True)) if kind != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    tokenizer = _bpe(file, vocab, merges, ignore_merges=split in _WHOLE_WORDS_FIRST)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if split is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(file: GgufFile, meta: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = meta["tokens"]
    unknown = tokens[meta.get("unknown_token_id", 0)]
    merges = meta.get("merges")
    merges = list(_merges(meta)) if merges is None else [tuple(merge.split(" ")) for merge in merges]
    tokenizer = _bpe(file, {token: i for i, token in enumerate(tokens)}, merges, unk_token=unknown, fuse_unk=True,
                     byte_fallback=True)
    spaces = normalizers.Replace(" ", "▁")
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decoder.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def _bpe(file: GgufFile, vocab: dict[str, int], merges: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as error:      # of no class of its own: merges of tokens that the vocabulary has not
        raise ModelError(f"{file.path}: the GGUF metadata's tokenizer is damaged ({first_line(error)}); {_INSTEAD}") from None


def _merges(meta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """SentencePiece merges the pair that makes the piece of the highest score: every way to cut each piece, best piece first."""
    scores, kinds = meta["scores"], meta["token_type"]
    pieces = {token: i for i, token in enumerate(meta["tokens"]) if kinds[i] == _NORMAL}
    for piece in sorted(pieces, key=lambda piece: -scores[pieces[piece]]):
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                yield piece[:cut], piece[cut:]
