"""Where results come from: versions, commit, host, and the configuration as it was resolved."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.addresses import hide_secrets
from pipeline.config import RunConfig

_PACKAGES = ("gristmill", "torch", "triton", "transformers", "tokenizers", "llguidance", "outlines", "pyarrow", "datasets")


def provenance(config: RunConfig, model: dict[str, str]) -> dict[str, Any]:
    """For people, never compared. The configuration holds no secrets: pipeline.config refuses them."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *map(hide_secrets, sys.argv[1:])],      # also of words that others overrule
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "model": model,
        "config": config.resolved(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this runs from; None for an installed package or without git."""
    home = Path(__file__).resolve().parents[2]
    if not (home / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
