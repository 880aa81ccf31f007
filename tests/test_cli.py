"""The command line: which source wins, what is refused and in which words, and configurations saved and read back."""

import ast
import inspect
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from experiments.cli import parse, run
from mom_jax.config import (
    PRESETS,
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    mom_340m,
    require,
    tiny,
)
from mom_jax.config_io import from_dict, save_config, to_dict


@dataclass(frozen=True)
class Experiment:
    """Nothing that would run."""

    output: str = "runs/test"
    """Directory of the results."""
    model: ModelConfig = field(default_factory=tiny)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        require(self.output != "/", "output", self.output, "it must be a directory of its own")


@dataclass(frozen=True)
class Evaluation:
    checkpoint: str
    """Directory of the run to evaluate."""
    limits: tuple[float, ...] = ()
    """Perplexities to beat."""


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file and gives its path."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def error_of(capsys, argv, cls=Experiment):
    """The one line on stderr with which ``argv`` is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(cls, argv=argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.rstrip()


def test_no_arguments_give_the_class_defaults():
    assert parse(Experiment, argv=[]) == Experiment()


def test_each_source_overrides_those_before_it(write):
    path = write("run.json", json.dumps({"output": "file", "model": {"hidden_size": 384, "num_heads": 5}}))
    flags = ["--model.num-heads", "6", "--train.steps", "700", "--model.no-shared-memory"]
    experiment = parse(Experiment, argv=["--preset", "mom_340m", "--config", path, *flags])
    assert experiment == Experiment(
        output="file",
        model=mom_340m(hidden_size=384, num_heads=6, shared_memory=False),
        train=TrainConfig(steps=700),
    )


def test_json_and_toml_say_the_same(write):
    toml = 'preset = "tiny"\n[model]\nexpand_v = 2\n[model.attention]\nlayers = [1, 3]\nnum_heads = 8\n'
    values = {"preset": "tiny", "model": {"expand_v": 2, "attention": {"layers": [1, 3], "num_heads": 8}}}
    experiment = parse(Experiment, argv=["--config", write("a.toml", toml)])
    assert experiment == parse(Experiment, argv=["--config", write("a.json", json.dumps(values))])
    assert experiment.model.attention.layers == (1, 3)
    assert isinstance(experiment.model.expand_v, float)


def test_a_file_keeps_the_class_defaults_that_it_does_not_name(write):
    path = write("a.json", '{"model": {"num_layers": 2}}')
    assert parse(Experiment, argv=["--config", path]).model == tiny(num_layers=2)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_function(preset):
    assert parse(Experiment, argv=["--preset", preset]).model == PRESETS[preset]()


def test_only_the_final_values_are_validated(write, capsys):
    path = write("a.json", '{"preset": "mom_340m", "model": {"num_memories": 1}}')
    assert parse(Experiment, argv=["--config", path, "--model.top-k", "1"]).model == mom_340m(num_memories=1, top_k=1)
    assert "--model.top-k = 2 is not allowed: it must be at most num_memories = 1" in error_of(
        capsys, ["--config", path]
    )


def test_validation_errors_are_one_line_that_names_the_flag(capsys):
    for argv, message in [
        (["--model.attention.layers", "9"], "--model.attention.layers = (9,) is not allowed: they must be different "),
        (["--train.steps", "0"], "--train.steps = 0 is not allowed: it must be a positive integer"),
        (["--output", "/"], "--output = '/' is not allowed: it must be a directory of its own"),
    ]:
        assert f"error: {message}" in error_of(capsys, argv)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '{"model": {"topk": 1}}', "model.topk = 1 {}: there is no such field; choose among vocab_size, "),
        ("a.json", '{"steps": 1}', "steps = 1 {}: there is no such field; choose among output, model, data, "),
        ("a.json", '{"model": 3}', "model = 3 {}: it must be a table with keys among vocab_size, hidden_size, "),
        ("a.json", "[1]", "Experiment = [1] {}: it must be a table with keys among output, model, "),
        ("a.toml", 'model.top_k = "2"', "model.top_k = '2' {}: it must be an integer"),
        ("a.toml", "model.top_k = 2.0", "model.top_k = 2.0 {}: it must be an integer"),
        ("a.toml", "model.top_k = true", "model.top_k = True {}: it must be an integer"),
        ("a.json", '{"model": {"top_k": null}}', "model.top_k = None {}: it must be an integer"),
        ("a.toml", "train.clip_norm = false", "train.clip_norm = False {}: it must be a number"),
        ("a.toml", "data.packing = 1", "data.packing = 1 {}: it must be true or false"),
        ("a.toml", "data.path = 1", "data.path = 1 {}: it must be a string"),
        ("a.toml", "train.stop_after = 'x'", "train.stop_after = 'x' {}: it must be an integer or null"),
        ("a.toml", "model.remat = 'all'", "model.remat = 'all' {}: it must be 'none' or 'dots' or 'full'"),
        ("a.toml", "model.attention.layers = 1", "model.attention.layers = 1 {}: it must be a list whose items are "),
        ("a.json", '{"model": {"attention": {"layers": ["b"]}}}', "model.attention.layers = ['b'] {}: it must be a "),
        ("a.toml", "preset = 'huge'", "preset = 'huge' {}: choose one of tiny, mom_340m, "),
        ("a.json", "{", "Expecting property name"),
        ("a.toml", "=", "Invalid"),
    ],
)
def test_errors_in_a_file_name_file_field_value_and_what_is_allowed(write, capsys, name, text, message):
    path = write(name, text)
    assert f"error: {path}: {message.format('is not allowed')}" in error_of(capsys, ["--config", path])


def test_files_that_cannot_be_read_are_refused(write, tmp_path, capsys):
    missing = str(tmp_path / "missing.json")
    message = f"--config = '{missing}' is not allowed: it must be a file of settings (No such file or directory)"
    assert message in error_of(capsys, ["--config", missing])
    assert "--config = 'a.yaml' is not allowed: its name must end in .json or .toml" in error_of(
        capsys, ["--config", "a.yaml"]
    )
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'output = "\xe9"')
    assert f"{latin}: 'utf-8' codec can't decode" in error_of(capsys, ["--config", str(latin)])


def test_an_unknown_preset_is_refused_with_the_others_in_order(capsys):
    allowed = "choose one of tiny, mom_340m, mom_1_3b, gated_deltanet_340m, transformer_340m"
    assert error_of(capsys, ["--preset", "huge"]).endswith(f"error: --preset = 'huge' is not allowed: {allowed}")


@pytest.mark.parametrize("name", ["TrainConfig.steps", "train.steps"])
def test_errors_of_the_program_name_the_flag(name, capsys, monkeypatch):
    def main(experiment):
        require(False, name, 1, "it must be 2")

    monkeypatch.setattr("sys.argv", ["program.py"])
    with pytest.raises(SystemExit, match="1"):
        run(Experiment, main)
    assert capsys.readouterr().err == "program.py: error: --train.steps = 1 is not allowed: it must be 2\n"


PRINTS_TWICE = """
import sys
from experiments.cli import run
from mom_jax.config import MeshConfig

