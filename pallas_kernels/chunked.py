"""Chunk-parallel ops in plain JAX: any backend, differentiable, memory linear in the number of slots.

The gated delta rule over a chunk of C slots, with g the cumulative log-decay in the chunk and S the state before it
(arXiv 2406.06484 section 3, with decay arXiv 2412.06464 section 3.3)::

    A_ij = b_i sum_c k_ic k_jc exp(g_ic - g_jc)   for j < i           T = (I + A)^-1
    u = T (b v)                w = T (b k exp(g))                     stage 1: prepare
    n = u - w S                S <- exp(g_C) S + (k exp(g_C - g))^T n stage 2: propagate_states
    o = (q exp(g)) S + P n,    P_ij = sum_c q_ic k_jc exp(g_ic - g_jc) for j <= i      stage 3: read

Linear attention is the same with n = v. A run border inside a chunk cuts scores between runs, the carried state's part in
``w``, ``o`` and the new state, and what earlier runs would add to the new state: masks, never a huge negative decay.

Names: the chunk axis is ``n``, its slots ``i`` and ``j``; arrays are [B, chunks, H, C, width].
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cross_entropy import linear_cross_entropy  # noqa: F401
from pallas_kernels.gather import gather_sum
from pallas_kernels.handover import final_states_of
from pallas_kernels.layer_ops import combine, combine_gated_rms_norm, short_convolution  # noqa: F401
from pallas_kernels.segments import Segments, states_or_zeros, where_real
from pallas_kernels.step import (  # noqa: F401
    combine_step,
    gated_delta_rule_step,
    router_step,
    short_convolution_step,
    stacked_matmul,
)

CHUNK = 64  # divides SEGMENT_ALIGNMENT, so that a chunk lies in one segment
BLOCK = 16  # side of the blocks in which a per-key decay is applied pairwise and an inverse is built by masks


def _einsum(equation: str, a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """Einsum with operands in ``dtype`` and a float32 result.

    The algorithm is named, because the gradient's operands are float32 and would be multiplied as such.
    """
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.DotAlgorithmPreset.BF16_BF16_F32
    return jnp.einsum(
        equation, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


class Chunks(NamedTuple):
    """How the chunks of each row hang together.

    Attributes:
      segment: int32 [B, chunks], the segment that owns the chunk.
      first: bool [B, chunks], whether the chunk is its segment's first.
      run: int32 [B, chunks, C], how many runs begin in the chunk up to and including the slot; None without runs.
    """

    segment: jax.Array
    first: jax.Array
    run: jax.Array | None

    @classmethod
    def of(cls, segments: Segments, run_ids: jax.Array | None, num_slots: int) -> "Chunks":
        run = None
        if run_ids is not None:
            begins = segments.starts_run(run_ids).reshape(run_ids.shape[0], -1, CHUNK)
            run = jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
        return cls(segments.segment_of(num_slots)[:, ::CHUNK], segments.rank(num_slots)[:, ::CHUNK] == 0, run)

    def causal(self, strict: bool) -> jax.Array:
        """bool [B, chunks, 1, C, C] (or its last two axes): slot i may see slot j."""
        mask = jnp.tri(CHUNK, k=-1 if strict else 0, dtype=bool)
        return mask if self.run is None else mask & (self.run[..., :, None] == self.run[..., None, :])[:, :, None]

    def keep_first_run(self, x: jax.Array) -> jax.Array:
        """``x`` [B, chunks, H, C, width] with zeros from the first run border on: what the carried state reaches."""
        return x if self.run is None else jnp.where((self.run == 0)[:, :, None, :, None], x, 0)

    def keep_last_run(self, x: jax.Array) -> jax.Array:
        """``x`` [B, chunks, H, C, width] with zeros up to the last run border: what reaches the next chunk."""
        return x if self.run is None else jnp.where((self.run == self.run[..., -1:])[:, :, None, :, None], x, 0)

    def survives(self, decay: jax.Array) -> jax.Array:
        """``decay`` [B, chunks, H, width] of the carried state, zero where a run begins in the chunk."""
        return decay if self.run is None else jnp.where(self.run[:, :, -1][..., None, None] == 0, decay, 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverse(a: jax.Array, masked: int = BLOCK) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A, float32 [..., C, C] with C a power of two, by forward substitution.

    Blocks of 1, 2, 4 ... rows are merged: with X the inverse of the block diagonal and N the blocks below it that the next
    larger blocks take in, the merged inverse is X - X N X. Unlike products of powers of A it does not cancel for repeated
    keys. Blocks of more than ``masked`` rows are cut out; smaller ones are masked in products of full size.
    """
    size = a.shape[-1]
    if size > masked:
        half = size // 2
        upper, lower = a[..., :half, :half], a[..., half:, half:]
        inverse = unit_lower_inverse(jnp.stack([upper, lower]), masked)
        below = -_matmul(_matmul(inverse[1], a[..., half:, :half]), inverse[0])
        rows = [inverse[0], jnp.zeros_like(below)], [below, inverse[1]]
        return jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    inverse = jnp.where(row == column, 1.0, 0.0) - jnp.where(row // 2 == column // 2, a, 0)
    block = 2
    while block < size:
        merged = (row // (2 * block) == column // (2 * block)) & (row // block != column // block)
        inverse = inverse - _matmul(_matmul(inverse, jnp.where(merged, a, 0)), inverse)
        block *= 2
    return inverse


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _inverse_forward(a, masked):
    inverse = unit_lower_inverse(a, masked)
    return inverse, inverse


def _inverse_backward(masked, inverse, cotangent):
    transposed = inverse.mT
    grad = -_matmul(_matmul(transposed, cotangent), transposed)
    return (jnp.where(jnp.tri(inverse.shape[-1], k=-1, dtype=bool), grad, 0),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def decayed_scores(a: jax.Array, b: jax.Array, g: jax.Array | None, mask: jax.Array, dtype) -> jax.Array:
    """P_ij = sum_c a_ic b_jc exp(g_ic - g_jc) where ``mask``, else 0; float32 [B, chunks, H, C, C].

    Args:
      a, b: [B, chunks, H, C, K].
      g: cumulative log-decay, float32 [B, chunks, H, C, 1] a head or [B, chunks, H, C, K] a key; None: no decay.
      mask: bool [..., C, C], lower triangular.
    """
    if g is None or g.shape[-1] == 1:
        scores = _einsum("bnhik,bnhjk->bnhij", a, b, dtype)
        if g is not None:
            difference = jnp.where(mask, g - g.mT, 0)  # masked before exp: above the diagonal it would overflow
            scores = scores * jnp.exp(difference)
        return jnp.where(mask, scores, 0)

    # A decay a key cannot be taken out of the sum as a factor of i times a factor of j (one of the two overflows for
    # strong decays), unless both are taken relative to a point between i and j: block row I uses the decay up to its
    # beginning for all blocks before it; inside a diagonal block the differences themselves are formed.
    def blocks(x):
        return x.reshape(x.shape[:3] + (CHUNK // BLOCK, BLOCK, x.shape[-1]))

    a_block, b_block, g_block = blocks(a.astype(jnp.float32)), blocks(b.astype(jnp.float32)), blocks(g)
    reference = jnp.concatenate([jnp.zeros_like(g_block[:, :, :, :1, 0]), g_block[:, :, :, :-1, -1]], axis=3)
    before = (jnp.arange(CHUNK)[None, :] < BLOCK * jnp.arange(CHUNK // BLOCK)[:, None])[..., None]
    late = jnp.where(before, reference[:, :, :, :, None] - g[:, :, :, None], 0)
    a_late = a_block * jnp.exp(g_block - reference[:, :, :, :, None])
    b_early = jnp.where(before, b[:, :, :, None] * jnp.exp(late), 0)
    scores = _einsum("bnhzik,bnhzjk->bnhzij", a_late, b_early, dtype).reshape(a.shape[:4] + (CHUNK,))

    lower = jnp.tri(BLOCK, dtype=bool)[:, :, None]
    pairwise = jnp.where(lower, g_block[..., :, None, :] - g_block[..., None, :, :], 0)
    diagonal = jnp.sum(a_block[..., :, None, :] * b_block[..., None, :, :] * jnp.exp(pairwise), axis=-1)
    same = jnp.eye(CHUNK // BLOCK, dtype=scores.dtype)
    diagonal = jnp.einsum("bnhzij,zy->bnhziyj", diagonal, same).reshape(scores.shape)
    return jnp.where(mask, scores + diagonal, 0)


def prepare(k, v, g, beta, chunks: Chunks, dtype) -> tuple[jax.Array, jax.Array]:
    """Stage 1: ``u`` [B, chunks, H, C, V] and ``w`` [B, chunks, H, C, K], each chunk by itself."""
    inverse = unit_lower_inverse(beta * decayed_scores(k, k, g, chunks.causal(strict=True), dtype))
    u = _einsum("bnhij,bnhjv->bnhiv", inverse, beta * v, dtype)
    decayed_k = beta * k if g is None else beta * k * jnp.exp(g)
    w = _einsum("bnhij,bnhjk->bnhik", inverse, chunks.keep_first_run(decayed_k), dtype)
    return u, w


def propagate_states(k, u, w, g, chunks: Chunks, segments: Segments, initial_state, dtype):
    """Stage 2: hands each segment's state from chunk to chunk.

    Returns:
      new values n [B, chunks, H, C, V], states before each chunk [B, chunks, H, K, V] and final states [B, S, H, K, V].
    """
    if g is None:
        k_tail, decay = k, jnp.ones(k.shape[:3] + (1,), jnp.float32)
    else:
        k_tail, decay = k * jnp.exp(g[..., -1:, :] - g), jnp.exp(g[..., -1, :])
    k_tail, decay = chunks.keep_last_run(k_tail), chunks.survives(decay)

    def one_row(initial_state, k_tail, u, w, decay, segment, first):
        def chunk(state, xs):
            k_tail, u, w, decay, segment, first = xs
            state = jnp.where(first, initial_state[segment], state)
            new = u if w is None else u - _einsum("hik,hkv->hiv", w, state, dtype)
            state = decay[..., None] * state + _einsum("hik,hiv->hkv", k_tail, new, dtype)
            return state, (new.astype(dtype), state)

        _, (new, after) = lax.scan(
            chunk, jnp.zeros_like(initial_state[0]), (k_tail, u, w, decay, segment, first)
        )  # fmt: skip
        shifted = jnp.roll(after, 1, axis=0)
        return new, jnp.where(first[:, None, None, None], initial_state[segment], shifted), after

    new, before, after = jax.vmap(one_row)(initial_state, k_tail, u, w, decay, chunks.segment, chunks.first)
    last = jnp.maximum(segments.offsets[:, 1:] // CHUNK - 1, 0)
    final = jnp.take_along_axis(after, last[..., None, None, None], axis=1)
    owns_slots = segments.offsets[:, 1:] > segments.offsets[:, :-1]
    return new, before, jnp.where(owns_slots[..., None, None, None], final, initial_state)


def read(q, k, new, g, before, chunks: Chunks, dtype) -> jax.Array:
    """Stage 3: outputs [B, chunks, H, C, V], float32."""
    decayed_q = chunks.keep_first_run(q if g is None else q * jnp.exp(g))
    scores = decayed_scores(q, k, g, chunks.causal(strict=False), dtype)
    carried = _einsum("bnhik,bnhkv->bnhiv", decayed_q, before, dtype)
    return carried + _einsum("bnhij,bnhjv->bnhiv", scores, new, dtype)


def gated_delta_rule(q, k, v, log_decay, beta, *, segments, run_ids, initial_state, scale):
    """See :func:`pallas_kernels.api.gated_delta_rule`; ``beta`` None is linear attention."""
    batch, num_slots = q.shape[:2]
    dtype = v.dtype
    real = segments.is_real(num_slots)
    initial_state = states_or_zeros(initial_state, k, v, segments.num_segments)

    def by_chunk(x):
        """[B, N, H, width] -> float32 [B, chunks, H, C, width], zero in dead slots."""
        x = where_real(real, x).astype(jnp.float32)
        return jnp.moveaxis(x.reshape((batch, -1, CHUNK) + x.shape[2:]), 2, 3)

    q, k, v = by_chunk(q) * scale, by_chunk(k), by_chunk(v)
    g = None
    if log_decay is not None:
        per_key = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        g = jnp.cumsum(by_chunk(per_key), axis=-2)
    chunks = Chunks.of(segments, run_ids, num_slots)
    u, w = (v, None) if beta is None else prepare(k, v, g, by_chunk(beta[..., None]), chunks, dtype)
    new, before, final = propagate_states(k, u, w, g, chunks, segments, initial_state, dtype)
    o = read(q, k, new, g, before, chunks, dtype)
    o = jnp.moveaxis(o, 3, 2).reshape((batch, num_slots) + o.shape[2:3] + o.shape[-1:])
    return where_real(real, o).astype(dtype), final


def linear_attention(q, k, v, log_decay, *, segments, run_ids, initial_state, scale):
    """See :func:`pallas_kernels.api.linear_attention`."""
    return gated_delta_rule(
        q, k, v, log_decay, None, segments=segments, run_ids=run_ids, initial_state=initial_state, scale=scale
    )


final_states = final_states_of(gated_delta_rule)


@jax.custom_vjp
def _chunk_matmul(x, w, segment, used):
    """y[n, b] = x[n, b] @ w[segment[n, b]] for the first ``used`` chunks, zero after them.

    x [chunks, B, C, D], w [S, D, E], segment [chunks, B], used: scalar.
    """

    def chunk(n, y):
        return y.at[n].set(_einsum("bcd,bde->bce", x[n], w[segment[n]], x.dtype).astype(x.dtype))

    return lax.fori_loop(0, used, chunk, jnp.zeros(x.shape[:-1] + w.shape[-1:], x.dtype))


def _chunk_matmul_forward(x, w, segment, used):
    return _chunk_matmul(x, w, segment, used), (x, w, segment, used)


def _chunk_matmul_backward(residuals, dy):
    x, w, segment, used = residuals

    def chunk(n, grads):
        dx, dw = grads
        dx = dx.at[n].set(_einsum("bce,bde->bcd", dy[n], w[segment[n]], x.dtype).astype(x.dtype))
        return dx, dw.at[segment[n]].add(_einsum("bcd,bce->bde", x[n], dy[n], x.dtype))

    dx, dw = lax.fori_loop(0, used, chunk, (jnp.zeros_like(x), jnp.zeros(w.shape, jnp.float32)))
    return dx, dw.astype(w.dtype), None, None


_chunk_matmul.defvjp(_chunk_matmul_forward, _chunk_matmul_backward)


def grouped_matmul(x, weights, *, segments, token_of, slot_of):
    """See :func:`pallas_kernels.api.grouped_matmul`.

    A loop over the chunks that some row uses, for all rows at once: hardly more arithmetic than is useful.
    """
    if token_of is not None:
        x = gather_sum(x, token_of[..., None], slot_of)
    batch, num_slots, width = x.shape
    real = segments.is_real(num_slots)
    chunks = jnp.moveaxis(where_real(real, x).reshape(batch, -1, CHUNK, width), 1, 0)
    used = jnp.max(segments.offsets[:, -1]) // CHUNK
    owner = segments.segment_of(num_slots)[:, ::CHUNK].T
    products = (_chunk_matmul(chunks, w, owner, used) for w in weights)
    return tuple(jnp.moveaxis(y, 0, 1).reshape(batch, num_slots, -1) for y in products)
