"""The memory-bound ops around the recurrences, in plain JAX: norms, the short convolution, the combination of memories."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.gather import gather_sum
from pallas_kernels.segments import Segments


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; the result is of x's dtype (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


L2_EPS = 1e-6


def l2_norm(x: Float[Array, "*B K"], eps: float = L2_EPS) -> Float[Array, "*B K"]:
    """x / sqrt(sum(x^2) + eps) over the last axis, in float32; the result is of x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def short_convolution(
    x, weight, bias, segments: Segments, run_ids, history, *, normalize=False, token_of=None, slot_of=None
):
    """See :func:`pallas_kernels.api.short_convolution`. Dead slots come out with rubbish."""
    if token_of is not None:
        x = gather_sum(x, token_of[..., None], slot_of)
    num_slots, width = x.shape[1], weight.shape[0]
    trailing = (1,) * (x.ndim - 2)
    rank = segments.rank(num_slots)
    run = None if run_ids is None else jnp.cumsum(segments.starts_run(run_ids), axis=1)
    x32 = x.astype(jnp.float32)
    y = x32 * weight[-1]
    for tap in range(1, width):
        # Inside a segment runs only grow, and a segment's first token never begins one: equal counts, same run.
        valid = rank >= tap
        if run is not None:
            valid &= run == _later(run, tap)
        y += jnp.where(valid.reshape(valid.shape + trailing), _later(x32, tap), 0) * weight[-1 - tap]
    if history is not None and width > 1:
        y = _add_history(y, weight, segments, run, history)
    if bias is not None:
        y += bias
    y = jax.nn.silu(y).astype(x.dtype)
    return l2_norm(y) if normalize else y


def _later(x, slots):
    """``x`` [B, N, ...] moved on by some slots; a padding, which XLA fuses with what uses it, unlike a roll."""
    slots = min(slots, x.shape[1])
    return jnp.pad(x[:, : x.shape[1] - slots], [(0, 0), (slots, 0)] + [(0, 0)] * (x.ndim - 2))


def _add_history(y, weight, segments, run, history):
    """Adds to the first W-1 slots of every segment what the tokens before the segment give them."""
    width, num_slots = weight.shape[0], y.shape[1]
    history = history.astype(jnp.float32)
    early = [
        sum(weight[-1 - tap] * history[:, :, width - 1 + rank - tap] for tap in range(rank + 1, width))
        for rank in range(width - 1)
    ]
    ranks = jnp.arange(width - 1, dtype=jnp.int32)
    slots = segments.offsets[:, :-1, None] + ranks
    reached = ranks < segments.lengths[..., None]
    if run is not None:
        before = jnp.take_along_axis(run, jnp.minimum(segments.offsets[:, :-1], num_slots - 1), axis=1)
        at = jnp.take_along_axis(run, jnp.minimum(slots, num_slots - 1).reshape(run.shape[0], -1), axis=1)
        reached &= at.reshape(slots.shape) == before[..., None]
    slots = jnp.where(reached, slots, num_slots)  # beyond the row: dropped

    def row(y, slots, early):
        return y.at[slots].add(early, mode="drop", unique_indices=False)

    return jax.vmap(row)(y, slots, jnp.stack(early, axis=2))


