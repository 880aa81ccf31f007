"""A workshop for the tests that run the experiments as commands: prepared text, configurations, losses to compare."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from mom_jax.reports import read_metrics
from mom_jax.token_files import ByteTokenizer, TokenFileWriter

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STEPS = 18
WINDOWS = {
    "model": {
        "vocab_size": 257, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 32,
        "dtype": "float32",
    },
    "data": {"sequence_length": 70, "batch_size": 2},
    "train": {
        "steps": STEPS, "warmup_steps": 2, "learning_rate": 0.003, "log_every": 1, "eval_every": 6, "eval_batches": 2,
        "checkpoint_every": 3,
    },
    "sample_tokens": 0, "tensorboard": False,
}  # fmt: skip
PACKED = {
    "model": {"dtype": "bfloat16", "embedding_dropout": 0.1, "router_bias_rate": 0.01},
    "data": {"sequence_length": 48, "batch_size": 4, "packing": True},
    "train": {"schedule": "wsd", "accumulation": 2},
}


def merge(values: dict, changes: dict) -> dict:
    return values | {key: merge(values[key], x) if isinstance(x, dict) else x for key, x in changes.items()}


class Team:
    """Several processes of one command; what each says is in a file of its own."""

    def __init__(self, command: list[str], count: int, environment: dict[str, str], logs: Path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes, self.logs = [], [logs / f"process_{index}.log" for index in range(count)]
        for index, log in enumerate(self.logs):
            flags = [
                "--distributed.coordinator", f"localhost:{port}", "--distributed.num-processes", str(count),
                "--distributed.process-id", str(index),
            ]  # fmt: skip
            with log.open("w") as file:
                process = subprocess.Popen([*command, *flags], env=environment, stdout=file, stderr=subprocess.STDOUT)
            self.processes.append(process)

    def log(self, index: int) -> str:
        return self.logs[index].read_text(errors="replace")

    def wait_until(self, condition) -> None:
        while not condition():
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.log(index)
            time.sleep(0.01)

    def wait(self) -> list[int]:
        """The exit statuses."""
        return [process.wait() for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


class Workshop:
    """A directory with prepared text, configuration files and a compilation cache, and the commands that use them."""

    def __init__(self, directory: Path):
        self.directory, self.data = directory, directory / "data"
        self.data.mkdir()
        generator = random.Random(0)
        for split, documents in (("train", 60), ("valid", 8)):
            writer = TokenFileWriter(self.data / f"{split}.tokens", ByteTokenizer())
            for _ in range(documents):
                text = "".join(generator.choices("abcde ", k=generator.randrange(5, 120)))
                writer.add(ByteTokenizer().encode(text), len(text))
            writer.finish([])
        for name, values in (("windows", WINDOWS), ("packed", merge(WINDOWS, PACKED))):
            values = merge(values, {"data": {"path": str(self.data)}})
            (directory / f"{name}.json").write_text(json.dumps(values))
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compilation_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            "JAX_NUM_CPU_DEVICES": "1",
        }
        self.uninterrupted = cache(self.run_undisturbed)

    def train(self, name: str, output: Path, *flags: str) -> list[str]:
        """The command that trains by the file ``name``.json."""
        config = str(self.directory / f"{name}.json")
        return self.command("train_lm.py", "--config", config, "--output", str(output), *flags)

    def command(self, script: str, *flags: str) -> list[str]:
        return [sys.executable, str(EXPERIMENTS / script), *flags]

    def run(self, command: list[str], status: int = 0, **environment: str) -> subprocess.CompletedProcess:
        result = subprocess.run(command, env=self.environment | environment, capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        return result

    def start(self, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)

    def start_team(self, count: int, name: str, output: Path, *flags: str, **environment: str) -> Team:
        """``count`` processes that train by the file ``name``.json."""
        logs = output.with_name(f"{output.name}_logs")
        return self.team(count, self.train(name, output, *flags), logs, **environment)

    def team(self, count: int, command: list[str], logs: Path, **environment: str) -> Team:
        logs.mkdir(parents=True, exist_ok=True)
        return Team(command, count, self.environment | environment, logs)

    def run_undisturbed(self, name: str) -> Path:
        output = self.directory / f"{name}_undisturbed"
        self.run(self.train(name, output))
        return output


def losses(directory: Path) -> dict[tuple[int, str], float]:
    return {(record["step"], record["split"]): record["loss"] for record in read_metrics(directory)}


def last_step(directory: Path) -> int:
    return max((step for step, _ in losses(directory)), default=0)


def wait_until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def assert_same_losses(directory: Path, expected: Path) -> None:
    found, expected = losses(directory), losses(expected)
    assert sorted(found) == sorted(expected)
    assert {key: (found[key], expected[key]) for key in expected if found[key] != expected[key]} == {}


def assert_close_losses(directory: Path, expected: Path, limit: float = 1e-5) -> None:
    """Of the training steps of both, relatively."""
    found, expected = ({key: x for key, x in losses(d).items() if key[1] == "train"} for d in (directory, expected))
    assert sorted(found) == sorted(expected)
    assert {key: (found[key], x) for key, x in expected.items() if abs(found[key] - x) > limit * abs(x)} == {}


def saved_steps(directory: Path) -> list[int]:
    """The checkpoints of a run that are there, whole or not."""
    return sorted(int(path.name) for path in (directory / "checkpoints").glob("*") if re.fullmatch(r"\d+", path.name))
