"""Tokenizers from folders and GGUF files: against `tokenizers` itself, hand-made vocabularies, and the real SmolLM2."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from models import END_OF_TEXT, TURN_END, real_model, tiny_checkpoint, tiny_tokenizer
from tokenizers import Tokenizer

from engine.models.spec import ModelError
from engine.request import FinishReason, Request, SamplingParams
from pipeline.exits import ConfigError
from pipeline.model import RealModel
from pipeline.run import read_config
from pipeline.tokenizer import RowTokenizer, load_tokenizer

TEXTS = ["", "Hello  world", "\n\n 123 café 你好 😀", "a<|im_end|>b", 'don\'t {"x" : 1 , "y":[ ]}', " \t\r\n x", "\x00é́"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint("llama", tmp_path)


def test_folder_round_trip(folder):
    tokenizer = RowTokenizer(load_tokenizer(folder))
    rows = tokenizer.encode_batch(TEXTS, True)
    assert all(row.dtype == np.int32 for row in rows)
    assert rows[1].tolist() == list(b"Hello  world")
    assert rows[3].tolist() == [*b"a", TURN_END, *b"b"]
    assert tokenizer.decode_batch(rows) == [text.replace("<|im_end|>", "") for text in TEXTS]
    assert tokenizer.decode_batch([[72, 105, 300, TURN_END]]) == ["Hi"]       # padding of the vocabulary, then an end token
    assert tokenizer.special_tokens == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_special_tokens_as_plain_text(folder):
    tokenizer = RowTokenizer(load_tokenizer(folder))
    assert tokenizer.encode_plain("a<|im_end|>b").tolist() == list(b"a<|im_end|>b")
    assert tokenizer.encode_batch(["<|im_end|>"], False)[0].tolist() == [TURN_END]


def test_chat(folder):
    tokenizer = RowTokenizer(load_tokenizer(folder))
    assert tokenizer.render_chats([CHAT])[0] == RENDERED
    with pytest.raises(ModelError, match=r"^model.chat_template: line 2: unexpected end of template"):
        load_tokenizer(folder, "{{ messages }}\n{{ messages")
    own = RowTokenizer(load_tokenizer(folder, "{{ messages[1].content }} {{ tools[0].name if tools else 'none' }}"))
    assert own.render_chats([CHAT])[0] == "What is 2+2? none"
    assert own.render_chats([CHAT], [{"name": "add"}])[0] == "What is 2+2? add"


def test_templates_are_sandboxed(folder):
    tokenizer = RowTokenizer(load_tokenizer(folder, "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"))
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.render_chats([CHAT])[0]


def test_several_templates_take_the_default(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    tokenizer.save_pretrained(folder)
    assert RowTokenizer(load_tokenizer(folder)).render_chats([CHAT])[0] == "plain"


def test_prompts_are_never_cut(folder):
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert len(RowTokenizer(load_tokenizer(folder)).encode_batch(["0123456789"], True)[0]) == 10


def test_the_longest_token(folder):
    tokenizer = RowTokenizer(load_tokenizer(folder))
    texts = [tokenizer.decode_marked([[token]])[0] for token in range(len(tokenizer.tokenizer))]
    longest = max(len(text.encode()) for text in texts)
    assert longest <= tokenizer.longest_token <= 2 * longest


def test_threads_share_one(folder):
    tokenizer, wrong = RowTokenizer(load_tokenizer(folder)), []

    def work(text: str) -> None:
        for _ in range(50):
            ok = tokenizer.encode_plain(text).tolist() == list(text.encode()) and tokenizer.render_chats([CHAT])[0] == RENDERED
            if not ok or tokenizer.decode_batch(tokenizer.encode_batch([text], False)) != [text]:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(f"row {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def edit(path, **changes):
    """Change keys of a JSON file; None: leave them out."""
    keys = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


def test_the_tokenizers_end_token_ends_rows(folder):
    """Also where the config names another: fine-tunes for chat often keep that of the model they were made from."""
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=END_OF_TEXT)

    def answer(**params):
        model = RealModel(read_config([f"model={folder}", "engine.cpu_kv_gib=0.1", "engine.device=cpu"]))
        engine = model.load(lambda message: None)
        engine.submit(Request(0, np.arange(40, 60, dtype=np.int32), SamplingParams(max_tokens=40, **params)))
        while not (done := engine.step()):
            pass
        engine.close()
        return done[0].tokens.tolist(), done[0].finish_reason

    free, _ = answer(ignore_eos=True)
    end = next(token for token in free[5:] if token < END_OF_TEXT)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folder)
    first = next(at for at, token in enumerate(free) if token in (end, END_OF_TEXT))
    assert answer() == (free[:first], FinishReason.STOP)
    edit(folder / "config.json", eos_token_id=None)                                # the tokenizer's alone will do
    assert answer() == (free[: free.index(end)], FinishReason.STOP)


def test_a_model_without_end_token_is_refused(folder):
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match=r"model\.source: .* generation_config\.json"):
        RealModel(read_config([f"model={folder}"])).grammars()


def write_vocabulary(path: Path, model: str, entries: list[tuple[str, int]], **keys: Any) -> Path:
    """A GGUF file of a tokenizer only. `entries`: (token, type)."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list([token for token, _ in entries])
    writer.add_token_types([kind for _, kind in entries])
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_vocabulary(folder: Path, **keys: Any) -> Path:
    """The tiny tokenizer's bytes, two merges, a control, a user-defined and an unused token."""
    vocab = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()).get_vocab(with_added_tokens=False)
    entries = [(token, 1) for token in sorted(vocab, key=vocab.__getitem__)]
    entries += [("12", 1), ("ĊĊ", 1), ("<|end|>", 3), ("<tool>", 4), ("[PAD0]", 5)]
    return write_vocabulary(folder / "model.gguf", "gpt2", entries, token_merges=["1 2", "Ċ Ċ"], eos_token_id=258,
                            bos_token_id=258, **keys)


