"""The oracle: every op as a token-by-token ``lax.scan`` of its step (step.py) in float32.

Products are in HIGHEST precision: on GPU and TPU a float32 product is otherwise not float32.
"""

from collections.abc import Callable
from typing import Any

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
    delta_step,
    gated_delta_rule_step,
    router_step,
    short_convolution_step,
    stacked_matmul,
)

State = Any  # a rule's own pytree; for the rules here one array [..., H, K, V]


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


final_states = final_states_of(gated_delta_rule)


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