def convolution_history(
    x: Float[Array, "B P *C"],
    segments: Segments,
    run_ids: Int[Array, "B N"] | None,
    history: Float[Array, "B S past *C"],
    token_of: Int[Array, "B N"] | None = None,
) -> Float[Array, "B S past *C"]:
    """The last W-1 inputs of every segment, older ``history`` included, zero where they are of an older run.

    Args:
      x: slots; with ``token_of`` tokens, of which each slot n takes row token_of[n].
    """
    count, num_slots = history.shape[2], x.shape[1] if token_of is None else token_of.shape[1]
    if count == 0:
        return history
    lengths = segments.lengths[..., None]
    place = lengths - count + jnp.arange(count)  # rank in the segment; negative: in the old history
    slots = jnp.clip(segments.offsets[:, :-1, None] + place, 0, num_slots - 1)
    is_new, is_old = place >= 0, place < 0
    if run_ids is not None:
        run = jnp.cumsum(segments.starts_run(run_ids), axis=1)

        def run_at(slots):
            return jax.vmap(lambda run, slots: run[slots])(run, jnp.clip(slots, 0, num_slots - 1))

        first = run_at(segments.offsets[:, :-1, None])
        last = run_at(segments.offsets[:, :-1, None] + lengths - 1)
        is_new &= run_at(slots) == last
        is_old &= (first == last) | (lengths == 0)

    if token_of is not None:
        slots = jax.vmap(lambda token_of, slots: token_of.at[slots].get(mode="clip"))(token_of, slots)

    def row(x, history, slots, place, is_new, is_old):
        shape = is_new.shape + (1,) * (x.ndim - 1)
        old = jax.vmap(lambda history, place: history[place])(history, jnp.clip(place + count, 0, count - 1))
        new = x[slots].astype(history.dtype)
        return jnp.where(is_new.reshape(shape), new, jnp.where(is_old.reshape(shape), old, 0))

    return jax.vmap(row)(x, history, slots, place, is_new, is_old)


def gated_rms_norm(
    o: Float[Array, "*B V"], gate: Float[Array, "*B V"] | None, scale: Float[Array, "V"], eps: float
) -> Float[Array, "*B V"]:
    """rms_norm(o) * silu(gate), of o's dtype; ``gate`` None: no gate."""
    o = rms_norm(o, scale, eps)
    return o if gate is None else o * jax.nn.silu(gate)


def route(
    logits: Float[Array, "*B M"], bias: Float[Array, "M"] | None, top_k: int, has_shared: bool
) -> tuple[Int[Array, "*B R"], Float[Array, "*B R"], Float[Array, "*B M"]]:
    """The memories of a token, their weights, and p = softmax(logits), in float32.

    The ``top_k`` with the largest p + ``bias``, of equal ones the first; weights are p renormalised over them. With
    ``has_shared`` memory M comes last, with weight 1.
    """
    num_memories = logits.shape[-1]
    probabilities = jax.nn.softmax(logits, axis=-1)
    rest, memories = lax.stop_gradient(probabilities if bias is None else probabilities + bias), []
    rest = jnp.maximum(rest, jnp.finfo(rest.dtype).min)  # above those that are taken already, whatever the bias
    for _ in range(top_k):  # lax.top_k would gather the rows of all devices
        memories.append(jnp.argmax(rest, axis=-1))
        rest = jnp.where(memories[-1][..., None] == jnp.arange(num_memories), -jnp.inf, rest)
    memories = jnp.stack(memories, axis=-1)
    is_chosen = memories[..., None] == jnp.arange(num_memories)  # [..., R, M]
    # A masked sum instead of a gather: its gradient is no scatter.
    # A softmax over the chosen logits is the renormalised choice of p, without dividing by a sum that may underflow.
    weights = jax.nn.softmax(jnp.sum(jnp.where(is_chosen, logits[..., None, :], 0), axis=-1), axis=-1)
    memories = memories.astype(jnp.int32)
    if has_shared:
        last = [(0, 0)] * (logits.ndim - 1) + [(0, 1)]
        memories = jnp.pad(memories, last, constant_values=num_memories)
        weights = jnp.pad(weights, last, constant_values=1.0)
    return memories, weights, probabilities


def combine(
    o: Float[Array, "B N H V"], weights: Float[Array, "B T R"], *, slot_of, token_of, choice_of
) -> Float[Array, "B T H V"]:
    """The weighted sum of each token's slots; see :func:`pallas_kernels.api.combine`."""
    batch = weights.shape[0]
    weights = gather_sum(weights.reshape(batch, -1), choice_of[..., None], slot_of.reshape(batch, -1, 1))
    o = (o.astype(jnp.float32) * weights[..., None, None]).astype(o.dtype)
    return gather_sum(o, slot_of, token_of[..., None])


def combine_gated_rms_norm(o, weights, gate, scale, eps, **where):
    """See :func:`pallas_kernels.api.combine_gated_rms_norm`."""
    return gated_rms_norm(combine(o, weights, **where), gate, scale, eps)
