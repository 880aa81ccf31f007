"""The oracle: every op as a token-by-token ``lax.scan`` in float32, and the steps of the update rules.

A *step* takes one token into one memory and reads it. Steps work on any leading axes, so that decoding uses the same
function that defines the op. Products are in HIGHEST precision: on GPU and TPU a float32 product is otherwise not
float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cross_entropy import linear_cross_entropy  # noqa: F401
from pallas_kernels.gather import gather_sum
from pallas_kernels.layer_ops import combine_gated_rms_norm, short_convolution  # noqa: F401
from pallas_kernels.segments import Segments, states_or_zeros, where_real

State = Any  # a rule's own pytree; for the rules here one array [..., H, K, V]


def delta_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One token of the gated delta rule (arXiv 2412.06464, eq. 10), or of linear attention where ``beta`` is None::

        S <- a S;   S <- S + k (b (v - S^T k))^T   or   S <- S + k v^T;   o = S^T q

    Args:
      state: float32 [..., H, K, V].
      q, k: [..., H, K]; q is already scaled.
      v: [..., H, V].
      log_decay: log a, [..., H] a head or [..., H, K] a key; None: no decay.
      beta: b, [..., H]; None: no erasing.

    Returns:
      The new state and the output, float32 [..., H, V].
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(jnp.float32))
        state = state * (decay[..., None] if decay.ndim == k.ndim else decay[..., None, None])
    if beta is not None:
        erased = jnp.einsum("...kv,...k->...v", state, k, precision=lax.Precision.HIGHEST)
        v = beta.astype(jnp.float32)[..., None] * (v - erased)
    state = state + k[..., None] * v[..., None, :]
    return state, jnp.einsum("...kv,...k->...v", state, q, precision=lax.Precision.HIGHEST)


def scan_segments(
    step: Callable[..., tuple[State, jax.Array]],
    inputs: tuple,
    segments: Segments,
    run_ids: jax.Array | None,
    initial_state: State,
) -> tuple[jax.Array, State]:
    """Runs ``step(state, *inputs)`` over the slots of every row, each segment with its own state.

    Args:
      inputs: arrays [B, N, ...] (or None), handed to the step a token at a time.
      initial_state: pytree with leading [B, S].

    Returns:
      Outputs [B, N, ...], zero in dead slots, and the final state.
    """
    num_slots = inputs[0].shape[1]
    real = segments.is_real(num_slots)
    restart = jnp.zeros_like(real) if run_ids is None else segments.starts_run(run_ids)
    inputs = jax.tree.map(lambda x: where_real(real, x), inputs)

    def row(states, inputs, segment, real, restart):
        def slot(states, xs):
            inputs, segment, real, restart = xs
            old = jax.tree.map(lambda s: s[segment], states)
            new, output = step(jax.tree.map(lambda s: jnp.where(restart, 0, s), old), *inputs)
            states = jax.tree.map(lambda s, n, o: s.at[segment].set(jnp.where(real, n, o)), states, new, old)
            return states, jnp.where(real, output, 0)

        return lax.scan(slot, states, (inputs, segment, real, restart))

    final, outputs = jax.vmap(row)(initial_state, inputs, segments.segment_of(num_slots), real, restart)
    return outputs, final


def gated_delta_rule(q, k, v, log_decay, beta, *, segments, run_ids, initial_state, scale):
    """See :func:`pallas_kernels.api.gated_delta_rule`."""
    inputs = (q.astype(jnp.float32) * scale, k, v, log_decay, beta)
    states = states_or_zeros(initial_state, k, v, segments.num_segments)
    outputs, final = scan_segments(delta_step, inputs, segments, run_ids, states)
    return outputs.astype(v.dtype), final


def linear_attention(q, k, v, log_decay, *, segments, run_ids, initial_state, scale):
    """See :func:`pallas_kernels.api.linear_attention`."""
    return gated_delta_rule(
        q, k, v, log_decay, None, segments=segments, run_ids=run_ids, initial_state=initial_state, scale=scale
    )


def grouped_matmul(x, weights, *, segments, token_of, slot_of):
    """See :func:`pallas_kernels.api.grouped_matmul`. Multiplies every slot by every matrix: S times the useful work."""
    if token_of is not None:
        x = gather_sum(x, token_of[..., None], slot_of)
    num_slots = x.shape[1]
    x32 = where_real(segments.is_real(num_slots), x).astype(jnp.float32)

    def multiply(w):
        choice = jax.nn.one_hot(segments.segment_of(num_slots), w.shape[0], dtype=jnp.float32)
        y = jnp.einsum("bnd,sde,bns->bne", x32, w.astype(jnp.float32), choice, precision=lax.Precision.HIGHEST)
        return y.astype(x.dtype)

    return tuple(multiply(w) for w in weights)
