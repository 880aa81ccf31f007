"""Times the sequence ops and the grouped matmul: implementations side by side, each first checked against the reference.

    python experiments/benchmark_kernels.py --output docs/results/kernels        one NVIDIA GPU, about 3 minutes

Prints a table and writes it with all figures as JSON. A time is the median over rounds of queued calls, so the host's launch
is hidden; cotangents are random. The floor is what the device's own measured matmul and copy rates allow: the larger of

    bytes / copy rate    inputs read once and outputs written once, states not counted (with gradients: 2.5 times)
    FLOP / matmul rate   B T H (6 K V + 4 C (K + V)), C = 64, for the ops (with gradients: 3.5 times); 2 N D E a product

A work whose implementation is wrong (relative L2 error over the tests' limits) is not timed and ends the run with status 1.

Where flash-linear-attention or jax-linear-attention is installed, its sequence ops run on the same arrays. Their error is
shown and ends nothing; what they cannot run is left out and the reason printed. flash-linear-attention returns all that ours
do, but its backward may refuse to run (see benchmark_layer.py): then the error is that of the outputs. jax-linear-attention
returns only the last segment's state of a row, and is compared on that. The floor, and the FLOP and bytes of the rates, are
the same for all.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import peers
from cli import run
from timing import LIMIT, Timing, device_figures, milliseconds, relative_error, table_row, title, write_report

from mom_jax.config import require
from pallas_kernels import api
from pallas_kernels.api import Segments


@dataclass(frozen=True)
class Recurrence:
    """A sequence op over rows of T tokens in equal segments; ``last_state_only``: of final states a row's last counts."""

    op: str
    batch: int
    tokens: int
    heads: int
    key: int
    value: int
    segments: int = 4
    decay: str | None = "head"
    last_state_only: bool = False

    @property
    def flops(self) -> float:
        per_token = 6 * self.key * self.value + 4 * 64 * (self.key + self.value)
        return self.batch * self.tokens * self.heads * per_token

    @property
    def bytes(self) -> float:
        return 2 * self.batch * self.tokens * self.heads * (2 * self.key + 2 * self.value) + self.gate_bytes

    @property
    def gate_bytes(self) -> float:
        width = {None: 0, "head": 1, "key": self.key}[self.decay] + (self.op == "gated_delta_rule")
        return 4 * self.batch * self.tokens * self.heads * width


@dataclass(frozen=True)
class Grouped:
    """A grouped matmul of one row of slots in uneven groups; ``product``: forward, dx or dw."""

    product: str
    slots: int = 131_072
    depth: int = 1024
    width: int = 2048

    @property
    def flops(self) -> float:
        return 2 * self.slots * self.depth * self.width

    @property
    def bytes(self) -> float:
        return 2 * (self.slots * (self.depth + self.width) + 4 * self.depth * self.width)


WORKS: dict[str, Recurrence | Grouped] = {
    "gated_delta_rule_256": Recurrence("gated_delta_rule", 16, 4096, 4, 256, 256),
    "gated_delta_rule_128": Recurrence("gated_delta_rule", 16, 4096, 8, 128, 128),
    "gated_delta_rule_one_segment": Recurrence("gated_delta_rule", 16, 4096, 4, 256, 256, segments=1),
    "gated_delta_rule_long": Recurrence("gated_delta_rule", 1, 65_536, 4, 256, 256, segments=1),
    "linear_attention": Recurrence("linear_attention", 16, 4096, 4, 256, 256),
    "linear_attention_per_key": Recurrence("linear_attention", 16, 4096, 4, 256, 256, decay="key"),
    "small": Recurrence("gated_delta_rule", 1, 128, 2, 16, 16, segments=2),
    "small_grouped_matmul": Grouped("dw", 256, 32, 32),
    "grouped_matmul": Grouped("forward"),
    "grouped_matmul_dx": Grouped("dx"),
    "grouped_matmul_dw": Grouped("dw"),
}


COLUMNS = ("work", "implementation", "what", "ms", "TFLOP/s", "GB/s", "floor, ms", "% of floor", "error")


