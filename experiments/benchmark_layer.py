"""Times one MoM layer from x to y, forward and with all gradients: implementations side by side, first checked.

    python experiments/benchmark_layer.py --output docs/results/layer        one NVIDIA GPU; expected: 5 to 10 minutes

The layer is mom_jax.memory.MixtureOfMemories in bfloat16 over float32 parameters: router, dispatch, projections,
convolutions, recurrence, combine, norm, gate, output projection. Gradients are those of all parameters and of x for a random
cotangent of y; nothing is recomputed and the balance loss is not part. A time is the median over rounds of queued calls.
TFLOP/s, % of the measured matmul rate, GiB (the compiled temporaries) and ratio are those with gradients:

    FLOP a token = 3 (2 (matmul parameters that a token meets) + (R + shared) H (6 K V + 4 C (K + V))),  C = 64

A token meets k and v of R memories and the shared one, all gates, the router, W_q, W_g and W_o. The ratio is to M4, of the
works M4_T... (65,536 tokens in rows of T) to the one with T = 2048; the load is the part of the tokens in each memory.

Before it is timed, a work's layer on 2 rows of 512 tokens (so few that nothing is cut into spans) is compared with the
float32 reference: output and every gradient. One that is wrong (relative L2 error over the tests' limit, or other memories
chosen) ends the run with status 1. Gradients are compared for four cotangents together: those of A_log and dt_bias are sums
over all tokens, which one cotangent in ten makes so small that bfloat16 rounding alone exceeds the limit.

Where flash-linear-attention is installed, its MomAttention is timed too, on the same x and router, unchecked and with
bfloat16 parameters; GiB is then its peak over x and parameters. On Hopper with Triton 3.4 to 3.7.0 and without tilelang its
backward refuses to run because gradients would be wrong (its issue 640). Figures with gradients would need that guard
bypassed, which is not done here: they stay empty.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import peers
from cli import run
from flax import nnx
from timing import (
    LIMIT,
    Timing,
    device_figures,
    milliseconds,
    mixer_flops_per_token,
    relative_error,
    table_row,
    title,
    write_report,
)

from mom_jax.config import PRESETS, ModelConfig, require
from mom_jax.memory import MixtureOfMemories

COLUMNS = (
    "work", "implementation", "forward, ms", "with gradients, ms", "TFLOP/s", "% of matmul", "GiB", "ratio", "error", "load",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A layer and its input; ``favoured``: the part of the tokens whose first choice is memory 0, None: as it comes."""

    model: ModelConfig
    rows: int = 16
    tokens: int = 4096
    favoured: float | None = None
    compared_with: str = "M4"