@pytest.mark.parametrize(("pre", "digits", "breaks"), [
    ("smollm", [49, 50], [10, 10]), ("gpt-2", [256], [10, 10]), ("qwen2", [49, 50], [257]), ("llama-bpe", [256], [257])])
def test_byte_level_splits(pre, digits, breaks, tmp_path):
    tokenizer = RowTokenizer(load_tokenizer(byte_vocabulary(tmp_path, tokenizer_pre=pre, add_bos_token=False)))
    rows = tokenizer.encode_batch(["12", "a\n\nb", "x<|end|><tool>", "[PAD0]"], True)
    assert [row.tolist() for row in rows] == [digits, [97, *breaks, 98], [120, 258, 259], [*b"[PAD0]"]]
    assert tokenizer.special_tokens == ["<|end|>"]
    assert tokenizer.decode_batch(rows[2:3]) == ["x<tool>"]


@pytest.mark.parametrize(("number", "token"), [(259, "<tool>"), (261, None), (2**32 - 1, None)])
def test_a_padding_token_that_is_not_there_is_none(number, token, tmp_path):
    path = byte_vocabulary(tmp_path, tokenizer_pre="qwen2", pad_token_id=number)
    assert load_tokenizer(path).pad_token == token


def test_beginning_of_text(tmp_path):
    path = byte_vocabulary(tmp_path, tokenizer_pre="llama-bpe")                    # Llama 3 files need not say so
    tokenizer = RowTokenizer(load_tokenizer(path))
    assert [tokenizer.encode_batch(["a"], add)[0].tolist() for add in (True, False)] == [[258, 97], [97]]
    assert tokenizer.encode_plain("a").tolist() == [97]


def test_qwen_composes_characters(tmp_path):
    tokenizer = RowTokenizer(load_tokenizer(byte_vocabulary(tmp_path, tokenizer_pre="qwen2")))
    assert tokenizer.encode_batch(["e\u0301"], False)[0].tolist() == list("é".encode())


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece(spaced, tmp_path):
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab"]
    entries = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    entries += [*((piece, 1) for piece in pieces), ("\n\n", 4)]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -3.0, -2.0, -1.0, -4.0, 0.0]
    tokenizer = RowTokenizer(load_tokenizer(write_vocabulary(
        tmp_path / "model.gguf", "llama", entries, token_scores=scores, bos_token_id=1, eos_token_id=2, unk_token_id=0,
        add_space_prefix=spaced)))
    ids = {piece: 259 + i for i, piece in enumerate(pieces)}

    def encoded(text):
        return tokenizer.encode_batch([text], True)[0].tolist()

    start = [ids["▁"]] if spaced else []
    assert encoded("abc") == [1, *([ids["▁a"]] if spaced else [ids["a"]]), ids["bc"]]    # the best score goes first: b + c
    assert encoded("é")[1:] == [*start, 3 + 0xC3, 3 + 0xA9]                              # bytes for what has no piece
    assert encoded("b\n\nc")[-3:] == [ids["b"], 267, *([ids["▁"]] if spaced else []), ids["c"]][-3:]
    assert tokenizer.decode_batch([encoded("ab é c")]) == ["ab é c"]


@pytest.mark.parametrize(("model", "pre", "says"), [("bert", "x", "'bert' is not supported"), ("gpt2", "mystery", "'mystery'")])
def test_unknown_kinds_are_refused(model, pre, says, tmp_path):
    path = write_vocabulary(tmp_path / "model.gguf", model, [("a", 1), ("aa", 1)], token_merges=["a a"], tokenizer_pre=pre)
    with pytest.raises(ModelError, match=says):
        load_tokenizer(path)


@pytest.mark.parametrize(("merges", "says"), [
    (["a b"], r"the GGUF metadata's tokenizer is damaged \(.*`b` out of vocabulary.*\); give model\.tokenizer"),
    (["aa"], "the GGUF metadata's tokenizer is damaged"),
    ([1], r"holds \[1\] as tokenizer\.ggml\.merges"),
])
def test_merges_that_do_not_fit_are_refused(merges, says, tmp_path):
    path = write_vocabulary(tmp_path / "model.gguf", "gpt2", [("a", 1), ("aa", 1)], token_merges=merges, tokenizer_pre="gpt-2")
    with pytest.raises(ModelError, match=says) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, text", [("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]"),
                                        ("tokenizer_config.json", '{"eos_token": 5}')])
def test_a_folder_with_a_broken_tokenizer_is_refused(name, text, folder):
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=r"its tokenizer\.json, or what goes with it, cannot be read") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_missing_metadata_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.ggml\.merges"):
        load_tokenizer(write_vocabulary(tmp_path / "model.gguf", "gpt2", [("a", 1)]))


def test_smollm2():
    tokenizer = RowTokenizer(load_tokenizer(real_model("smollm2")))
    assert tokenizer.render_chats([CHAT])[0] == RENDERED
    ids = tokenizer.encode_batch([RENDERED], False)[0].tolist()
    assert ids[0] == 1
    assert ids.count(2) == 2
    assert tokenizer.tokenizer.eos_token_id == 2
    assert tokenizer.decode_batch([[i] for i in tokenizer.encode_batch(["items 123"], True)[0]]) == ["items", " ", "1", "2", "3"]
    texts = [text for text in TEXTS if "<|" not in text]
    assert tokenizer.decode_batch(tokenizer.encode_batch(texts, True)) == texts
