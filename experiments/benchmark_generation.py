"""Times prompts and single tokens: tokens/s of the prefill, milliseconds a token of decoding, and how far from the floor.

    python experiments/benchmark_generation.py --output docs/results/generation       one NVIDIA GPU, about 4 minutes
    python experiments/benchmark_generation.py --output docs/results/lengths --works "mom_340m 1x2048" "mom_340m 1x16384" \
        "mom_340m 1x131072" "transformer_340m 1x2048" "transformer_340m 1x16384" "transformer_340m 1x131072"

A work is a preset, rows and tokens of the prompts: "mom_340m 32x2048". 0 tokens: decoding alone, from empty states. The
prompts are random; each is given twice, and the second time counts. Decoding is the compiled loop of mom_jax.generate,
greedy: --tokens tokens, after as many that do not count. The floor is the time in which the device copies as many bytes, at
the rate measured in the same run:

    bytes a step = all weights but the embedding, of the memories at most rows R + 2 rows (R + shared) L (states, float32)
                   + the caches of attention layers, which hold the prompt and twice --tokens, no more

The memory is that of the compiled decoding loop: weights, state and temporaries, not what the prompt took. Where a preset
has prompts of several lengths, generation_lengths.png has the times and the memory against the length (arXiv 2502.13685,
figure 3). Attention works through a prompt as plain products over the whole cache: its prefill is no measure of kernels.
"""

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from cli import run
from flax import nnx
from timing import Timing, device_figures, settings_of, time_decoding, title, write_report

from mom_jax.attention import AttentionState
from mom_jax.config import PRESETS, ModelConfig, require
from mom_jax.generation import empty_state, inference_model, prefill
from mom_jax.model import ModelState, MoMLanguageModel, bind, init_params
from mom_jax.sharding import leaf_name

OF_MEMORIES = ("w_k", "w_v", "w_a", "w_b")
COLUMNS = ("work", "prefill, tokens/s", "decoding, ms a token", "tokens/s", "% of floor", "GiB of state", "GiB in all")


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


def parse(work: str) -> tuple[str, int, int]:
    """Preset, rows and tokens of the prompts."""
    preset, sizes = work.split()
    return preset, *map(int, sizes.split("x"))


def step_bytes(config: ModelConfig, params, state: ModelState) -> float:
    """What a step of decoding has to read and write: weights and caches, and the states of the chosen memories twice."""
    rows = state.document.size
    used = min(config.num_memories, rows * config.top_k) / config.num_memories

    def size(path, x):
        name = leaf_name(path)
        return x.nbytes * (used if name in OF_MEMORIES else config.tie_embeddings if name == "embedding" else 1)

    weights = sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, params)))
    caches = sum(layers.k.nbytes + layers.v.nbytes for layers in state.layers if isinstance(layers, AttentionState))
    mom_layers = config.num_layers - len(config.attention.layers)
    states = mom_layers * (config.top_k + config.shared_memory) * config.num_heads
    return weights + caches + 2 * rows * states * config.head_dim * config.value_head_dim * 4


def measure(config: BenchmarkGeneration, work: str, model: MoMLanguageModel, copy_rate: float) -> dict:
    _, rows, length = parse(work)
    capacity = length + 2 * config.tokens
    params, rng = nnx.to_pure_dict(nnx.state(model)), np.random.default_rng(0)
    seconds, state, hidden = 0.0, None, None
    for _ in range(2 if length else 0):
        prompts = list(rng.integers(0, model.config.vocab_size, (rows, length), dtype=np.int32))
        del state, hidden  # before the next are made
        start = time.perf_counter()
        state, hidden = jax.block_until_ready(prefill(model.config, params, prompts, capacity))
        seconds = time.perf_counter() - start
    if not length:
        state = empty_state(model.config, rows, capacity)
        hidden = jax.numpy.ones((rows, model.config.hidden_size), model.config.dtype)
    state_gib = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**30
    floor = 1e3 * step_bytes(model.config, params, state) / copy_rate
    ms, gib = time_decoding(model.config, params, state, hidden, config.tokens)
    return {
        "work": work, "prefill_seconds": seconds, "prefill_tokens_per_second": rows * length / seconds if length else None,
        "ms": ms,
        "tokens_per_second": 1e3 * rows / ms, "floor_ms": floor, "percent_of_floor": 100 * floor / ms,
        "state_gib": state_gib, "gib": gib,
    }  # fmt: skip


def main(config: BenchmarkGeneration) -> dict:
    figures, rows, model, preset = device_figures(config) | {"settings": settings_of(config)}, [], None, None
    print(title(figures))
    for work in config.works:
        if parse(work)[0] != preset:
            preset, model = parse(work)[0], None
            of_preset = PRESETS[preset](remat="none")
            parameters = jax.jit(init_params, static_argnums=0)(of_preset, jax.random.key(0))
            model = inference_model(bind(of_preset, *parameters))
            del parameters
        try:
            rows.append(measure(config, work, model, figures["copy_bytes_per_s"]))
        except jax.errors.JaxRuntimeError as error:  # out of memory: the other works still count
            rows.append({"work": work, "ms": None, "error": str(error).splitlines()[0]})
        print(format_row(rows[-1]), flush=True)
        # After each, so that a run that is cut off leaves what it has measured.
        write_report(config.output, "generation", figures | {"rows": rows}, COLUMNS, [format_row(row) for row in rows])
        plot_lengths(rows, title(figures), Path(config.output) / "generation_lengths.png")
    return figures | {"rows": rows}


def plot_lengths(rows: list[dict], heading: str, path: Path) -> None:
    """Times and memory against the length of the prompts, a line for each preset and number of rows that has several."""
    from matplotlib.figure import Figure

    lines = defaultdict(list)
    for row in rows:
        preset, count, length = parse(row["work"])
        if row["ms"] and length:
            label = f"{preset}, {count} row{'s' * (count > 1)}"
            lines[label].append((length, row["prefill_seconds"], row["ms"], row["gib"]))
    lines = {label: sorted(points) for label, points in lines.items() if len(points) > 1}
    if not lines:
        return
    figure = Figure((12, 4), layout="constrained")
    figure.suptitle(heading, fontsize=8)
    panels = figure.subplots(1, 3)
    for panel, (axes, what) in enumerate(zip(panels, ("prompt, s", "decoding, ms a token", "decoding, GiB"), strict=True)):
        for label, points in lines.items():
            axes.loglog([point[0] for point in points], [point[panel + 1] for point in points], "o-", label=label)
        axes.set(xlabel="tokens of the prompt", ylabel=what)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def format_row(row: dict) -> str:
    if "error" in row:
        return f"| {row['work']} | {row['error']} |"
    rate = row["prefill_tokens_per_second"]
    prefill_rate = "-" if rate is None else f"{rate:,.0f}"
    rates = f"{prefill_rate} | {row['ms']:.2f} | {row['tokens_per_second']:,.0f}"
    return f"| {row['work']} | {rates} | {row['percent_of_floor']:.0f} | {row['state_gib']:.3g} | {row['gib']:.3g} |"


if __name__ == "__main__":
    run(BenchmarkGeneration, main, __doc__)