M4 = PRESETS["mom_340m"]()
WORKS = {
    "M4": Work(M4),
    "M8": Work(dataclasses.replace(M4, num_memories=8)),
    "M4_skewed": Work(M4, favoured=0.9),
    "single": Work(PRESETS["gated_deltanet_340m"]()),
    **{f"M4_T{t}": Work(M4, 65_536 // t, t, compared_with="M4_T2048") for t in (2048, 4096, 16_384, 65_536)},
    "small": Work(PRESETS["tiny"](dtype="bfloat16"), 2, 128, favoured=0.9, compared_with="small"),
}


@dataclass(frozen=True)
class BenchmarkLayer(Timing):
    """What to time."""

    works: tuple[str, ...] = tuple(name for name in WORKS if name != "small")
    """Names of WORKS in this file; "small" is for a CPU."""
    implementations: tuple[str, ...] = ("default", "chunked") + ("fla",) * ("fla" in peers.installed())
    """Implementations of the ops, "default" for the one that training takes; "fla" is flash-linear-attention's layer."""
    output: str = "runs/benchmark_layer"
    """Directory of the table and the figures."""

    def __post_init__(self):
        super().__post_init__()
        for name in self.works:
            require(name in WORKS, "works", name, f"choose from {', '.join(WORKS)}")


def inputs(work: Work) -> tuple[nnx.State, jax.Array, jax.Array]:
    """Parameters, all exact in bfloat16 except the router's; x and the cotangent of y."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = nnx.state(MixtureOfMemories(work.model, rngs=nnx.Rngs(0)), nnx.Param)
    router = params["router"]["router"][...]
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    shape = (work.rows, work.tokens, work.model.hidden_size)
    x = jax.random.normal(keys[0], shape)
    if work.favoured is not None:  # the logit of memory 0 is moved by 0.5 * 8 along u, up or down
        u = work.model.hidden_size**-0.5
        x += 8 * u * jnp.where(jax.random.bernoulli(keys[1], work.favoured, (*shape[:2], 1)), 1, -1)
        router = router.at[:, 0].add(0.5 * u)
    params["router"]["router"][...] = router
    return params, x.astype(jnp.bfloat16), jax.random.normal(keys[2], shape, jnp.bfloat16)


def layer(model: ModelConfig, params: nnx.State) -> MixtureOfMemories:
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: MixtureOfMemories(model, rngs=nnx.Rngs(0)))), params)


def forward(model: ModelConfig, params, x):
    return layer(model, params)(x, None, None, None)[0]


def with_gradients(model: ModelConfig, params, x, dy):
    y, pull = jax.vjp(partial(forward, model), params, x)
    return y, pull(dy)


@partial(jax.jit, static_argnums=0)
def route(model: ModelConfig, params, x):
    return layer(model, params).router(x, None)


def with_implementation(model: ModelConfig, name: str) -> ModelConfig:
    return dataclasses.replace(model, implementation=None if name == "default" else name)


@cache
def results(work: Work, implementation: str, dtype: str) -> tuple:
    """The memories chosen; and the output and all gradients, each stacked over four cotangents."""
    model = dataclasses.replace(with_implementation(work.model, implementation), dtype=dtype)
    both = jax.jit(partial(with_gradients, model))
    params, x, _ = inputs(work)
    x, cotangents = x.astype(dtype), jax.random.normal(jax.random.key(1), (4, *x.shape), jnp.bfloat16).astype(dtype)
    of_each = [both(params, x, dy) for dy in cotangents]
    return route(model, params, x).memories, jax.tree.map(lambda *r: np.stack(r), *of_each)


def check(work: Work, implementation: str) -> float:
    """The error of the output and all gradients on a few hundred tokens; infinite where memories differ."""
    few = Work(work.model, 2, 512, work.favoured)
    memories, actual = results(few, implementation, "bfloat16")
    exact_memories, expected = results(few, "reference", "float32")
    return relative_error(actual, expected) if (memories == exact_memories).all() else float("inf")


def time_layer(config: BenchmarkLayer, work: Work, implementation: str) -> dict:
    """Times, and the GiB of temporaries with gradients."""
    model = with_implementation(work.model, implementation)
    params, x, dy = inputs(work)
    one_way = jax.jit(partial(forward, model)).lower(params, x).compile()
    both = jax.jit(partial(with_gradients, model)).lower(params, x, dy).compile()
    return {
        "forward_ms": milliseconds(config, one_way, params, x),
        "ms": milliseconds(config, both, params, x, dy),
        "gib": both.memory_analysis().temp_size_in_bytes / 2**30,
    }


def time_fla(config: BenchmarkLayer, work: Work) -> dict:
    """The same of flash-linear-attention's layer; no times with gradients where it refuses them."""
    import torch
    from fla.layers.mom import MomAttention

    model, (params, x, dy) = work.model, inputs(work)
    x, dy = peers.to_torch(x).requires_grad_(), peers.to_torch(dy)
    theirs = MomAttention(
        hidden_size=model.hidden_size, num_heads=model.num_heads, head_dim=model.head_dim, expand_v=model.expand_v,
        num_memories=model.num_memories, topk=model.top_k, shared_mem=model.shared_memory, conv_size=model.conv_size,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    theirs.gate.weight.data = peers.to_torch(params["router"]["router"][...].T.astype(jnp.bfloat16))

    def both():
        return torch.autograd.grad(theirs(x)[0], [x, *theirs.parameters()], dy)

    return peers.time_torch(config, lambda: theirs(x), both)


def measure(config: BenchmarkLayer, name: str, implementation: str, matmul_rate: float) -> dict:
    """A row of the table, without its ratio."""
    work, error = WORKS[name], None
    if implementation == "fla":
        times = time_fla(config, work)
    else:
        error = check(work, implementation)
        if not error <= LIMIT:
            raise ValueError(f"relative error {error:.2g} > {LIMIT}, not timed")
        times = time_layer(config, work, implementation)
    flops = 3 * work.rows * work.tokens * mixer_flops_per_token(work.model)
    tflops = times["ms"] and flops / times["ms"] / 1e9
    params, x, _ = inputs(work)
    return {
        "work": name, "implementation": implementation, "rows": work.rows, "tokens": work.tokens, **times, "tflops": tflops,
        "percent_of_matmul": tflops and 1e14 * tflops / matmul_rate, "error": error,
        "load": route(work.model, params, x).load.tolist(),
    }  # fmt: skip


def main(config: BenchmarkLayer) -> dict:
    figures = device_figures(config) | {"peers": peers.versions()}
    print(title(figures))
    rows, failed = [], []
    for name in config.works:
        for implementation in config.implementations:
            try:
                row = measure(config, name, implementation, figures["matmul_flops_per_s"])
            except (ValueError, RuntimeError) as error:  # wrong, or out of memory: the other works still count
                failed.append(f"{name} {implementation}: {str(error).splitlines()[0]}")
                print(failed[-1])
                continue
            rows.append(row)
            base = [r["ms"] for r in rows if (r["work"], r["implementation"]) == (WORKS[name].compared_with, implementation)]
            row["ratio"] = row["ms"] / base[0] if base and row["ms"] else None
            print(format_row(row), flush=True)
            # After each, so that a run that is cut off leaves what it has measured.
            write_report(config.output, "layer", figures | {"rows": rows}, COLUMNS, [format_row(row) for row in rows])
    if failed:
        raise ValueError("; ".join(failed))
    return figures | {"rows": rows}


def format_row(row: dict) -> str:
    formats = {
        "work": "", "implementation": "", "forward_ms": ".3f", "ms": ".3f", "tflops": ".0f", "percent_of_matmul": ".0f",
        "gib": ".2f", "ratio": ".2f", "error": ".1e",
    }  # fmt: skip
    return f"{table_row(row, formats)} {' '.join(f'{x:.2f}' for x in row['load'])} |"


if __name__ == "__main__":
    run(BenchmarkLayer, main, __doc__)