def main(_):
    print("first", flush=True)
    sys.stdin.read()
    print("second")

run(MeshConfig, main)
"""


def test_a_program_whose_reader_has_gone_ends_silently():
    command, pipe = [sys.executable, "-c", PRINTS_TWICE], subprocess.PIPE
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(), process.stderr.read()) == (128 + signal.SIGPIPE, "")


def test_two_presets_are_refused(write, capsys):
    path = write("a.toml", "preset = 'tiny'")
    assert f"{path} names preset = 'tiny' beside --preset mom_340m: give only one" in error_of(
        capsys, ["--config", path, "--preset", "mom_340m"]
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model.topk", "1"], "Unrecognized options: --model.topk"),
        (["--train.steps", "many"], "Error parsing --train.steps"),
        (["--model.remat", "all"], "invalid choice 'all' for argument '--model.remat'"),
    ],
)
def test_wrong_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Experiment, argv=argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@dataclass(frozen=True)
class OfDirectory:
    model: str = ""
    """Directory of a model, which no preset describes."""


def test_an_experiment_without_a_model_takes_no_preset(write, capsys):
    assert parse(OfDirectory, argv=["--model", "a"]) == OfDirectory("a")
    assert parse(Evaluation, argv=["--checkpoint", "a", "--limits", "1", "2.5"]) == Evaluation("a", (1.0, 2.5))
    assert parse(Evaluation, argv=["--config", write("a.json", '{"checkpoint": "a"}')]) == Evaluation("a")
    path = write("b.toml", "preset = 'tiny'")
    assert "preset = 'tiny' is not allowed: there is no such field" in error_of(capsys, ["--config", path], Evaluation)
    preset = ["--preset", "tiny"]
    for cls, argv in ((OfDirectory, preset), (Evaluation, []), (Evaluation, ["--checkpoint", "a", *preset])):
        with pytest.raises(SystemExit, match="2"):
            parse(cls, argv=argv)
    assert re.search("Missing.*--checkpoint.*Unrecognized options: --preset", capsys.readouterr().err, re.DOTALL)


def field_docstrings(cls):
    """{field: the string below it in the source}."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        statement.target.id: inspect.cleandoc(below.value.value)
        for statement, below in zip(body, body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def test_help_explains_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # nothing wraps
    with pytest.raises(SystemExit) as stop:
        parse(Experiment, "What this shows.", ["--preset", "mom_340m", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "What this shows." in text
    assert "--config FILE" in text
    assert "--preset {tiny,mom_340m,mom_1_3b,gated_deltanet_340m,transformer_340m}" in text
    assert "--model.shared-memory, --model.no-shared-memory" in text
    for prefix, cls in [
        ("model.", ModelConfig), ("model.attention.", AttentionConfig), ("data.", DataConfig),
        ("train.", TrainConfig), ("mesh.", MeshConfig),
    ]:  # fmt: skip
        explanations = field_docstrings(cls)
        assert list(explanations) == [item.name for item in fields(cls)]
        for name, explanation in explanations.items():
            assert f"--{prefix}{name.replace('_', '-')}" in text
            assert explanation in text
    # The defaults are those that the preset leaves.
    assert re.search(r"D, the width of the residual stream\. \(default: 1024\)", text)


CONFIGS = [
    Experiment(),
    Experiment(output="é", model=mom_340m(attention=AttentionConfig(layers=(3, 7), num_kv_heads=4))),
    Experiment(train=TrainConfig(steps=7, warmup_steps=2, stop_after=3, learning_rate=0.1 + 0.2, clip_norm=1e300)),
    Evaluation("run", (1.0, 1 / 3)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "hybrid", "training", "required"])
def test_configurations_come_back_identical(config, tmp_path):
    through_json = json.loads(json.dumps(to_dict(config)))
    assert from_dict(type(config), through_json) == config
    save_config(tmp_path / "config.json", config)
    assert parse(type(config), argv=["--config", str(tmp_path / "config.json")]) == config


def test_from_dict_is_strict():
    values = to_dict(Experiment())
    del values["model"]["attention"]["num_heads"], values["model"]["attention"]["layers"]
    with pytest.raises(ValueError, match="^model.attention.layers, model.attention.num_heads: missing"):
        from_dict(Experiment, values)
    with pytest.raises(ValueError, match="^model.width = 3 is not allowed: there is no such field; choose among"):
        from_dict(Experiment, to_dict(Experiment()) | {"model": {"width": 3}})
    with pytest.raises(ValueError, match="^TrainConfig.steps = 0 is not allowed"):
        from_dict(TrainConfig, to_dict(TrainConfig()) | {"steps": 0})
