"""`python -m pipeline.quantize`: make a 4-bit or FP8 model of a 16-bit one, as a folder that other engines load too."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field
from tqdm import tqdm

from pipeline.config import InputKeys, ModelKeys, Strict, TaskKeys, validate
from pipeline.exits import ConfigError, Exit, JobError, StorageError
from pipeline.input.formats import first_line
from pipeline.model import resolve
from pipeline.run import compose_tree, given_keys, listed, normalise

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerFast

    from engine.models.spec import ModelSpec
    from engine.quantize.methods import Method
    from engine.weights import Checkpoint

# What transformers and vLLM read of a tokenizer; copied where a folder has them.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
                    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")

HELP = """\
Make a 4-bit or FP8 model of a 16-bit one: a folder of safetensors, config.json and tokenizer that vLLM and transformers load too.

  python -m pipeline.quantize out=smollm2-awq                                             SmolLM2, the bundled messages, AWQ
  python -m pipeline.quantize model=qwen2.5-1.5b method=awq data=calibration.parquet out=qwen-awq
  python -m pipeline.quantize model=./checkpoint method=gptq bits=8 group_size=-1 out=checkpoint-gptq
  python -m pipeline.quantize model=mistral-7b method=fp8 out=mistral-fp8                 needs no data
  python -m pipeline.run model=./qwen-awq data=prompts.parquet

Layers are read, rounded and written one at a time: one layer and the calibration set's hidden states are in memory.

Groups (NAME=CHOICE)
%s
            also a folder, a .gguf file or a hub id: model=./my-checkpoint
%s
            how rows become text, as in pipeline.run; also a file: task=./tickets.yaml

Keys (KEY=VALUE; python -m pipeline.quantize --cfg out=X prints all of them with their values)
  method            awq, gptq, fp8, or rtn: round to nearest, the baseline
  out               the folder to write; it appears when it is whole
  data              to calibrate awq, gptq and static fp8 with: columns messages, prompt or text, or those of a template
  calibration.samples  .length            how many of its first rows, and at most how many tokens of each
  bits  group_size                        4 (gptq: or 8); input columns that share a scale
  awq.steps  .clip  .rounding             scales tried for each input; search how far to clip; gptq (on scaled weights) or nearest
  gptq.symmetric  .order  .damping        order: none, static, full (desc_act)
  fp8.activations                         dynamic: a scale for each token; static: one a layer, from calibration
  dtype  device                           of what is not rounded; auto, cuda, cuda:N, cpu

Exit codes
  0 written   1 the storage failed   2 configuration, model or data   130/143 stopped by a signal: nothing is left behind
