"""`python -m pipeline.run`: read the configuration, run the job, answer with an exit code."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from pydantic import BaseModel

from pipeline.config import RunConfig, check, did_you_mean, known_keys, unknown_key
from pipeline.exits import ConfigError, Exit, JobError

if TYPE_CHECKING:
    from pipeline.model import EngineFactory

HOME = Path(__file__).resolve().parent.parent  # conf/ and jobs/ stand beside the packages, in a checkout and installed
CONF = HOME / "conf"
GROUPS = tuple(sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_")))
# Their values are text that Hydra's grammar would trip over (globs, URLs, braces, equal signs): quoted for the user.
TEXT_KEYS = ("data", "out", "output.dir", "output.spool", "model.source", "model.tokenizer", "model.chat_template",
             "input.delimiter", "input.quote", "task.prompt", "task.system", "task.schema", "task.guided_json",
             "task.guided_regex", "task.tools", "task.tool_choice")  # fmt: skip
LIST_KEYS = ("data", "task.schema", "task.guided_json", "task.tools")  # of these, those that a list may stand for
OPEN_KEYS = ("input.columns.", "task.schema.", "task.guided_json.")  # mappings whose keys are the user's own

_TASK_FILE = re.compile(r"task=.*\.ya?ml$")
_QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1""", re.DOTALL)  # by the user, for Hydra
_JSON_OBJECTS = re.compile(r'\[\s*\{\s*"')  # Hydra's own objects have keys without quotes

HELP = """\
Label or generate for every row of a data set, and write whole Parquet shards.

  python -m pipeline.run                                          the bundled customer messages, labelled by SmolLM2
  python -m pipeline.run model=mistral-awq data=prompts.parquet
  python -m pipeline.run data='raw/2026-11/*.parquet' task=classify input.columns.message=body output.dir=labels/nov
  python -m pipeline.run data=hf://org/reviews input.split=train input.limit=5000 task.prompt='Translate: {{ text }}'
  python -m pipeline.run data=prompts.parquet dry_run=true        plan, token lengths, schema check; no model is loaded
  python -m pipeline.status OUT                                   how far a run is; also pipeline.errors, .verify, .merge
  python -m pipeline.doctor                                       can this machine run a job

The same command resumes a run that was stopped, or says that all is done.

Groups (NAME=CHOICE)
%s
  model also takes a folder, a .gguf file or a hub id: model=./my-checkpoint; task also a file: task=./tickets.yaml

Keys (KEY=VALUE; python -m pipeline.run --cfg prints all of them with their values)
  data              path, glob, [list, of, them], folder, s3:// gs:// hf://org/name, save_to_disk folder; Parquet, JSONL, CSV
  input.columns.X   the column that stands for X: a name of the template, or messages, prompt, sampling, adapter, tools,
                    tool_choice, schema, guided_json, guided_regex, guided_choice
  input.limit       only the first rows               input.split   of a Hugging Face data set
  input.delimiter   of CSV: one character, or tab; left out, a tab for .tsv and a comma else; also input.quote
  task.prompt       a Jinja template over the columns task.system   the same, for the system message
  task.schema       a JSON Schema or its path: every output is valid JSON under it; also task.guided_regex, .guided_choice
  task.tools        a JSON file of tools              task.tool_choice  none, auto, required, or the name of a tool
  sampling.max_tokens  .temperature  .top_p  .top_k  .n  .stop      engine.max_rows  .max_model_len  .gpu_memory  .device
  output.dir        a folder or URL; default out/<task>-<model>-<data>
  output.flatten    true: one typed column for each property of the schema
  output.spool      where output.dir is a URL: local folder that keeps finished rows of unfinished shards, from run to run
  limits.max_seconds  .max_tokens  .max_gpu_hours                   stop cleanly and exit 75; the same command goes on
  limits.on_budget  finish: complete the run at those three, what is not done becomes rows with the status aborted
  limits.row_seconds                                                a row that runs longer is cut: status timeout
  limits.max_error_rate                                             exit 4 above it
  cluster.worker  .workers  .lease  this process does every n-th shard, and with lease what others leave undone
  retry_errors      [engine_error, timeout]: compute the failed rows of a finished output again; each worker those of its share

Exit codes
  0 complete   75 drained, run again to resume   2 configuration or other run's folder   3 shards of other workers missing
  4 complete, with more errors than limits.max_error_rate   1 storage or machine failed   130/143 second signal
"""


