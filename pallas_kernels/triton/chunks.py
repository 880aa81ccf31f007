"""What the recurrence kernels share: where chunks lie, their decays, their rows.

Arrays, with a row's N slots cut into chunks of C = 64::

    q, k [B,N,H,K]   v [B,N,H,V]   beta: float32 [B,H,N]   scores P, inverse T [B,H,N,C]: chunk n's rows are a C x C matrix
    states [B,chunks,H,K,V]: of each chunk

Inputs and outputs of a kernel are dicts of references; what a rule does not have (no decay, no delta) is None.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.segments import SEGMENT_ALIGNMENT, Segments

CHUNK = SEGMENT_ALIGNMENT


class Layout(NamedTuple):
    """Where segments, chunks and runs lie.

    Attributes:
      offsets: int32 [B, S+1]. lengths: int32 [B, S].
      valid: int32 [B, chunks], real slots of each chunk, which are its first.
      run: int32 [B, N], how many runs begin in the chunk up to and including the slot; None without runs.
    """

    offsets: jax.Array
    lengths: jax.Array
    valid: jax.Array
    run: jax.Array | None

    @classmethod
    def of(cls, segments: Segments, run_ids: jax.Array | None, num_slots: int) -> "Layout":
        by_chunk = (segments.lengths.shape[0], num_slots // CHUNK, CHUNK)
        run = None
        if run_ids is not None:
            begins = segments.starts_run(run_ids).reshape(by_chunk)
            run = jnp.cumsum(begins, axis=-1, dtype=jnp.int32).reshape(run_ids.shape)
        valid = jnp.sum(segments.is_real(num_slots).reshape(by_chunk), axis=-1, dtype=jnp.int32)
        return cls(segments.offsets, segments.lengths, valid, run)

    @property
    def is_real(self) -> jax.Array:
        """bool [B, N], whether each slot holds a token."""
        return (jnp.arange(CHUNK) < self.valid[..., None]).reshape(self.valid.shape[0], -1)


class Decays(NamedTuple):
    """How a chunk's slots hang together with the states before and after it, as float32 factors; None: all 1.

    Attributes:
      carried: [B, H, N], of the state before the chunk on its way to a slot: exp(g_i), zero behind a run border.
      tail: [B, H, N], of a slot on its way to the state after the chunk: exp(g_C - g_i), zero before a run border.
      state: [B, H, chunks], of the state before on its way to the state after: exp(g_C), zero over a run border.
    """

    carried: jax.Array | None
    tail: jax.Array | None
    state: jax.Array | None

    @classmethod
    def of(cls, g: jax.Array | None, run: jax.Array | None, num_heads: int) -> "Decays":
        """From the log-decay, cumulative in each chunk, float32 [B, H, N], and the layout's run counts."""
        if g is None and run is None:
            return cls(None, None, None)
        x = g if g is not None else jnp.zeros((run.shape[0], num_heads, run.shape[1]), jnp.float32)
        by_chunk = x.reshape(*x.shape[:2], -1, CHUNK)
        last = by_chunk[..., -1:]
        carried, tail, state = jnp.exp(by_chunk), jnp.exp(last - by_chunk), jnp.exp(last)
        if run is not None:
            run = run.reshape(run.shape[0], 1, -1, CHUNK)
            count = run[..., -1:]
            carried, tail = jnp.where(run == 0, carried, 0), jnp.where(run == count, tail, 0)
            state = jnp.where(count == 0, state, 0)
        return cls(carried.reshape(x.shape), tail.reshape(x.shape), state[..., 0])


def within_chunk(inputs, chunk) -> jax.Array:
    """[C, C]: the decay of slot j on its way to slot i >= j, exp(g_i - g_j); zero over a run border, and for j > i."""
    rows, i = pl.ds(chunk * CHUNK, CHUNK), jnp.arange(CHUNK)
    mask = i[:, None] >= i[None, :]
    if inputs["run"] is not None:
        run = inputs["run"][rows]
        mask &= run[:, None] == run[None, :]
    if inputs["g"] is None:
        return mask.astype(jnp.float32)
    g = inputs["g"][rows]
    # Masked before exp: above the diagonal it would overflow.
    return jnp.where(mask, jnp.exp(jnp.where(mask, g[:, None] - g[None, :], 0.0)), 0.0)


def tile_of(width: int, largest: int) -> int:
    """The largest power of two that divides ``width``, up to ``largest``."""
    return min(width & -width, largest)


def load_rows(ref, chunk, valid, columns=slice(None)) -> jax.Array:
    """The rows of a chunk of ``ref`` [N, width], zero from ``valid`` on, whatever they hold."""
    mask = (jnp.arange(CHUNK) < valid)[:, None]
    return plgpu.load(ref.at[pl.ds(chunk * CHUNK, CHUNK), columns], mask=mask, other=0.0)


def load_vector(ref, chunk) -> jax.Array | None:
    """A chunk of ``ref`` [N]; None if there is no such input."""
    return None if ref is None else ref[pl.ds(chunk * CHUNK, CHUNK)]


def scale_rows(x: jax.Array, *factors: jax.Array | float | None) -> jax.Array:
    """``x`` [C, width] in float32 with its rows multiplied by factors [C] or numbers; None: 1."""
    x, product = x.astype(jnp.float32), None
    for factor in factors:
        if factor is not None:
            product = factor if product is None else product * factor
    if product is None:
        return x
    return x * (product[:, None] if getattr(product, "ndim", 0) else product)
