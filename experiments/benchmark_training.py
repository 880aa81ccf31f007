"""Times training steps of the presets on random tokens: tokens/s, MFU and peak memory.

    python experiments/benchmark_training.py --output docs/results/training      one NVIDIA GPU, about 5 minutes

Each step is timed from its start to its loss on the host, after two that are not; the median counts. MFU is the share of
--peak-tflops (dense bfloat16; 989 is the H200's datasheet) that useful arithmetic takes, nothing recomputed counted:

    FLOP a token = 6 (matmul parameters that a token meets) + 3 L (R + shared) H (6 K V + 4 C (K + V)),  C = 64

A token meets k and v of R memories and the shared one, all gates, the router and the head, and no embedding.
"""

import json
import statistics
import time
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

import jax
import numpy as np
from cli import run
from timing import compiled_gib, mixer_flops_per_token, settings_of

from mom_jax.config import PRESETS, MeshConfig, ModelConfig, TrainConfig, require
from mom_jax.sharding import make_mesh, use_mesh
from mom_jax.training import make_state, make_train_step, place


@dataclass(frozen=True)
class BenchmarkTraining:
    """What to time."""

    presets: tuple[str, ...] = ("mom_340m", "mom_1_3b")
    """Names of presets."""
    implementations: tuple[str, ...] = ("default",)
    """Implementations of the ops, "default" for the one that training takes."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Rows a step."""
    sequence_length: int = 2048
    """T, tokens in a row."""
    steps: int = 8
    """Timed steps."""
    remat: str = "dots"
    """What the backward pass recomputes in each layer: none, dots or full."""
    unroll: bool = True
    """Whether layers are compiled one by one: faster steps, about a minute of compilation."""
    rows_at_once: int = 8
    """Rows whose activations are held at once; larger batches are accumulated."""
    peak_tflops: float = 989.0
    """Dense bfloat16 peak of the device, TFLOP/s."""
    output: str = "runs/benchmark_training"
    """Directory of the figures."""

    def __post_init__(self):
        for name in self.presets:
            require(name in PRESETS, "presets", name, f"choose from {', '.join(PRESETS)}")
        for name in ("steps", "rows_at_once"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        for size in self.batch_sizes:
            pieces = self.pieces(size)
            require(size % pieces == 0, "batch_sizes", size, f"{pieces} pieces of at most rows_at_once must be equal")

    def pieces(self, batch_size: int) -> int:
        """How many pieces a batch is worked through in."""
        return -(-batch_size // self.rows_at_once)


def flops_per_token(config: ModelConfig) -> float:
    """Useful floating-point operations of a training step for a token; every layer a MoM layer."""
    layer = mixer_flops_per_token(config) + 6 * config.hidden_size * config.mlp_size
    return 3 * (config.num_layers * layer + 2 * config.hidden_size * config.vocab_size)


def measure(config: BenchmarkTraining, model: ModelConfig, batch_size: int) -> dict:
    """Times, memory and losses of one setting."""
    train = TrainConfig(steps=config.steps + 2, warmup_steps=0, accumulation=config.pieces(batch_size))
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    shape = (batch_size, config.sequence_length)
    with use_mesh(mesh):
        state = make_state(model, train, mesh)
        batch = {name: rng.integers(0, model.vocab_size, shape).astype(np.int32) for name in ("tokens", "targets")}
        batch = place(batch, mesh)
        step = jax.jit(make_train_step(model, train), donate_argnums=0).lower(state, batch).compile()
        seconds, losses = [], []
        for _ in range(config.steps + 2):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
    second = statistics.median(seconds[2:])
    tokens_per_second = batch_size * config.sequence_length / second
    statistics_of_memory = jax.devices()[0].memory_stats() or {}
    return {
        "ms": 1e3 * second, "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops_per_token(model) / (1e12 * config.peak_tflops),
        "peak_gib_so_far": statistics_of_memory.get("peak_bytes_in_use", 0) / 2**30,
        "compiled_gib": compiled_gib(step), "losses": losses,
    }  # fmt: skip


def main(config: BenchmarkTraining) -> dict:
    device = jax.devices()[0].device_kind
    settings = settings_of(config)
    figures = {"device": device, "jax": jax.__version__, "date": str(date.today()), "settings": settings}
    print(f"{device}, jax {jax.__version__}, {date.today()}, T = {config.sequence_length}")
    print(f"remat {config.remat}, unroll {config.unroll}, {config.rows_at_once} rows at once")
    output, rows = Path(config.output), []
    output.mkdir(parents=True, exist_ok=True)
    for preset, implementation, batch_size in product(config.presets, config.implementations, config.batch_sizes):
        chosen = None if implementation == "default" else implementation
        model = PRESETS[preset](implementation=chosen, remat=config.remat, unroll=config.unroll)
        require(not model.attention.layers, "presets", preset, "the FLOP formula is for MoM layers only")
        row = {"preset": preset, "implementation": implementation, "batch_size": batch_size}
        try:
            row |= measure(config, model, batch_size)
        except jax.errors.JaxRuntimeError as error:  # out of memory: the other settings still count
            row |= {"error": str(error).splitlines()[0]}
        rows.append(row)
        print(format_row(row), flush=True)
        # After each, so that a run that is cut off leaves what it has measured.
        (output / "training.json").write_text(json.dumps(figures | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return figures | {"rows": rows}


def format_row(row: dict) -> str:
    start = f"{row['preset']:>20} {row['implementation']:>9} {row['batch_size']:>4} rows: "
    if "error" in row:
        return start + row["error"]
    return start + (
        f"{row['ms']:8.1f} ms a step, {row['tokens_per_second']:>9,.0f} tokens/s, MFU {100 * row['mfu']:4.1f} %, "
        f"{row['compiled_gib']:5.1f} GiB (peak so far {row['peak_gib_so_far']:.1f}), loss {row['losses'][-1]:.3f}"
    )


if __name__ == "__main__":
    run(BenchmarkTraining, main, __doc__)
