"""Times prompts and single tokens: tokens/s of the prefill, milliseconds a token of decoding, and how far from the floor.

    python experiments/benchmark_generation.py --output docs/results/generation       one NVIDIA GPU, about 4 minutes

A work is a preset, rows and tokens of the prompts: "mom_340m 32x2048". 0 tokens: decoding alone, from empty states. The
prompts are random; each is given twice, and the second time counts. Decoding is the compiled loop of mom_jax.generate,
greedy: --tokens tokens, after as many that do not count. The floor is the time in which the device copies as many bytes, at
the rate measured in the same run:

    bytes a step = all weights but the embedding + 2 rows (R + shared) L (states, float32, read and written)
"""

import dataclasses
import re
import time
from dataclasses import dataclass

import jax
import numpy as np
from cli import run
from flax import nnx
from timing import Timing, device_figures, title, write_report

from mom_jax.config import PRESETS, ModelConfig, require
from mom_jax.generation import begin_decoding, decode, empty_state, inference_model, prefill
from mom_jax.model import MoMLanguageModel, bind, init_params
from mom_jax.sampling import Sampling

COLUMNS = ("work", "prefill, tokens/s", "decoding, ms a token", "tokens/s", "% of floor", "GiB of state")


@dataclass(frozen=True)
class BenchmarkGeneration(Timing):
    """What to time."""

    works: tuple[str, ...] = (
        "mom_340m 1x2048", "mom_340m 1x65536", "mom_340m 8x2048", "mom_340m 32x2048", "mom_340m 256x0", "mom_1_3b 1x2048",
        "mom_1_3b 32x2048",
    )  # fmt: skip
    """Preset, rows and tokens of the prompts of each."""
    tokens: int = 64
    """Tokens to decode."""
    output: str = "runs/benchmark_generation"
    """Directory of the figures."""

    def __post_init__(self):
        super().__post_init__()
        require(self.tokens > 0, "tokens", self.tokens, "it must be positive")
        for work in self.works:
            found = re.fullmatch(r"(\w+) [1-9]\d*x\d+", work)
            require(found is not None and found[1] in PRESETS, "works", work, f"a preset ({', '.join(PRESETS)}) and 8x2048")


def step_bytes(config: ModelConfig, params, rows: int) -> float:
    """What a step of decoding has to read and write: every weight, and the states of the chosen memories twice."""
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embedding"].nbytes * (not config.tie_embeddings)
    states = config.num_layers * (config.top_k + config.shared_memory) * config.num_heads
    return weights + 2 * rows * states * config.head_dim * config.value_head_dim * 4


def measure(config: BenchmarkGeneration, work: str, model: MoMLanguageModel, copy_rate: float) -> dict:
    rows, length = map(int, work.split()[1].split("x"))
    params, rng = nnx.to_pure_dict(nnx.state(model)), np.random.default_rng(0)
    seconds, state, hidden = 0.0, None, None
    for _ in range(2 if length else 0):
        prompts = list(rng.integers(0, model.config.vocab_size, (rows, length), dtype=np.int32))
        del state, hidden  # before the next are made
        start = time.perf_counter()
        state, hidden = jax.block_until_ready(prefill(model.config, params, prompts, None))
        seconds = time.perf_counter() - start
    if not length:
        state = empty_state(model.config, rows, None)
        hidden = jax.numpy.ones((rows, model.config.hidden_size), model.config.dtype)
    state_gib = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**30
    decoding = begin_decoding(state, hidden, [np.zeros(1, np.int32)] * rows, 2 * config.tokens, None)
    arguments = Sampling(temperature=0.0).options(), np.zeros(rows, np.uint32), np.zeros(model.config.vocab_size, bool)
    for limit in (config.tokens, 2 * config.tokens):
        start = time.perf_counter()
        decoding = decode(model.config, params, decoding, *arguments, np.int32(limit))
        jax.block_until_ready(decoding.tokens)
        ms = 1e3 * (time.perf_counter() - start) / config.tokens
    floor = 1e3 * step_bytes(model.config, params, rows) / copy_rate
    return {
        "work": work, "prefill_tokens_per_second": rows * length / seconds if length else None, "ms": ms,
        "tokens_per_second": 1e3 * rows / ms, "floor_ms": floor, "percent_of_floor": 100 * floor / ms,
        "state_gib": state_gib,
    }  # fmt: skip


def main(config: BenchmarkGeneration) -> dict:
    figures, rows, model, preset = device_figures(config) | {"settings": dataclasses.asdict(config)}, [], None, None
    print(title(figures))
    for work in config.works:
        if work.split()[0] != preset:
            preset, model = work.split()[0], None
            of_preset = PRESETS[preset](remat="none")
            parameters = jax.jit(init_params, static_argnums=0)(of_preset, jax.random.key(0))
            model = inference_model(bind(of_preset, *parameters))
            del parameters
        rows.append(measure(config, work, model, figures["copy_bytes_per_s"]))
        print(format_row(rows[-1]), flush=True)
        # After each, so that a run that is cut off leaves what it has measured.
        write_report(config.output, "generation", figures | {"rows": rows}, COLUMNS, [format_row(row) for row in rows])
    return figures | {"rows": rows}


def format_row(row: dict) -> str:
    rate = row["prefill_tokens_per_second"]
    prefill_rate = "-" if rate is None else f"{rate:,.0f}"
    rates = f"{prefill_rate} | {row['ms']:.2f} | {row['tokens_per_second']:,.0f}"
    return f"| {row['work']} | {rates} | {row['percent_of_floor']:.0f} | {row['state_gib']:.2f} |"


if __name__ == "__main__":
    run(BenchmarkGeneration, main, __doc__)
