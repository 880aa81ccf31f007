"""The experiments as commands: two steps of each, what they refuse and what they leave; tests/test_faults.py kills them."""

import json
import re
import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import check_long_context
import evaluate
import export_checkpoint
import numpy as np
import pytest
from workshop import EXPERIMENTS, STEPS, Workshop, losses

import mom_jax
from mom_jax import load_pretrained, load_run
from mom_jax.config import MeshConfig
from mom_jax.reports import read_metrics
from mom_jax.token_files import ByteTokenizer
from mom_jax.weights import weights_of

ROOT = Path(__file__).parents[1]


class Scripts(Workshop):
    def __init__(self, directory: Path):
        super().__init__(directory)
        self.outputs = cache(self.run_script)

    def run_script(self, script: str) -> Path:
        """Runs an experiment with its flags of ``SCRIPTS``."""
        output = self.directory / script
        output.mkdir()
        self.run(self.command(script, *SCRIPTS[script][0](self, output)))
        return output


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Scripts(tmp_path_factory.mktemp("workshop"))


# Refusals


def test_a_checkpoint_of_another_config_is_refused(workshop):
    output = workshop.uninterrupted("windows")
    flags = ["--train.learning-rate", "0.5", "--model.top-k", "1", "--train.log-every", "7"]
    stderr = workshop.run(workshop.train("windows", output, *flags), status=1).stderr
    assert stderr.splitlines()[-4:] == [
        f"train_lm.py: error: the config of {output / 'checkpoints' / str(STEPS)} differs:",
        "  model.top_k: checkpoint 2, command 1",
        "  train.learning_rate: checkpoint 0.003, command 0.5",
        "choose another --output, or delete this run",
    ]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.batch-size", "9999"], "train.tokens: tokens = .* a batch of 9999 rows of 70 tokens takes at least 699931"),
        (["--model.vocab-size", "100"], "error: --model.vocab-size = 100 is not allowed: .*train.tokens needs at least 257"),
    ],
)
def test_a_refused_run_leaves_no_directory(workshop, tmp_path, flags, message):
    stderr = workshop.run(workshop.train("windows", tmp_path / "run", *flags), status=1).stderr
    assert re.search(message, stderr) and "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def prepared_with(workshop, directory: Path, **changes) -> str:
    """A copy of the prepared text whose descriptions say something else."""
    shutil.copytree(workshop.data, directory)
    for split in ("train", "valid"):
        path = directory / f"{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(directory)


def test_text_of_another_tokenizer_is_refused(workshop, tmp_path):
    run = shutil.copytree(workshop.uninterrupted("windows"), tmp_path / "run")
    for changes, message in [
        ({"eos_id": 0}, "eos_id = 0 is not allowed: the run's tokens have 256; prepare the text with --tokenizer bytes"),
        ({"tokenizer_sha256": "other"}, "tokenizer_sha256 = 'other' is not allowed: the run's tokens have None"),
    ]:
        data = prepared_with(workshop, tmp_path / next(iter(changes)), **changes)
        with pytest.raises(ValueError, match=f"valid.json: {message}"):
            evaluate.load(evaluate.Evaluate(model=str(run), data=evaluate.EvaluationData(path=data)))
    stderr = workshop.run(workshop.train("windows", run, "--data.path", data), status=1).stderr
    assert "train.json: tokenizer_sha256 = 'other' is not allowed" in stderr


def test_what_is_no_run_is_refused_by_name(workshop, tmp_path):
    stderr = workshop.run(workshop.command("evaluate.py", "--model", str(tmp_path)), status=1).stderr
    assert stderr.startswith(f"evaluate.py: error: {tmp_path} holds no model: it has nothing; a training run has")
    with pytest.raises(FileNotFoundError, match="is no training run: it has no checkpoints/"):
        load_run(tmp_path)
    golden = ROOT / "tests/data/golden/default"
    with pytest.raises(ValueError, match="data.path = None is not allowed: only a run says its data"):
        evaluate.load(evaluate.Evaluate(model=str(golden)))
    with pytest.raises(ValueError, match="best = True is not allowed: .*default is no training run, which alone has checkp"):
        evaluate.load(evaluate.Evaluate(model=str(golden), best=True))
    with pytest.raises(ValueError, match="is the directory of a training run: mom_jax.load reads it"):
        load_pretrained(workshop.uninterrupted("windows"))


