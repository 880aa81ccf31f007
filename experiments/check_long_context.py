"""Does a long prompt in pieces take constant memory, and end in the state of the whole prompt at once?

    python experiments/check_long_context.py --output docs/results/long_context     one H200, about 3 minutes
    python experiments/check_long_context.py --preset tiny --tokens 32768 --compare 8192      two CPU cores, half a minute

From fresh weights and random tokens, one row:

    memory   --tokens tokens go through the model as mom_jax.generate takes them, in the compute type of the model. What the
             device holds afterwards, and the most that it has held, may be at most 64 MiB above that after --compare tokens.
             Then --new-tokens are decoded.
    state    the states of each layer after --compare tokens in float32, in one call, in pieces of the size that generation
             takes, and of --control: the relative L2 error of its memories after the last token. A layer gets the same
             inputs in all of them, those of the one call. What a fresh model has forgotten by then is not seen.

Rounding moves a token to another memory where two are almost equally probable, and from then on states differ by more than
rounding: by more in every layer above, which is why each layer is given the same inputs. A layer where a choice differs may
err by 5e-2, the others by 5e-5.

Fails if a limit is exceeded, after writing long_context.json and long_context.md. A CPU does not say what memory it holds.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from cli import run
from flax import nnx
from timing import Timing, device_figures, relative_error, settings_of, time_decoding, write_report

from mom_jax.config import ModelConfig, mom_340m, require
from mom_jax.generation import PIECES, empty_state, prefill
from mom_jax.layers import LayerState, cast_weights
from mom_jax.model import bind, init_params

ERROR_LIMIT, FLIPPED_LIMIT = 5e-5, 5e-2
GROWTH_LIMIT = 64 * 2**20  # bytes: room for the ids of pieces that wait for the device


@dataclass(frozen=True)
class CheckLongContext:
    """What to check."""

    model: ModelConfig = field(default_factory=mom_340m)
    tokens: int = 1_000_000
    """Tokens of the long prompt."""
    compare: int = 65_536
    """Tokens whose state is compared, and after which memory is first looked at."""
    control: int = 1024
    """Tokens in other pieces than those of generation."""
    new_tokens: int = 64
    """Tokens to decode, after as many that do not count."""
    seed: int = 0
    """Seed of the weights and the tokens."""
    output: str = "runs/check_long_context"
    """Directory of the figures."""

    def __post_init__(self):
        for name in ("compare", "control", "new_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        longest = max(PIECES[0], self.control)
        require(self.compare > longest, "compare", self.compare, f"it must be more than a piece, {longest}, to be cut")
        require(self.tokens > self.compare, "tokens", self.tokens, f"it must be more than compare = {self.compare}")
        layers = self.model.attention.layers
        require(not layers, "AttentionConfig.layers", layers, "the states that are compared are those of memories")


@partial(jax.jit, static_argnums=0)
def make_weights(config: ModelConfig, seed):
    """Fresh ones in the compute type, never held in float32 all at once: that would take more memory than the prompt."""
    return cast_weights(init_params(config, jax.random.key(seed))[0], config.dtype, of_embedding=True)


def memory() -> dict[str, int]:
    """Bytes that the device holds, and the most that it has held so far; empty if it does not say."""
    statistics = jax.devices()[0].memory_stats() or {}
    return {name: statistics[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in statistics}


def check_memory(config: CheckLongContext, prompt: np.ndarray) -> dict:
    params, state, hidden = make_weights(config.model, config.seed), None, None
    memories = {"the weights": memory()}
    prefill(config.model, params, [prompt[: len(prompt) % PIECES[0] or 1]], None)  # compiles the small pieces at the end
    for length in (config.compare, config.tokens):
        del state, hidden
        start = time.perf_counter()
        state, hidden = jax.block_until_ready(prefill(config.model, params, [prompt[:length]], None))
        seconds = time.perf_counter() - start
        memories[f"{length:,} tokens"] = memory()
    _, first, last = memories.values()
    is_finite = bool(jnp.isfinite(hidden).all())
    ms, _ = time_decoding(config.model, params, state, hidden, config.new_tokens)
    return {
        "memory": memories, "growth": max((last[name] - first[name] for name in last), default=None),
        "prefill_tokens_per_second": config.tokens / seconds, "is_finite": is_finite, "decoding_ms": ms,
    }  # fmt: skip


@partial(jax.jit, static_argnums=0)
def run_layer(config: ModelConfig, params, layer, x, state):
    """A piece [1, T, D] after the layer, the layer's state after it, and the memories [1, T, R] that its tokens chose."""
    graph, stacks = nnx.split(bind(config, params, {}).ordered_runs()[0])
    block = nnx.merge(graph, jax.tree.map(lambda stack: stack[layer], stacks))
    documents = jnp.zeros(x.shape[:2], jnp.int32)
    x, routing, state = block(x, None, documents, LayerState(state, jnp.int32(0)))
    return x, state, routing.memories


