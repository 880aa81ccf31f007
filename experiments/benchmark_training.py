"""Times training steps of the presets on random tokens: tokens/s, MFU and peak memory; on one device or meshes of several.

    python experiments/benchmark_training.py --output docs/results/training      one NVIDIA GPU, about 5 minutes
    python experiments/benchmark_training.py --no-unroll --steps 6 --batch-sizes 16 --rows-at-once 16 \
        --meshes one data=2 fsdp=2 memory=2 --output docs/results/meshes      two H200s, half a minute a preset and mesh

Each step is timed from its start to its loss on the host, after two that are not; the median counts. MFU is the share of
--peak-tflops (dense bfloat16; 989 is the H200's datasheet) that useful arithmetic takes, nothing recomputed counted:

    FLOP a token = 6 (matmul parameters that a token meets) + 3 L (R + shared) H (6 K V + 4 C (K + V)),  C = 64

A token meets k and v of R memories and the shared one, all gates, the router and the head, and no embedding.

Efficiency is the tokens/s of each device over those of the first mesh with the same preset, implementation and batch size,
which is rows *a device*. On GPUs one step more is profiled: "exchanging" is the time in which collectives run on the first
device, "exposed" the part of it in which nothing else does.
"""

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

import jax
import numpy as np
from cli import run
from timing import collective_ms, compiled_gib, mixer_flops_per_token, settings_of

from mom_jax.config import PRESETS, MeshConfig, ModelConfig, TrainConfig, require
from mom_jax.sharding import make_mesh, use_mesh
from mom_jax.training import jit_step, make_state, make_train_step, place


