"""What is secret in an address, and that messages do not show it."""

from __future__ import annotations

import json
import time
from typing import Any

import huggingface_hub
import pytest

from pipeline.addresses import hide_secrets, holds_secret
from pipeline.exits import ConfigError
from pipeline.model import resolve
from tests.pipeline.conftest import Run

SIGNED = "https://cdn.example/w?X-Amz-Date=1&X-Amz-Security-Token=abc&X-Amz-Signature=abc"


@pytest.mark.parametrize("address, shown", [
    ("https://host/x.csv?key=abc", "https://host/x.csv?key=***"),
    ("https://host/x.csv?a=1&token=abc&b=2", "https://host/x.csv?a=1&token=***&b=2"),
    ("https://host/x.csv?sv=1&sig=a%2Bc%3D&se=2", "https://host/x.csv?sv=1&sig=***&se=2"),
    ("https://host/x.csv?accessToken=abc", "https://host/x.csv?accessToken=***"),
    ("https://host/x.csv?AWSAccessKeyId=abc&Signature=abc", "https://host/x.csv?AWSAccessKeyId=***&Signature=***"),
    ("https://host/x.csv?subscription-key=abc", "https://host/x.csv?subscription-key=***"),
    ("https://host/x.csv#access_token=abc", "https://host/x.csv#access_token=***"),
    (SIGNED, "https://cdn.example/w?X-Amz-Date=1&X-Amz-Security-Token=***&X-Amz-Signature=***"),
    ("https://abc@host/x.csv", "https://***@host/x.csv"),
    ("https://me:a@bc@host/x.csv", "https://me:***@host/x.csv"),
    ("s3://me:a/bc@bucket/x.csv", "s3://me:***@bucket/x.csv"),
    ("simplecache::https://host/x.csv?sig=abc", "simplecache::https://host/x.csv?sig=***"),
    ("zip://x.csv::https://me:abc@host/x.zip", "zip://x.csv::https://me:***@host/x.zip"),
    ("s3://me::a/bc@bucket/x.csv", "s3://me:***@bucket/x.csv"),
])  # fmt: skip
def test_secrets_are_found_and_hidden(address: str, shown: str) -> None:
    assert holds_secret(address)
    assert hide_secrets(f"data: '{address}' cannot be read") == f"data: '{shown}' cannot be read"
    assert not holds_secret(shown)


@pytest.mark.parametrize("address", [
    "https://host:8080/x.csv?version=2&sort_key=name&monkey=1", "https://host:8080/a@b/x.csv", "https://host/x.csv?signed=yes",
    "abfs://container@account.dfs.core.windows.net/x.csv", "hf://org/reviews@main", "s3://bucket/key=1/token=2/x.csv",
    "zip://x.csv::abfs://container@account.dfs.core.windows.net/x.zip", "zip://x.csv::simplecache::s3://bucket/a@b/x.zip",
    "github://org:repository@main/x.csv", "simplecache::github://org:repository@main/x.csv",
])  # fmt: skip
def test_what_is_not_secret_stays(address: str) -> None:
    assert not holds_secret(address)
    assert hide_secrets(address) == address


def test_long_words_are_looked_through_in_no_time() -> None:
    began = time.monotonic()
    assert hide_secrets("a" * 100_000) == "a" * 100_000
    assert time.monotonic() - began < 5


def test_what_a_client_library_quotes_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub hands out signed addresses, and its client names them where they fail."""
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(f"403 Client Error: Forbidden for url: {SIGNED}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"for url: https://cdn\.example/w\?X-Amz-Date=1") as caught:
        resolve("model.tokenizer", "org/name")
    assert "abc" not in str(caught.value)


def test_a_line_that_cannot_be_read_is_shown_without_its_secret(run: Run) -> None:
    ran = run("data=[https://host/x.csv?sig=abc")
    assert ran.code == 2
    assert ran.line.startswith("data=[https://host/x.csv?sig=***: cannot be read")
    assert "abc" not in ran.line


def test_a_word_that_another_overrules_is_kept_without_its_secret(
    run: Run, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data=https://host/x.csv?sig=abc", f"data={table(prompt=['a'])}"]
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    ran = run(*words)
    assert ran.code == 0
    kept = json.loads((ran.folder / "_run.json").read_text())["info"]["command"]
    assert kept == ["run.py", "data=https://host/x.csv?sig=***", words[1]]
