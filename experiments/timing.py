"""What the benchmarks share: times, the device's own rates, a layer's FLOP, the error that is checked first, the report."""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax.config import ModelConfig, require
from mom_jax.generation import begin_decoding, decode
from mom_jax.sampling import GREEDY

LIMIT = 2e-2  # relative L2 error in bfloat16 against the float32 reference


@dataclass(frozen=True)
class Timing:
    """How often to call what is timed: flags of every benchmark that inherits them."""

    rounds: int = 5
    """Rounds of which the median is taken."""
    calls: int = 8
    """Calls queued in a round."""

    def __post_init__(self):
        for name in ("rounds", "calls"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")


def milliseconds(timing: Timing, function: Callable, *arguments, wait: Callable = jax.block_until_ready) -> float:
    """Time of a call; ``wait(result)`` returns when the device is done."""
    wait(function(*arguments))
    times = []
    for _ in range(timing.rounds):
        start = time.perf_counter()
        for _ in range(timing.calls):
            result = function(*arguments)
        wait(result)
        times.append((time.perf_counter() - start) / timing.calls)
    return 1e3 * statistics.median(times)


def device_figures(timing: Timing) -> dict:
    """The device, and what it reaches: FLOP/s of a large bfloat16 matmul and bytes/s of a large copy, measured."""
    side, length = (512, 2**20) if jax.default_backend() == "cpu" else (8192, 2**29)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    matmul = 2 * side**3 / milliseconds(timing, jax.jit(jnp.matmul), x, x)
    big = jax.random.normal(jax.random.key(0), (length,), jnp.bfloat16)
    copy = 2 * big.nbytes / milliseconds(timing, jax.jit(lambda x: -x), big)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": str(date.today())}
    return device | {"matmul_flops_per_s": 1e3 * matmul, "copy_bytes_per_s": 1e3 * copy}


def title(figures: dict) -> str:
    start = f"{figures['device']}, jax {figures['jax']}, {figures['date']}"
    if "matmul_flops_per_s" not in figures:  # compiled only
        return start
    matmul, copy = figures["matmul_flops_per_s"] / 1e12, figures["copy_bytes_per_s"] / 1e12
    return f"{start}: matmul {matmul:.3g} TFLOP/s, copy {copy:.3g} TB/s"


def settings_of(config) -> dict:
    """The fields of a script's settings for its report, without the place where that lies."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}


def relative_error(actual, expected) -> float:
    """The largest relative L2 error of the leaves, NaN if there is one."""
    errors = []
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        errors.append(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-6))
    return float(np.max(errors))


def mixer_flops_per_token(config: ModelConfig) -> float:
    """Useful floating-point operations of the forward pass of one MoM mixer for a token; with gradients three times."""
    d, h, k, v = config.hidden_size, config.num_heads, config.head_dim, config.value_head_dim
    used, all_memories = config.top_k + config.shared_memory, config.num_memories + config.shared_memory
    key_value = d * h * (k + v) * (1 if config.single_kv_proj else used)
    gates = 2 * d * h * (1 if config.single_kv_proj else all_memories)
    matmuls = d * h * k + key_value + gates + d * config.num_memories + d * h * v * (1 + config.use_output_gate)
    return 2 * matmuls + used * h * (6 * k * v + 4 * 64 * (k + v))


def table_row(row: dict, formats: dict[str, str]) -> str:
    """The values of these keys as cells, "-" for None."""
    cells = ["-" if row[key] is None else format(row[key], spec) for key, spec in formats.items()]
    return f"| {' | '.join(cells)} |"


def compiled_gib(program) -> float:
    """What a compiled program needs at once: arguments, results that are not in their place, temporaries."""
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / 2**30


def collective_ms(function: Callable[[], Any]) -> tuple[float, float] | tuple[None, None]:
    """Of a call, from a profile of the first GPU: milliseconds in which collectives run, and in which nothing else does.

    ``function`` is to return when the devices are done. None where the profile shows no GPU.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            function()
        profile = jax.profiler.ProfileData.from_file(str(next(Path(directory).rglob("*.xplane.pb"))))
    plane = next((plane for plane in profile.planes if plane.name.startswith("/device:GPU:")), None)
    if plane is None:
        return None, None
    edges = []  # time, whether of a collective, and 1 where it begins or -1 where it ends
    for line in plane.lines:
        for event in line.events if "Stream" in line.name else ():
            is_collective = "nccl" in event.name.lower()
            edges += [(event.start_ns, is_collective, 1), (event.start_ns + event.duration_ns, is_collective, -1)]
    running, exchanging, exposed, before = {True: 0, False: 0}, 0.0, 0.0, 0.0
    for now, is_collective, change in sorted(edges):
        exchanging += (now - before) * (running[True] > 0)
        exposed += (now - before) * (running[True] > 0 and running[False] == 0)
        running[is_collective] += change
        before = now
    return exchanging / 1e6, exposed / 1e6


def time_decoding(config: ModelConfig, params, state, hidden, tokens: int) -> tuple[float, float]:
    """Milliseconds a token of the compiled greedy loop, after as many that do not count, and the GiB that it needs."""
    rows = len(hidden)
    decoding = begin_decoding(state, hidden, [np.zeros(1, np.int32)] * rows, 2 * tokens, None)
    arguments = GREEDY.options(), np.zeros(rows, np.uint32), np.zeros(config.vocab_size, bool)
    loop = decode.lower(config, params, decoding, *arguments, np.int32(0)).compile()
    for limit in (tokens, 2 * tokens):
        start = time.perf_counter()
        decoding = loop(params, decoding, *arguments, np.int32(limit))
        jax.block_until_ready(decoding.tokens)
        ms = 1e3 * (time.perf_counter() - start) / tokens
    return ms, compiled_gib(loop)


def write_report(
    directory: str, name: str, figures: dict, columns: tuple[str, ...], lines: list[str], notes: list[str] | None = None
) -> None:
    """The figures as ``name``.json; ``name``.md: title, notes and a table of these lines; ``name``.png: the rows' times."""
    output = Path(directory)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = [title(figures), "", *(notes or ()), f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]
    (output / f"{name}.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    if "rows" in figures:
        plot_times(figures["rows"], title(figures), output / f"{name}.png")


def plot_times(rows: list[dict], heading: str, path: Path) -> None:
    """A bar for every row's ``ms``, dark up to its ``forward_ms`` if it has that."""
    from matplotlib.figure import Figure

    rows = [row for row in rows[::-1] if row["ms"]]
    labels = [" ".join(row[key] for key in ("work", "what", "implementation") if key in row) for row in rows]
    figure = Figure((8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, [row["ms"] for row in rows], color="tab:blue", alpha=0.5)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.barh(labels, [row.get("forward_ms") or 0 for row in rows], color="tab:blue")
    axes.set(xlabel="ms", title=heading)
    axes.title.set_fontsize(8)
    figure.savefig(path, dpi=120)
