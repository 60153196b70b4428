"""pipeline.quantize: what becomes calibration data, what is written and refused, and that a stopped run leaves nothing."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import END_OF_TEXT, tiny_checkpoint, tiny_tokenizer

from engine.quantize import folder as folders
from engine.weights import open_checkpoint
from pipeline.calibration import calibration_set
from pipeline.config import InputKeys, TaskKeys
from pipeline.exits import ConfigError
from pipeline.quantize import main, read_config
from pipeline.tokenizer import RowTokenizer, load_tokenizer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line; returns the exit code, standard output, and standard error without the progress bar."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err.rpartition("\r")[2]

    return run


def table(tmp_path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    return str(tmp_path / "data.parquet")


def rows(tmp_path: Path, task: TaskKeys | None = None, samples: int = 8, length: int = 512, keys: dict[str, Any] | None = None,
         **columns: Any) -> list[str]:
    tokenizer = RowTokenizer(tiny_tokenizer())
    found = calibration_set(table(tmp_path, **columns), InputKeys(**keys or {}), task or TaskKeys(), tokenizer, samples, length)
    assert all(sequence.dtype == np.int32 for sequence in found)
    return [tokenizer.tokenizer.decode(sequence) for sequence in found]


def test_rows_become_text_as_in_a_job(tmp_path: Path) -> None:
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert rows(tmp_path, prompt=["a", None, "b"]) == [chat.format("a"), chat.format("b")]
    talk = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    assert rows(tmp_path, messages=talk) == ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                                             "<|im_start|>assistant\n"]
    assert rows(tmp_path, text=["plain words"]) == ["plain words"]
    assert rows(tmp_path, question=["a"], keys={"columns": {"prompt": "question"}}) == [chat.format("a")]
    assert rows(tmp_path, TaskKeys(prompt="{{ text }}!"), text=["a"]) == [chat.format("a!")]
    # Columns that a job would obey, and quantising has no use for.
    assert rows(tmp_path, prompt=["a"], schema=["not JSON"], sampling=["{"], adapter=["x"]) == [chat.format("a")]


def test_samples_are_the_first_rows_cut_to_length(tmp_path: Path) -> None:
    assert rows(tmp_path, samples=2, length=3, text=["", "abcde", "fg", "h"]) == ["abc", "fg"]
    assert rows(tmp_path, keys={"limit": 2}, text=["a", "b", "c"]) == ["a", "b"]
    with pytest.raises(ConfigError, match="no row becomes a prompt to calibrate with"):
        rows(tmp_path, prompt=[None, " "])


@pytest.mark.parametrize(("words", "says"), [
    (["metod=awq"], "metod: no such key; did you mean method?"),
    (["method=awk"], "method=awk: input should be 'awq', 'gptq', 'fp8' or 'rtn'"),
    (["gptq.order=fast"], "gptq.order=fast: input should be 'none', 'static' or 'full'"),
    (["awq.steps=0"], "awq.steps=0: input should be greater than or equal to 1"),
    (["bits=8"], "bits=8: method=awq is stored in 4 bits; set method=gptq or method=fp8"),
    (["method=fp8", "group_size=64"], "group_size=64: FP8 has 8 bits"),
    (["group_size=-1"], "group_size=-1: method=awq needs groups"),
    (["group_size=128"], "group_size=128 does not divide the 64 inputs of model.layers.1.mlp.up_proj: set group_size=32"),
    (["data=nowhere.parquet"], "data=nowhere.parquet: no such file or folder"),
    (["device=tpu"], "device=tpu: no such device"),
    (["model=nowhere.gguf"], "model.source: no model at nowhere.gguf"),
])
def test_refusals_are_one_line(words: list[str], says: str, command: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, said = command(f"model={model}", f"out={out}", *words)
    assert (code, printed, out.exists()) == (2, "", False)
    line, = [line for line in said.splitlines() if not line.startswith("calibrating")]
    assert line.startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_and_no_folder_are_refused(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert command(f"model={model}", f"out={tmp_path}") == (
        2, "", f"error: out={tmp_path}: exists already; give another name, or remove it\n")
    assert command(f"model={model}") == (2, "", "error: out: not set; give out=VALUE\n")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "rtn"])
def test_the_folder_is_a_model_with_its_tokenizer(method: str, command: Command, model: Path, tmp_path: Path) -> None:
    data = table(tmp_path, prompt=["How are you?", "What is it?", "x" * 40] * 4)
    code, printed, _ = command(f"model={model}", f"out={tmp_path / 'new/out'}", f"method={method}", f"data={data}",
                               "awq.steps=4", "device=cpu")
    assert code == 0
    assert printed.startswith(f"{tmp_path / 'new/out'}: {method}, ")
    assert ("mean relative error" in printed) == (method in ("awq", "gptq"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    stored = open_checkpoint(tmp_path / "new/out").spec.quantization
    assert stored is not None and stored.method == {"rtn": "awq", "fp8": "compressed-tensors"}.get(method, method)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "new/out" / name).read_bytes() == (model / name).read_bytes()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "new/out").iterdir())


def test_another_chat_template_is_written(command: Command, model: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jinja"
    chat.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert command(f"model={model}", f"out={tmp_path / 'out'}", "method=rtn", f"model.chat_template={chat}")[0] == 0
    tokenizer = RowTokenizer(load_tokenizer(tmp_path / "out"))
    assert tokenizer.render_chats([[{"role": "user", "content": "a"}]])[0] == "[a]"
    assert tokenizer.encode_batch(["<|endoftext|>"], False)[0].tolist() == [END_OF_TEXT]


def test_a_stopped_run_leaves_nothing(command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal, and by a full disk, when half of the model has been written."""
    words = (f"model={model}", f"out={tmp_path / 'out'}", "method=fp8")
    add, seen = folders.FolderWriter.add, []
    monkeypatch.setattr(folders, "_SHARD_BYTES", 30_000)

    def full() -> None:
        raise OSError(28, "No space left on device")

    def failing(self: Any, name: str, tensor: Any, fail: Callable[[], None]) -> None:
        add(self, name, tensor)
        if name == "model.layers.1.input_layernorm.weight":
            inside, = tmp_path.iterdir()
            seen.append(sorted(path.name for path in inside.iterdir()))
            fail()

    for fail, code, says in ((lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped: nothing was written"),
                             (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped: nothing was written"),
                             (full, 1, f"error: {tmp_path / 'out'}: cannot be written ([Errno 28] No space left on device)")):
        monkeypatch.setattr(folders.FolderWriter, "add", functools.partialmethod(failing, fail=fail))
        found, printed, said = command(*words)
        assert (found, printed) == (code, "")
        assert said.splitlines()[-1] == says
        assert list(tmp_path.iterdir()) == []
    assert all(files and files[0] == "part-00000.safetensors" for files in seen) and len(seen) == 3


def test_the_bundled_messages_are_the_default_data() -> None:
    config = read_config(["out=x"])
    assert (config.method, config.task.prompt) == ("awq", "{{ message }}")
    assert read_config(["out=x", "task.prompt={{ channel }}"]).task.prompt == "{{ channel }}"
    found = calibration_set(config.data, config.input, config.task, RowTokenizer(tiny_tokenizer()), 5, 512)
    assert len(found) == 5 and min(sequence.size for sequence in found) > 40


def test_help_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "python -m pipeline.quantize model=qwen2.5-1.5b" in said and "  smollm2" in said and "Exit codes" in said
    assert main(["--cfg", "out=x", "gptq.damping=0.05"]) == 0
    assert "damping: 0.05" in capsys.readouterr().out
