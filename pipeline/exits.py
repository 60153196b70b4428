"""How a run ends: the exit codes, and the errors that carry one. Their message is one line: what is wrong and how to mend it."""

from __future__ import annotations

from enum import IntEnum

from pipeline.addresses import hide_secrets


class Exit(IntEnum):
    COMPLETE = 0
    FAILED = 1             # storage or another machine failure: nothing committed is lost, the same command resumes
    CONFIG = 2             # a config, an input or an output folder that does not fit
    SHARDS_MISSING = 3
    ERROR_RATE = 4         # complete, but more failed rows than limits.max_error_rate
    DRAINED = 75           # stopped cleanly before the end; the same command resumes (EX_TEMPFAIL of sysexits.h)


class JobError(Exception):
    """An error that ends the run with one line and `exit_code`. Secrets of addresses, which it may quote from a client library or
    the command line, are hidden."""

    exit_code = Exit.FAILED

    def __init__(self, line: str) -> None:
        super().__init__(hide_secrets(line))


class ConfigError(JobError):
    """What the user asked for cannot be done as asked: raised before the model is loaded wherever possible."""

    exit_code = Exit.CONFIG


class ShardsMissing(JobError):
    """Some planned shards are not committed yet."""

    exit_code = Exit.SHARDS_MISSING


class StorageError(JobError):
    """The output or its work folder cannot be read or written: disk full, quota, read-only, damaged file."""