def main(argv: Sequence[str] | None = None, engine_factory: EngineFactory | None = None) -> int:
    """Run the command line `argv`; returns the exit code. `engine_factory` replaces the real model and engine in tests."""
    # Before torch is imported. Steps differ in size: without it, what the allocator keeps of one does not fit the next.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help", "help") for word in argv):
        print(HELP % "\n".join(listed(group) for group in GROUPS), end="")
        return Exit.COMPLETE
    try:
        config = read_config([word for word in argv if word != "--cfg"])
        if "--cfg" in argv:
            print(yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True), end="")
            return Exit.COMPLETE
        from pipeline.job import run_job  # after the check, so that a mistyped key is answered at once

        return run_job(config, engine_factory) if engine_factory else run_job(config)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


def listed(group: str) -> str:
    """A group and its choices, for the help."""
    text = "  ".join(choices(group))
    return textwrap.fill(text, 128, initial_indent=f"  {group:<9} ", subsequent_indent=" " * 12, break_on_hyphens=False)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def read_config(argv: Sequence[str]) -> RunConfig:
    """Compose conf/ with the overrides of `argv` and check it. Raises ConfigError with one line."""
    words = normalise(argv)
    given = given_keys(words)
    if not given & {"data", "task"}:
        words.append("task=classify")  # the bundled example is a labelling job
    raw = compose_tree("config", words, RunConfig)
    if isinstance(raw.get("output"), dict) and raw["output"].get("dir") is None:
        chosen = {group: _choice(words, group) for group in ("task", "model")}
        if "model.source" in given:
            chosen["model"] = raw["model"]["source"]
        data = raw["data"][0] if isinstance(raw.get("data"), list) and raw["data"] else raw.get("data")
        raw["output"]["dir"] = "out/" + "-".join(_label(str(part)) for part in (chosen["task"], chosen["model"], data))
    config = check(raw)
    for key in ("schema", "guided_json"):
        if _words_as_booleans(raw.get("task", {}).get(key)):
            print(f"note: task.{key}: an enum holds true or false; YAML reads yes, no, on and off as these: quote words",
                  file=sys.stderr)
    if any("\\n" in text for text in config.effective_sampling.stop or ()):
        print("note: sampling.stop: holds a backslash and an n, which is no line end; for one write $'sampling.stop=[\"\\n\"]'",
              file=sys.stderr)
    return config


def _words_as_booleans(schema: Any) -> bool:
    """A schema written in YAML has an enum of truth values, alone or beside strings, that is not said to be of booleans."""
    if isinstance(schema, list):
        return any(map(_words_as_booleans, schema))
    if not isinstance(schema, dict):
        return False
    options = schema.get("enum")
    if isinstance(options, list) and schema.get("type") != "boolean" and {bool} <= {*map(type, options)} <= {bool, str}:
        return True
    return any(map(_words_as_booleans, schema.values()))


def compose_tree(name: str, words: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """conf/NAME.yaml under the overrides `words`, as plain values for `model` to check. Raises ConfigError with one line."""
    files = [word.partition("=")[2] for word in words if _TASK_FILE.match(word)]
    words = [_added(word, set(known_keys(model))) for word in words]
    OmegaConf.register_new_resolver("package", lambda path: str(HOME / path), replace=True)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="gristmill"):
            tree = _with_task_file(name, files[-1], words) if files else compose(name, list(words))
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _explain(error, words, model) from None


def _added(word: str, known: set[str]) -> str:
    """A key that the configuration knows may be set also where a file of the user's own in conf/ does not list it."""
    key = word.lstrip("+").partition("=")[0]
    return f"++{word.lstrip('+')}" if "." in key and key in known else word


def given_keys(words: Sequence[str]) -> set[str]:
    return {word.lstrip("+~").partition("=")[0] for word in words}


