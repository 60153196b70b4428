"""What the commands that look at an output share: arguments, and errors as one line. None needs a GPU or Hydra."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping

from pipeline.addresses import HOLDS_SECRET, holds_secret
from pipeline.exits import ConfigError, JobError

_BAR = 30


def command(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose first argument is the output folder."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m pipeline.{name}", description=description, epilog=examples, formatter_class=form)
    parser.add_argument("out", metavar="OUT", help="the job's output.dir: a folder or a URL")
    return parser


def add_spool(parser: argparse.ArgumentParser) -> None:
    """For the commands that look into the work folder of an output in an object store, or write there."""
    parser.add_argument("--spool", metavar="DIR", help="the job's output.spool, where it has set one")


def run(main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser) -> int:
    """Parse the command line and do it."""
    arguments = parser.parse_args()
    try:
        if holds_secret(arguments.out):
            raise ConfigError(f"OUT: {HOLDS_SECRET}, which would be printed; leave it out, and set it in the environment")
        return int(main(arguments))
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:      # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def histogram(counts: Mapping[str, int]) -> str:
    """One line for each status, the most frequent first."""
    total = max(sum(counts.values()), 1)
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return "\n".join(f"{name:<16} {n:>12,}  {n / total:7.2%}  {'#' * max(round(_BAR * n / total), 1)}" for name, n in ordered)


def ranges(numbers: list[int]) -> str:
    """`0,3-7,12`: what `sbatch --array` takes."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