def check_state(config: CheckLongContext, prompt: np.ndarray) -> dict[str, dict[str, list]]:
    """For every way through the prompt, the error of each layer's memories and how many of its tokens chose others."""
    model = dataclasses.replace(config.model, dtype="float32")
    params = make_weights(model, config.seed)
    x = params["embedding"][prompt][None]
    found = {size: {"error": [], "other_choices": []} for size in (PIECES[0], config.control)}
    for layer in range(model.num_layers):

        def memories(size, layer=layer, x=x):
            """After the layer's whole input in pieces; and its outputs and choices."""
            state = jax.tree.map(lambda stack: stack[:1], empty_state(model, 1, None).layers[0])
            outputs, choices = [], []
            for begin in range(0, x.shape[1], size):
                y, state, chosen = run_layer(model, params, layer, x[:, begin : begin + size], state)
                outputs.append(y)
                choices.append(jnp.sort(chosen))
            return state.recurrent, outputs, np.concatenate(choices, axis=1)

        whole, (after,), choices = memories(len(prompt))
        for size, way in found.items():
            recurrent, _, others = memories(size)
            way["error"].append(relative_error(recurrent, whole))
            way["other_choices"].append(int(np.any(others != choices, axis=-1).sum()))
        x = after
    return {f"pieces of {size}": way for size, way in found.items()}


def failures(found: dict) -> list[str]:
    failed = [] if found["is_finite"] else ["what comes out after the long prompt is not finite"]
    if (found["growth"] or 0) > GROWTH_LIMIT:
        failed.append(f"memory grew by {found['growth'] / 2**20:,.0f} MiB with the length of the prompt")
    for name, way in found["state"].items():
        for layer, (error, others) in enumerate(zip(way["error"], way["other_choices"], strict=True)):
            limit = FLIPPED_LIMIT if others else ERROR_LIMIT
            if not error <= limit:
                failed.append(f"{name}: an error of {error:.1e} in layer {layer}, {others} other choices; limit {limit:.0e}")
    return failed


def main(config: CheckLongContext) -> dict:
    prompt = np.random.default_rng(config.seed).integers(0, config.model.vocab_size, config.tokens, dtype=np.int32)
    found = check_memory(config, prompt)  # first, since nothing takes back the most that was held
    speed = f"{found['prefill_tokens_per_second']:,.0f} tokens/s, then {found['decoding_ms']:.2f} ms a token"
    notes = [f"- {config.tokens:,} tokens: {speed}"]
    for when, sizes in found["memory"].items():
        held = ", at most ".join(f"{size / 2**30:.3f} GiB" for size in sizes.values()) or "not measured"
        notes.append(f"- memory after {when}: {held}")
    print("\n".join(notes), flush=True)
    found["state"] = check_state(config, prompt[: config.compare])
    failed = failures(found)
    figures = device_figures(Timing()) | {"settings": settings_of(config), "failures": failed} | found
    passed = "all within the limits"
    if found["growth"] is None:
        passed = "all that was measured is within the limits; memory was not measured"
    verdict = [f"- failed: {failure}" for failure in failed] or [f"- {passed}"]
    columns = ("layer", *(f"{name}: {what}" for name in found["state"] for what in ("error", "other choices")))
    cells = zip(*(way[what] for way in found["state"].values() for what in ("error", "other_choices")), strict=True)
    texts = ([f"{x:.1e}" if isinstance(x, float) else f"{x:,}" for x in row] for row in cells)
    lines = [f"| {layer} | {' | '.join(row)} |" for layer, row in enumerate(texts)]
    write_report(config.output, "long_context", figures, columns, lines, [*notes, *verdict, ""])
    print("\n".join(lines + verdict))
    if failed:
        raise ValueError("; ".join(failed))
    return figures


if __name__ == "__main__":
    run(CheckLongContext, main, __doc__)