def _with_task_file(name: str, path: str, words: Sequence[str]) -> DictConfig:
    """A task from a file of the user's own: over the keys of `generate`, and under the words that set keys of the task."""
    late = [word for word in words if word.lstrip("+").startswith("task.")]
    tree = compose(name, [word for word in words if word not in late and not _TASK_FILE.match(word)])
    OmegaConf.set_struct(tree, False)
    try:
        task = OmegaConf.load(Path(path).expanduser())
    except OSError as error:
        raise ConfigError(f"task={path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"task={path}: not YAML ({' '.join(str(error).split())})") from None
    except GrammarParseError as error:
        raise _reference(f"task.{error.full_key}", error) from None
    if not isinstance(task, DictConfig):
        raise ConfigError(f"task={path}: the task file holds no keys; write prompt: and schema:, as in conf/task/classify.yaml")
    schema = task.get("schema")
    if isinstance(schema, str) and (beside := Path(path).expanduser().parent / schema).exists():
        task.schema = str(beside)
    tree.task = OmegaConf.merge(tree.task, {"name": Path(path).stem}, task)
    for override in OverridesParser.create().parse_overrides(late):
        OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
    return tree


def normalise(argv: Sequence[str]) -> list[str]:
    """Let a shell user write values as they are: `data=a/*.parquet`, `model=./folder`, `task.prompt={{ text }}`."""
    return [_normalise(word) for word in argv]


def _normalise(word: str) -> str:
    key, equals, value = word.partition("=")
    if word.startswith("-"):
        raise ConfigError(f"{word}: no such option; there are --help and --cfg, all else is KEY=VALUE")
    if not equals:
        if key.startswith("~"):
            return word
        raise ConfigError(f"{word}: expected KEY=VALUE")
    if key == "model" and value not in choices("model") and re.search(r"[/:]|\.gguf$", value):
        key, value = "model.source", value
    bare = key.lstrip("+")
    as_list = bare in LIST_KEYS and value.startswith("[") and not _JSON_OBJECTS.match(value)
    as_is = as_list or _QUOTED.fullmatch(value) or value in ("", "null")
    if (bare in TEXT_KEYS or bare.startswith("input.columns.")) and not as_is:
        value = "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", value).replace("'", r"\'") + "'"
    if bare.startswith(OPEN_KEYS):
        key = "++" + bare
    return f"{key}={value}"


def _choice(words: Sequence[str], group: str) -> str:
    picked = [word.partition("=")[2] for word in words if word.partition("=")[0] == group]
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    return picked[-1] if picked else next(str(item[group]) for item in defaults if group in item)


def _label(value: str) -> str:
    """A short name for a path, URL or hub id, fit for a folder's name."""
    last = value.rstrip("/").rpartition("/")[2] or value
    return re.sub(r"[^\w.-]+", "_", re.sub(r"\.(parquet|jsonl|csv|tsv|gguf|yaml)$", "", last)).strip("._") or "data"


def _explain(error: Exception, words: Sequence[str], model: type[BaseModel]) -> ConfigError:
    text = str(error)
    if missing := re.search(r"Could not find '(\w+)/(.+?)'", text):
        group, name = missing.groups()
        if group in GROUPS:
            known = choices(group)
            other = "; for any other give a folder, a .gguf file or a hub id" if group == "model" else ""
            return ConfigError(f"{group}={name}: no such {group}{did_you_mean(name, known)}; there are {', '.join(known)}{other}")
    if unknown := re.search(r"Could not override '(.+?)'", text):
        return unknown_key(unknown.group(1), model)
    if isinstance(error, OverrideParseException):
        word = str(error.override).lstrip("+")
        return ConfigError(f"{word}: cannot be read ({text.splitlines()[0]}); quote the value: KEY=\"'VALUE'\"")
    if ambiguous := re.search(r"Ambiguous value for argument '(.+?)'", text):
        key, _, value = ambiguous.group(1).lstrip("+").partition("=")
        return ConfigError(
            f"{key}={value}: a comma makes a list of runs; write '{key}=[{value}]' for a list or {key}=\"'{value}'\" for text"
        )
    if (key := getattr(error, "full_key", None)) and "Missing mandatory value" in text:
        return ConfigError(f"{key}: not set; give {key}=VALUE")
    for reason in (error, error.__cause__):
        if isinstance(reason, (GrammarParseError, InterpolationResolutionError)):
            return _reference(reason.full_key or "configuration", reason)
    return ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {text.splitlines()[0]}")


def _reference(key: str, error: Exception) -> ConfigError:
    if variable := re.search(r"Environment variable '(\w+)' not found", str(error)):
        slurm = "; cluster=slurm is for tasks of `sbatch --array=0-N`" if variable[1].startswith("SLURM_") else ""
        return ConfigError(f"{key}: {variable[1]} is not set in the environment{slurm}")
    return ConfigError(f"{key}: Hydra takes ${{...}} for the name of another key ({str(error).splitlines()[0]}); "
                       "where ${ is meant as text, write \\${")


if __name__ == "__main__":
    sys.exit(main())