# What a run leaves


def test_a_run_knows_the_documents_borders_and_says_how_it_ended(workshop):
    output = workshop.uninterrupted("windows")
    model = json.loads((output / "config.json").read_text())["model"]
    assert (model["bos_token_id"], model["eos_token_id"]) == (None, ByteTokenizer.eos_id)
    last = [record for record in read_metrics(output) if record["split"] == "valid"][-1]
    stdout = workshop.run(workshop.train("windows", output)).stdout  # nothing is left to do but to say so
    assert stdout.splitlines()[-2:] == [
        f"The run is in {output}: metrics.jsonl, loss_curves.png, routing.png, checkpoints",
        f"held out: loss {last['loss']:.4f} nats a token, perplexity {last['perplexity']:.2f}, "
        f"{last['bits_per_byte']:.4f} bits/byte",
    ]


def test_a_run_is_loaded_and_evaluated_on_its_own_data(workshop, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(workshop.uninterrupted("windows"), tmp_path / "run")
    run = load_run(output, implementation="reference")
    assert (run.step, run.tokenizer.kind, run.model.config.implementation) == (STEPS, "bytes", "reference")
    by_loss = {loss: step for (step, split), loss in losses(output).items() if split == "valid"}
    assert load_run(output, best=True).step == by_loss[min(by_loss)]

    figures = evaluate.main(evaluate.Evaluate(model=str(output)))
    assert (figures["step"], figures["by_position"][-1]["last"]) == (STEPS, 69)
    assert f"{output}: checkpoint of step {STEPS}" in capsys.readouterr().out

    (output / "checkpoints" / str(STEPS) / "run/metadata").write_text("{}")
    with pytest.warns(UserWarning, match="skipping the damaged checkpoint"):
        assert load_run(output).step == STEPS - 3


def test_an_export_is_evaluated_as_its_run(workshop, tmp_path, capsys):
    output = workshop.uninterrupted("windows")
    expected = evaluate.main(evaluate.Evaluate(model=str(output)))
    data = evaluate.EvaluationData(path=str(workshop.data), sequence_length=70, batch_size=2)
    for format in ("orbax", "huggingface"):
        exported = str(tmp_path / format)
        export_checkpoint.main(export_checkpoint.Export(input=str(output), output=exported, format=format))
        figures = evaluate.main(evaluate.Evaluate(model=exported, data=data))
        assert figures["by_position"] == expected["by_position"]
    out = capsys.readouterr().out
    assert f"{exported}: " in out and "in rows of 70\n" in out
    other = evaluate.EvaluationData(path=prepared_with(workshop, tmp_path / "other", eos_id=0))
    with pytest.raises(ValueError, match="valid.json: eos_id = 0 is not allowed"):
        evaluate.load(evaluate.Evaluate(model=str(tmp_path / "orbax"), data=other))


def test_a_mesh_gives_the_figures_of_one_device(workshop):
    """Of a text that does not fill the last batch, devices of rows, memories and tokens."""
    run = str(workshop.uninterrupted("windows"))

    def figures(batch_size, **mesh):
        data = evaluate.EvaluationData(batch_size=batch_size)
        return evaluate.main(evaluate.Evaluate(run, data=data, mesh=MeshConfig(**mesh)))

    expected, found = figures(2), figures(12, fsdp=2, memory=2, sequence=2)
    assert found["tokens"] == expected["tokens"]
    assert found["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-6)
    for batch_size, mesh, message in (
        (2, {"data": 2, "fsdp": 2}, "data.batch_size = 2 is not allowed: .* a multiple of mesh.data [*] mesh.fsdp = 4"),
        (2, {"sequence": 4}, "data.sequence_length = 70 is not allowed: it must be a multiple of mesh.sequence = 4"),
        (2, {"memory": 3}, "MeshConfig.memory = 3 is not allowed: it must divide num_memories = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            figures(batch_size, **mesh)


def test_the_examples_of_the_readme_run(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/shakespeare").symlink_to(workshop.uninterrupted("windows"))
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, {})
    assert (tmp_path / "directory/model.safetensors").exists()


def test_tab_completion_shows_the_public_names():
    assert {"load", "generate"} < set(dir(mom_jax)) == set(mom_jax.__all__)


def test_a_run_that_diverges_names_the_step_and_keeps_the_last_good_checkpoint(workshop, tmp_path):
    """Weight decay that multiplies the parameters by -10^4 a step, until float32 no longer holds their norm."""
    flags = ["--train.learning-rate", "1", "--train.weight-decay", "10001", "--train.checkpoint-every", "1"]
    stderr = workshop.run(workshop.train("packed", tmp_path, *flags), status=1).stderr
    message = r"train_lm.py: error: step (\d+): the \w+ is (inf|nan); the checkpoint of step (\d+) is kept"
    broken, _, kept = re.fullmatch(message, stderr.splitlines()[-1]).groups()
    assert int(kept) == int(broken) - 1 > 0
    assert "Traceback" not in stderr
    run = load_run(tmp_path)
    assert run.step == int(kept)
    assert all(np.isfinite(x).all() for x in weights_of(run.model).shapes.values())


# Every experiment

TINY = ["--model.hidden-size", "32", "--model.num-layers", "1", "--model.num-heads", "1", "--model.head-dim", "16"]
# For each script its flags, made of a workshop and the directory for what it writes, and the files it must write there.
SCRIPTS = {
    "prepare_text.py": (
        lambda workshop, output: [
            "--inputs", __file__, str(EXPERIMENTS / "cli.py"), "--include", "*.py", "--held-out", "cli.py",
            "--tokenizer", "bytes", "--output", str(output / "data"),
        ],
        ["data/train.tokens", "data/valid.tokens"],
    ),
    "train_lm.py": (
        lambda workshop, output: [
            "--config", str(workshop.directory / "windows.json"), "--train.stop-after", "2", "--tensorboard",
            "--sample-tokens", "3", "--sample-prompts", "", "ab", "--output", str(output),
        ],
        ["config.json", "checkpoints/2", "metrics.jsonl", "loss_curves.png", "routing.png", "sample.txt", "events.*"],
    ),
    "train_mqar.py": (
        lambda workshop, output: [
            *TINY, "--model.vocab-size", "32", "--train.steps", "20", "--train.warmup-steps", "2", "--sequence-length", "16",
            "--pairs", "2", "4", "--train-rows", "8", "--batch-size", "4", "--test-rows", "4", "--seeds", "2",
            "--output", str(output),
        ],
        ["config.json", "results.json"],
    ),
    "benchmark_training.py": (
        lambda workshop, output: [
            "--presets", "tiny", "--batch-sizes", "1", "--sequence-length", "64", "--steps", "1",
            "--meshes", "one", "data=1,memory=1", "--output", str(output),
        ],
        ["training.json"],
    ),
    "benchmark_kernels.py": (
        lambda workshop, output: [
            "--works", "small", "small_grouped_matmul", "--implementations", "chunked", "--rounds", "1", "--calls", "1",
            "--output", str(output),
        ],
        ["kernels.json", "kernels.md", "kernels.png"],
    ),
    "benchmark_layer.py": (
        lambda workshop, output: [
            "--works", "small", "--implementations", "default", "--rounds", "1", "--calls", "1", "--output", str(output),
        ],
        ["layer.json", "layer.md", "layer.png"],
    ),
    "benchmark_generation.py": (
        lambda workshop, output: [
            "--works", "tiny 2x70", "tiny 2x1", "tiny 1x0", "--tokens", "2", "--rounds", "1", "--calls", "1",
            "--output", str(output),
        ],
        ["generation.json", "generation.md", "generation.png", "generation_lengths.png"],
    ),
    "check_long_context.py": (
        lambda workshop, output: [
            *TINY, "--model.vocab-size", "32", "--tokens", "2240", "--compare", "2112", "--control", "100",
            "--new-tokens", "2", "--output", str(output),
        ],
        ["long_context.json", "long_context.md"],
    ),
    "compare_losses.py": (
        lambda workshop, output: [
            *TINY, "--kernels", "reference", "--seeds", "1", "--data.path", str(workshop.data),
            "--data.sequence-length", "16", "--data.batch-size", "1", "--train.steps", "2", "--train.warmup-steps", "1",
            "--output", str(output),
        ],
        ["losses.json", "losses.png"],
    ),
    "export_checkpoint.py": (
        lambda workshop, output: [
            "--input", str(workshop.uninterrupted("windows")), "--best", "--format", "huggingface",
            "--dtype", "bfloat16", "--output", str(output / "hf"),
        ],
        ["hf/config.json", "hf/model.safetensors", "hf/tokenizer.json", "hf/checksums.json"],
    ),
    "import_checkpoint.py": (
        lambda workshop, output: [
            "--input", str(ROOT / "tests/data/golden/default"), "--dtype", "bfloat16", "--output", str(output / "model"),
        ],
        ["model/config.json", "model/weights", "model/checksums.json"],
    ),
    "evaluate.py": (
        lambda workshop, output: [
            "--model", str(workshop.uninterrupted("windows")), "--output", str(output / "figures.json"),
        ],
        ["figures.json"],
    ),
    "generate.py": (
        lambda workshop, output: [
            "--model", str(workshop.uninterrupted("windows")), "--best", "--max-new-tokens", "3",
            "--batch-file", str(workshop.data / "valid.json"), "--output", str(output / "continued.jsonl"),
        ],
        ["continued.jsonl", "continued.jsonl.config.json"],
    ),
}  # fmt: skip


NEED_LIBTPU = ("compile_for_tpu.py", "compile_kernels_for_tpu.py")  # test_compile_for_tpu.py runs them where it is


def test_every_experiment_is_in_the_table():
    programs = {path.name for path in EXPERIMENTS.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert programs == {*SCRIPTS, *NEED_LIBTPU}


@pytest.mark.parametrize("script", SCRIPTS)
def test_experiments_run_two_steps(workshop, script):
    output = workshop.outputs(script)
    assert [pattern for pattern in SCRIPTS[script][1] if not list(output.glob(pattern))] == []
    if script.startswith(("benchmark_", "check_", "compare_")):  # reports are kept, and are no place for a machine's paths
        assert not [path.name for path in output.glob("*.json") if str(output) in path.read_text()]


def test_the_check_of_long_prompts_says_what_it_cannot_see(workshop):
    text = (workshop.outputs("check_long_context.py") / "long_context.md").read_text()
    is_silent = "memory after the weights: not measured" in text
    assert ("all that was measured is within the limits; memory was not measured" in text) == is_silent


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: check_long_context.CheckLongContext(compare=2048), "compare = 2048 .* it must be more than a piece, 2048"),
        (lambda: check_long_context.CheckLongContext(control=65_536), "compare = 65536 .* more than a piece, 65536"),
        (lambda: export_checkpoint.Export("a", "b", model_type="mom"), "model_type = 'mom' .* needs --format huggingface"),
    ],
    ids=["compare", "control", "model_type"],
)
def test_settings_that_would_do_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_interrupted_comparison_is_finished(workshop, tmp_path):
    """By two processes, with a seed each. An arm that the output already holds is not trained again; results of other
    settings are refused."""
    path = shutil.copytree(workshop.outputs("train_mqar.py"), tmp_path / "mqar") / "results.json"
    command = workshop.command("train_mqar.py", *SCRIPTS["train_mqar.py"][0](workshop, path.parent))
    results = json.loads(path.read_text())
    marked = {name: results[name] | {"parameters": -1} for name in ("mom", "equal parameters")}
    path.write_text(json.dumps(marked))
    with workshop.team(2, [*command, "--mesh.data", "2"], tmp_path / "logs") as team:
        assert team.wait() == [0, 0], team.log(0) + team.log(1)
        assert "| equal state |" in team.log(0) and "|" not in team.log(1)
    assert json.loads(path.read_text()) == results | marked
    stderr = workshop.run([*command, "--seeds", "3"], status=1).stderr
    assert "it holds results of other settings (seeds)" in stderr


@pytest.mark.parametrize("script", [*SCRIPTS, *NEED_LIBTPU])
def test_experiments_explain_themselves(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "1000")  # nothing wraps
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")
    text = capsys.readouterr().out
    assert "--config FILE" in text
    assert f"python experiments/{script}" in text