@dataclass(frozen=True)
class BenchmarkTraining:
    """What to time."""

    presets: tuple[str, ...] = ("mom_340m", "mom_1_3b")
    """Names of presets."""
    implementations: tuple[str, ...] = ("default",)
    """Implementations of the ops, "default" for the one that training takes."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Rows a step for each device."""
    meshes: tuple[str, ...] = ("one",)
    """Meshes by the sizes of their axes, such as "data=2" or "fsdp=2,memory=2"; "one" is a single device."""
    sequence_length: int = 2048
    """T, tokens in a row."""
    steps: int = 8
    """Timed steps."""
    remat: str = "dots"
    """What the backward pass recomputes in each layer: none, dots or full."""
    unroll: bool = True
    """Whether layers are compiled one by one: faster steps, about a minute of compilation."""
    rows_at_once: int = 8
    """Rows for each device that are worked through at once; larger batches are accumulated."""
    peak_tflops: float = 989.0
    """Dense bfloat16 peak of the device, TFLOP/s."""
    output: str = "runs/benchmark_training"
    """Directory of the figures."""

    def __post_init__(self):
        for name in self.presets:
            require(name in PRESETS, "presets", name, f"choose from {', '.join(PRESETS)}")
        for mesh in self.meshes:
            mesh_config(mesh)
        for name in ("steps", "rows_at_once"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        for size in self.batch_sizes:
            pieces = self.pieces(size)
            require(size % pieces == 0, "batch_sizes", size, f"{pieces} pieces of at most rows_at_once must be equal")

    def pieces(self, batch_size: int) -> int:
        """How many pieces a batch is worked through in."""
        return -(-batch_size // self.rows_at_once)


def mesh_config(name: str) -> MeshConfig:
    """The mesh of a name such as "fsdp=2,memory=2"."""
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = [] if name == "one" else [part.partition("=") for part in name.split(",")]
    fits = all(axis in axes and size.isdecimal() for axis, _, size in sizes)
    require(fits, "meshes", name, f'"one", or sizes such as "data=2,memory=2" of {", ".join(axes)}')
    return MeshConfig(**{axis: int(size) for axis, _, size in sizes})


def flops_per_token(config: ModelConfig) -> float:
    """Useful floating-point operations of a training step for a token; every layer a MoM layer."""
    layer = mixer_flops_per_token(config) + 6 * config.hidden_size * config.mlp_size
    return 3 * (config.num_layers * layer + 2 * config.hidden_size * config.vocab_size)


def measure(config: BenchmarkTraining, model: ModelConfig, batch_size: int, mesh_name: str) -> dict:
    """Times, memory and losses of one setting."""
    train = TrainConfig(steps=config.steps + 2, warmup_steps=0, accumulation=config.pieces(batch_size))
    mesh, rng = make_mesh(mesh_config(mesh_name), model), np.random.default_rng(0)
    sequence = mesh.shape["sequence"]
    allowed = f"it must be a multiple of the sequence={sequence} of a mesh"
    require(config.sequence_length % sequence == 0, "sequence_length", config.sequence_length, allowed)
    shape = (batch_size * mesh.size, config.sequence_length)
    with use_mesh(mesh):
        state = make_state(model, train, mesh)
        batch = {name: rng.integers(0, model.vocab_size, shape).astype(np.int32) for name in ("tokens", "targets")}
        batch = place(batch, mesh)
        step = jit_step(make_train_step(model, train), model, train, mesh).lower(state, batch).compile()
        seconds, losses = [], []
        for _ in range(config.steps + 2):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
        exchanging, exposed = collective_ms(lambda: jax.block_until_ready(step(state, batch)))
    second = statistics.median(seconds[2:])
    tokens_per_second = math.prod(shape) / second
    statistics_of_memory = jax.devices()[0].memory_stats() or {}
    return {
        "ms": 1e3 * second, "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops_per_token(model) / (1e12 * config.peak_tflops * mesh.size),
        "devices": mesh.size, "exchanging_ms": exchanging, "exposed_ms": exposed,
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
    works = product(config.presets, config.implementations, config.batch_sizes, config.meshes)
    for preset, implementation, batch_size, mesh in works:
        chosen = None if implementation == "default" else implementation
        model = PRESETS[preset](implementation=chosen, remat=config.remat, unroll=config.unroll)
        require(not model.attention.layers, "presets", preset, "the FLOP formula is for MoM layers only")
        row = {"preset": preset, "implementation": implementation, "batch_size": batch_size, "mesh": mesh}
        try:
            row |= measure(config, model, batch_size, mesh)
            key = "preset", "implementation", "batch_size"
            first = next((r for r in rows if "ms" in r and all(r[name] == row[name] for name in key)), row)
            of_device = [r["tokens_per_second"] / r["devices"] for r in (row, first)]
            row["efficiency"] = of_device[0] / of_device[1]
        except jax.errors.JaxRuntimeError as error:  # out of memory: the other settings still count
            row |= {"error": str(error).splitlines()[0]}
        rows.append(row)
        print(format_row(row), flush=True)
        # After each, so that a run that is cut off leaves what it has measured.
        (output / "training.json").write_text(json.dumps(figures | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return figures | {"rows": rows}


def format_row(row: dict) -> str:
    start = f"{row['preset']:>20} {row['implementation']:>9} {row['batch_size']:>4} rows {row['mesh']:>10}: "
    if "error" in row:
        return start + row["error"]
    exchange = ""
    if row["exchanging_ms"]:
        exchange = f", exchanging {row['exchanging_ms']:.1f} ms, exposed {row['exposed_ms']:.1f} ms"
    return start + (
        f"{row['ms']:8.1f} ms a step, {row['tokens_per_second']:>9,.0f} tokens/s, MFU {100 * row['mfu']:4.1f} %, "
        f"{row['compiled_gib']:5.1f} GiB (peak so far {row['peak_gib_so_far']:.1f}), loss {row['losses'][-1]:.3f}, "
        f"efficiency {100 * row['efficiency']:.1f} %{exchange}"
    )


if __name__ == "__main__":
    run(BenchmarkTraining, main, __doc__)