@dataclass(frozen=True)
class BenchmarkKernels(Timing):
    """What to time."""

    works: tuple[str, ...] = tuple(name for name in WORKS if not name.startswith("small"))
    """Names of WORKS in this file; those named small are for a CPU."""
    implementations: tuple[str, ...] = ("triton", "chunked", *peers.installed())
    """Implementations to set side by side; "fla" is flash-linear-attention, "jla" is jax-linear-attention."""
    output: str = "runs/benchmark_kernels"
    """Directory of the table and the figures."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.works:
            require(name in WORKS, "works", name, f"choose from {', '.join(WORKS)}")


def recurrence_inputs(work: Recurrence) -> tuple:
    """q, k, v, log-decay, beta (of the delta rule), segments, and cotangents of the output and the final state."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shape = (work.batch, work.tokens, work.heads)

    def unit(width):
        x = jax.random.normal(next(keys), (*shape, width))
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(jnp.bfloat16)

    q, k = unit(work.key), unit(work.key)
    v, do = (jax.random.normal(next(keys), (*shape, work.value), jnp.bfloat16) for _ in range(2))
    gate_shape = {"head": shape, "key": (*shape, work.key), None: None}[work.decay]
    log_decay = None if gate_shape is None else -0.1 * jax.random.exponential(next(keys), gate_shape)
    arrays = (q, k, v, log_decay)
    if work.op == "gated_delta_rule":
        arrays += (jax.random.uniform(next(keys), shape),)
    segments = Segments.from_lengths(jnp.full((work.batch, work.segments), work.tokens // work.segments, jnp.int32))
    states = 1 if work.last_state_only else work.segments
    state = (work.batch, states, work.heads, work.key, work.value)
    return arrays, segments, (do, jax.random.normal(next(keys), state))


def recurrence(work: Recurrence, implementation: str, arrays, segments):
    if implementation == "jla":
        return peers.jla_recurrence(work.op, work.decay, arrays, segments)
    o, states = getattr(api, work.op)(*arrays, segments=segments, implementation=implementation)
    return o, states[:, -1:] if work.last_state_only else states


def with_gradients(work: Recurrence, implementation: str, arrays, segments, cotangents):
    outputs, pull = jax.vjp(lambda arrays: recurrence(work, implementation, arrays, segments), arrays)
    return outputs, pull(cotangents)


def check_recurrence(work: Recurrence, implementation: str) -> float:
    """The error of outputs, states and gradients on a few hundred tokens; of a single row on what is cut into spans."""
    batch, tokens, segments = (2, 256, 2) if work.batch > 1 else (1, min(work.tokens, 4096), work.segments)
    segments = min(segments, work.segments)
    few = dataclasses.replace(work, batch=batch, tokens=tokens, heads=min(work.heads, 2), segments=segments)
    inputs = recurrence_inputs(few)
    if implementation == "fla":
        actual = peers.torch_results(*peers.fla_recurrence(work.op, work.decay, *inputs))
    else:
        actual = jax.jit(partial(with_gradients, few, implementation))(*inputs)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    expected = jax.jit(partial(with_gradients, few, "reference"))(*exact)
    return relative_error(actual, expected[: len(actual)])


def time_recurrence(config: BenchmarkKernels, work: Recurrence, implementation: str) -> dict[str, float | None]:
    arrays, segments, cotangents = recurrence_inputs(work)
    if implementation == "fla":
        times = peers.time_torch(config, *peers.fla_recurrence(work.op, work.decay, arrays, segments, cotangents))
        return {"forward": times["forward_ms"], "with gradients": times["ms"]}
    forward = jax.jit(partial(recurrence, work, implementation))
    both = jax.jit(partial(with_gradients, work, implementation))
    return {
        "forward": milliseconds(config, forward, arrays, segments),
        "with gradients": milliseconds(config, both, arrays, segments, cotangents),
    }


def grouped_inputs(work: Grouped) -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    shares = jnp.array([[0.45, 0.3, 0.15, 0.1]])
    lengths = (shares * work.slots).astype(jnp.int32) // 64 * 64
    x = jax.random.normal(keys[0], (1, work.slots, work.depth), jnp.bfloat16)
    w = jax.random.normal(keys[1], (4, work.depth, work.width), jnp.bfloat16)
    return x, w, Segments.from_lengths(lengths), jax.random.normal(keys[2], (1, work.slots, work.width), jnp.bfloat16)


def grouped(work: Grouped, implementation: str, x, w, segments, dy):
    def product(x, w):
        return api.grouped_matmul(x, w, segments, implementation=implementation)

    if work.product == "forward":
        return product(x, w)
    if work.product == "dx":
        return jax.vjp(lambda x: product(x, w), x)[1](dy)
    return jax.vjp(lambda w: product(x, w), w)[1](dy)


def check_grouped(work: Grouped, implementation: str) -> float:
    few = Grouped(work.product, min(work.slots, 32_768), 256, 256)  # pieces of dw of several steps
    inputs = grouped_inputs(few)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    actual = jax.jit(partial(grouped, few, implementation))(*inputs)
    return relative_error(actual, jax.jit(partial(grouped, few, "reference"))(*exact))


def time_grouped(config: BenchmarkKernels, work: Grouped, implementation: str) -> dict[str, float]:
    return {work.product: milliseconds(config, jax.jit(partial(grouped, work, implementation)), *grouped_inputs(work))}


def measure(config: BenchmarkKernels, work: Recurrence | Grouped, implementation: str) -> tuple[float, dict]:
    """The error, and the times; none of ours where it is over the limit."""
    check, time = check_grouped, time_grouped
    if isinstance(work, Recurrence):
        work = dataclasses.replace(work, last_state_only=implementation == "jla")
        check, time = check_recurrence, time_recurrence
    error = check(work, implementation)
    is_timed = error <= LIMIT or implementation in peers.PEERS
    return error, time(config, work, implementation) if is_timed else {}


def work_of(work: Recurrence | Grouped, what: str) -> tuple[float, float]:
    """FLOP, and bytes read and written at least."""
    return (3.5 * work.flops, 2.5 * work.bytes) if what == "with gradients" else (work.flops, work.bytes)


def floor(work: Recurrence | Grouped, what: str, matmul_rate: float, copy_rate: float) -> float:
    """Milliseconds that the device's measured rates allow."""
    flops, traffic = work_of(work, what)
    return 1e3 * max(flops / matmul_rate, traffic / copy_rate)


def main(config: BenchmarkKernels) -> dict:
    figures = device_figures(config) | {"peers": peers.versions()}
    print(title(figures))
    for name in peers.PEERS:
        if name not in peers.installed():
            print(f"{name} is left out: it is not installed")
    rows, wrong = [], []
    for name in config.works:
        work = WORKS[name]
        for implementation in config.implementations:
            try:
                error, times = measure(config, work, implementation)
            except Exception as reason:
                if implementation not in peers.PEERS:
                    raise
                print(f"{name} {implementation} is left out: {reason!r:.300}")
                continue
            if not times:
                wrong.append(f"{name} {implementation}: relative error {error:.2g} > {LIMIT}")
                print(wrong[-1])
                continue
            for what, ms in times.items():
                lowest = floor(work, what, figures["matmul_flops_per_s"], figures["copy_bytes_per_s"])
                flops, traffic = work_of(work, what)
                row = {
                    "work": name, "implementation": implementation, "what": what, "ms": ms,
                    "tflops": ms and flops / ms / 1e9, "gb_per_s": ms and traffic / ms / 1e6, "floor_ms": lowest,
                    "percent_of_floor": ms and 100 * lowest / ms, "error": error,
                }  # fmt: skip
                rows.append(row)
                print(format_row(row), flush=True)
            # After each, so that a run that is cut off leaves what it has measured.
            write_report(config.output, "kernels", figures | {"rows": rows}, COLUMNS, [format_row(row) for row in rows])
    if wrong:
        raise ValueError("wrong results, not timed: " + "; ".join(wrong))
    return figures | {"rows": rows}


def format_row(row: dict) -> str:
    formats = {
        "work": "", "implementation": "", "what": "", "ms": ".3f", "tflops": ".0f", "gb_per_s": ".0f", "floor_ms": ".2f",
        "percent_of_floor": ".0f", "error": ".1e",
    }  # fmt: skip
    return table_row(row, formats)


if __name__ == "__main__":
    run(BenchmarkKernels, main, __doc__)