"""


class CalibrationKeys(Strict):
    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=1)


class AwqKeys(Strict):
    steps: int = Field(20, ge=1, le=100)
    clip: bool = True
    rounding: Literal["nearest", "gptq"] = "gptq"


class GptqKeys(Strict):
    symmetric: bool = True
    order: Literal["none", "static", "full"] = "static"
    damping: float = Field(0.01, gt=0, lt=1)


class Fp8Keys(Strict):
    activations: Literal["dynamic", "static"] = "dynamic"


class QuantizeConfig(Strict):
    model: ModelKeys
    method: Literal["awq", "gptq", "fp8", "rtn"]
    out: str = Field(min_length=1)
    data: str | list[str]
    task: TaskKeys = TaskKeys()
    input: InputKeys = InputKeys()
    calibration: CalibrationKeys = CalibrationKeys()
    bits: Literal[4, 8] | None = None
    group_size: Literal[-1, 32, 64, 128] | None = None
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    device: str = "auto"
    awq: AwqKeys = AwqKeys()
    gptq: GptqKeys = GptqKeys()
    fp8: Fp8Keys = Fp8Keys()


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help", "help") for word in argv):
        print(HELP % (listed("model"), listed("task")), end="")
        return Exit.COMPLETE
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        config = read_config([word for word in argv if word != "--cfg"])
        if "--cfg" in argv:
            print(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True), end="")
            return Exit.COMPLETE
        run(config)
        return Exit.COMPLETE
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt as stopped:
        print("stopped: nothing was written", file=sys.stderr)
        return 128 + int(stopped.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def read_config(argv: Sequence[str]) -> QuantizeConfig:
    """Compose conf/quantize.yaml with the overrides of `argv` and check it. Raises ConfigError with one line."""
    words = normalise(argv)
    if not any(key.split(".")[0] in ("data", "task") for key in given_keys(words)):
        words.append("task.prompt='{{ message }}'")     # the bundled messages
    config = validate(QuantizeConfig, compose_tree("quantize", words, QuantizeConfig))
    if config.method == "fp8":
        for key in ("bits", "group_size"):
            if (value := getattr(config, key)) is not None:
                raise ConfigError(f"{key}={value}: FP8 has 8 bits and a scale for each row; leave it out, or set method=gptq")
    elif config.method != "gptq" and config.bits == 8:
        raise ConfigError(f"bits=8: method={config.method} is stored in 4 bits; set method=gptq or method=fp8")
    elif config.method != "gptq" and config.group_size == -1:
        raise ConfigError(f"group_size=-1: method={config.method} needs groups; set 32, 64 or 128, or method=gptq")
    return config


def run(config: QuantizeConfig) -> None:
    """Quantise and write config.out. Raises JobError with one line."""
    started = time.monotonic()
    out, device = _free(config.out), _device(config.device)
    dtype = None if config.dtype == "auto" else config.dtype

    from engine.models.spec import ModelSpec
    from engine.quantize.model import check
    from engine.weights import open_checkpoint
    from pipeline.calibration import calibration_set
    from pipeline.tokenizer import RowTokenizer, load_tokenizer

    def accept(raw: dict[str, Any]) -> None:
        """Of a model on the hub, before its weights are fetched."""
        spec = ModelSpec.from_hf(raw)
        check(spec, make_method(config, spec), dtype)

    try:
        path = tokenizer_path = resolve("model.source", config.model.source, accept)
        if config.model.tokenizer is not None:
            tokenizer_path = resolve("model.tokenizer", config.model.tokenizer)
        checkpoint = open_checkpoint(path)
        method = make_method(config, checkpoint.spec)
        check(checkpoint.spec, method, dtype)
        tokenizer = load_tokenizer(tokenizer_path, config.model.chat_template)
        sequences = []
        if method.needs_data:
            sequences = calibration_set(config.data, config.input, config.task, RowTokenizer(tokenizer),
                                        config.calibration.samples, config.calibration.length)
            tokens = sum(sequence.size for sequence in sequences)
            print(f"calibrating with {len(sequences)} samples, {tokens:,} tokens", file=sys.stderr)
        errors = _write(config, checkpoint, method, sequences, out, device, dtype, functools.partial(
            write_tokenizer, tokenizer, tokenizer_path, config.model.chat_template is not None))
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    size = sum(file.stat().st_size for file in out.iterdir())
    mean = f", mean relative error of a layer's output {sum(errors) / len(errors):.2%}" if errors else ""
    print(f"{out}: {config.method}, {size / 2**20:,.0f} MiB, {time.monotonic() - started:.0f} s{mean}")


def _write(config: QuantizeConfig, checkpoint: Checkpoint, method: Method, sequences: Sequence[np.ndarray], out: Path,
           device: torch.device, dtype: str | None, write_rest: Callable[[Path], None]) -> list[float]:
    """Round, write and publish; returns each layer's relative error where the method knows it."""
    import torch
    from safetensors import SafetensorError

    from engine.quantize.model import quantize

    errors: list[float] = []
    try:
        with whole_folder(out) as folder, tqdm(total=checkpoint.spec.num_layers, unit="layer", dynamic_ncols=True) as bar:
            def progress(block: int, error: float | None) -> None:
                if error is not None:
                    errors.append(error)
                    bar.set_postfix_str(f"relative error {error:.2%}")
                bar.update()

            quantize(checkpoint, method, sequences, folder, device, dtype, progress)
            write_rest(folder)
    except torch.OutOfMemoryError:
        raise ConfigError(f"device={config.device}: out of memory; lower calibration.samples, or set device=cpu") from None
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{out}: cannot be written ({first_line(error)})") from error
    return errors


def make_method(config: QuantizeConfig, spec: ModelSpec) -> Method:
    from engine.quantize.methods import Awq, Fp8, Gptq, RoundToNearest, group_size_for

    if config.method == "fp8":
        return Fp8(config.fp8.activations == "static")
    group_size = group_size_for(spec, config.group_size)
    if config.method == "awq":
        damping = config.gptq.damping if config.awq.rounding == "gptq" else None
        return Awq(group_size, config.awq.steps, config.awq.clip, damping)
    if config.method == "gptq":
        return Gptq(group_size, config.bits or 4, config.gptq.symmetric, config.gptq.order, config.gptq.damping)
    return RoundToNearest(group_size)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path, changed: bool, folder: Path) -> None:
    """A folder's own files as they are; otherwise, or with another chat template, what transformers makes of the tokenizer."""
    if path.is_dir() and (path / "tokenizer.json").exists() and not changed:
        for name in _TOKENIZER_FILES:
            if (path / name).exists():
                shutil.copyfile(path / name, folder / name)
    else:
        tokenizer.save_pretrained(folder)
        config = folder / "tokenizer_config.json"
        named = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}     # older releases know it too
        config.write_text(json.dumps(named, indent=2) + "\n")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which takes its name when the block ends, and is removed if it ends by an exception."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".inprogress", dir=out.parent))
    try:
        yield folder
        os.umask(mask := os.umask(0))
        for path in (folder, *folder.iterdir()):      # made for their owner alone, by mkdtemp and safetensors
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _free(name: str) -> Path:
    if "://" in name:
        raise ConfigError(f"out={name}: give a folder of this machine")
    out = Path(name).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={name}: exists already; give another name, or remove it")
    return out


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: no such device; there are auto, cuda, cuda:N and cpu") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={name}: torch has no such device here; set device=cpu, or install torch with CUDA")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)        # kernels run on this thread's current device
    return device


if __name__ == "__main__":
    sys.exit(main())
