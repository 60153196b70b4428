"""The house rules that no other tool checks: what lies where, what is declared, and that every configuration loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.run import read_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "engine", "pipeline")
TOP_LEVEL = {*PACKAGES, "conf", "tests", "jobs", "pyproject.toml", "README.md", "LICENSE", "Makefile"}


def tracked() -> list[Path]:
    """Every file of the project, as git or, in a copy without git, the disk tells."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()]


def test_the_top_level_holds_only_what_is_planned() -> None:
    strangers = {path.relative_to(ROOT).parts[0] for path in tracked()} - TOP_LEVEL
    assert {name for name in strangers if not name.startswith(".")} == set()


def test_no_file_names_a_machine_or_a_registry_host() -> None:
    homes = r"/(?:home|Users)/\w|/root/|/work/"
    hosts = r"pypi\.(?:org|python)|files\.pythonhosted|--(?:extra-)?index-url|find-links"
    places = re.compile(f"{homes}|{hosts}")
    found = []
    for path in tracked():
        if path.suffix in {".parquet", ".gguf", ".safetensors"} or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if places.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(deps for extra, deps in project["optional-dependencies"].items() if extra != "dev")]
    declared = {canonicalize_name(Requirement(line).name) for deps in lists for line in deps}
    owners = packages_distributions()
    missing = {}
    for path in tracked():
        if path.suffix != ".py" or path.relative_to(ROOT).parts[0] not in PACKAGES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - set(PACKAGES):
                if not declared & {canonicalize_name(owner) for owner in owners.get(name, [name])}:
                    missing[name] = str(path.relative_to(ROOT))
    assert missing == {}


def choices() -> list[tuple[str, str]]:
    return sorted((path.parent.name, path.stem) for path in (ROOT / "conf").glob("*/*.yaml"))


@pytest.mark.parametrize(("group", "name"), choices())
def test_every_choice_of_a_group_makes_a_valid_configuration(group: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "64")
    # What a choice leaves to the user.
    given = {"custom": ["model.source=checkpoint"], "manual": ["cluster.worker=0", "cluster.workers=2"]}.get(name, [])
    config = read_config([f"{group}={name}", *given])
    assert config.output.dir.startswith("out/")


def test_bundled_messages_are_two_hundred_different_ones() -> None:
    file = pq.ParquetFile(ROOT / "jobs/examples/customer_messages.parquet")
    table = file.read()
    assert table.column_names == ["id", "channel", "message"]
    assert len(set(table["message"].to_pylist())) == table.num_rows == 200
    assert file.num_row_groups == 4    # so that even the example can be cut into shards


def test_transformers_does_not_take_our_kernels_for_the_hub_package() -> None:
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()
