"""One table of awkward cases for every implementation of every op: tests and benchmarks read it."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import Segments


@dataclass(frozen=True)
class Case:
    """Rows of ragged segments with their gates.

    lengths: tokens of each segment, a tuple a row; a single number: one full segment (``segments=None``).
    spare: slots after the last segment that nobody owns, and dead slots hold NaN-free rubbish.
    """

    id: str
    lengths: tuple[tuple[int, ...], ...] | int
    heads: int = 2
    key: int = 16
    value: int = 32
    decay: str | None = "head"  # None, "head", "key" or "strong" (0 to -100 a token, a key)
    runs: bool = False
    initial_state: bool = False
    repeated_keys: bool = False
    spare: int = 0

    def __str__(self):
        return self.id


CASES = (
    Case("one_token", 1),
    Case("one_token_with_state", 1, initial_state=True),
    Case("T63", 63, decay=None),
    Case("T65", 65, initial_state=True),
    Case("T500", 500, heads=1),
    Case("exact_chunks", 128, decay="key"),
    Case("decay_per_key_T130", 130, decay="key", initial_state=True),
    Case("strong_decay_per_key", 100, decay="strong", initial_state=True),
    Case("ragged", ((70, 3, 64, 1), (0, 128, 5, 66)), initial_state=True),
    Case("ragged_without_decay", ((70, 3), (1, 128)), decay=None, initial_state=True),
    Case("empty_memory", ((0, 65, 0), (64, 0, 0)), initial_state=True, spare=64),
    Case("all_in_one_memory", ((0, 200, 0, 0),), initial_state=True, spare=128),
    Case("runs", 150, runs=True, initial_state=True),
    Case("ragged_runs", ((70, 3, 130), (0, 128, 5)), runs=True, initial_state=True, spare=64),
    Case("ragged_runs_without_decay", ((70, 3), (5, 128)), decay=None, runs=True, initial_state=True),
    Case("ragged_runs_per_key", ((70, 65),), runs=True, decay="key", initial_state=True),
    Case("repeated_keys", 140, decay=None, repeated_keys=True),
    Case("wide", 70, heads=1, key=64, value=48),
)


def make_inputs(case: Case, seed: int = 0, dtype=jnp.float32) -> dict:
    """Random inputs of the case: q, k, v, log_decay, beta, segments, run_ids, initial_state (the last ones or None)."""
    rng = np.random.default_rng(seed)
    if isinstance(case.lengths, int):
        batch, num_segments, num_slots, segments = 2, 1, case.lengths, None
    else:
        segments = Segments.from_lengths(jnp.array(case.lengths))
        batch, num_segments = segments.lengths.shape
        num_slots = int(segments.offsets[:, -1].max()) + case.spare
    shape = (batch, num_slots, case.heads)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, k = unit(rng.normal(size=(*shape, case.key))), unit(rng.normal(size=(*shape, case.key)))
    beta = rng.uniform(size=shape)
    if case.repeated_keys:
        k, beta = np.broadcast_to(k[:, :1], k.shape), 0.9 + 0.1 * beta
    v = rng.normal(size=(*shape, case.value))
    log_decay = {
        None: None,
        "head": -rng.exponential(0.3, size=shape),
        "key": -rng.exponential(0.3, size=(*shape, case.key)),
        "strong": -rng.uniform(0, 1, size=(*shape, case.key)) ** 4 * 100,
    }[case.decay]
    run_ids = np.cumsum(rng.uniform(size=shape[:2]) < 0.05, axis=1) if case.runs else None
    state = rng.normal(size=(batch, num_segments, case.heads, case.key, case.value)) if case.initial_state else None

    def array(x, dtype):
        return None if x is None else jnp.asarray(x, dtype)

    return {
        "q": array(q, dtype), "k": array(k, dtype), "v": array(v, dtype),
        "log_decay": array(log_decay, jnp.float32), "beta": array(beta, jnp.float32),
        "segments": segments, "run_ids": array(run_ids, jnp.int32), "initial_state": array(state, jnp.float32),
    }  # fmt: skip
