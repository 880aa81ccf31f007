"""The recurrences from the kernels of their stages: prepare, scan, gradients (scalar or no decay) and per_key."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.segments import Segments, where_real
from pallas_kernels.triton import per_key, scan
from pallas_kernels.triton.chunks import CHUNK, Decays, Layout
from pallas_kernels.triton.gradients import gradients
from pallas_kernels.triton.prepare import prepare

CHUNK_MATRICES = "chunk_matrices"  # the name of P and T for policies of jax.checkpoint


def _scan(q, k, v, g, beta, initial_state, scores, inverse, layout, scale, interpret, save):
    out = scan.forward(
        q, k, v, Decays.of(g, layout.run, q.shape[2]), beta, None, scores, inverse, initial_state, layout, scale=scale,
        save=save, interpret=interpret,
    )  # fmt: skip
    return (out["o"], out["final_state"]), (out.get("states"), out.get("new"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _recurrence(q, k, v, g, beta, initial_state, scores, inverse, layout: Layout, scale: float, interpret: bool):
    """o [B,N,H,V] and final states; g, beta: float32 [B,H,N] or None, see chunks.py.

    The gradients of q, k, g and beta hold what flows through scores and inverse, whose own are zero.
    """
    return _scan(q, k, v, g, beta, initial_state, scores, inverse, layout, scale, interpret, save=False)[0]


def _forward(q, k, v, g, beta, initial_state, scores, inverse, layout, scale, interpret):
    outputs, saved = _scan(q, k, v, g, beta, initial_state, scores, inverse, layout, scale, interpret, save=True)
    return outputs, (q, k, v, g, beta, layout, scores, inverse, *saved)


def _backward(scale, interpret, residuals, cotangents):
    q, k, v, g, beta, layout, scores, inverse, states, new = residuals
    do, d_final_state = cotangents
    decays = Decays.of(g, layout.run, q.shape[2])
    through = scan.backward(
        q, k, decays, beta, None, scores, inverse, do, d_final_state, layout, scale=scale, interpret=interpret
    )  # fmt: skip
    y, d_states = through["y"], through["d_states"]
    grads = gradients(
        q, k, v, g, decays, beta, new, y, states, d_states, do, layout, scale=scale, interpret=interpret
    )  # fmt: skip
    dv, dbeta = y, None
    if beta is not None:
        y, by_slot = y.astype(jnp.float32), jnp.moveaxis(beta, 1, 2)[..., None]
        dv = (by_slot * y).astype(v.dtype)
        dbeta = grads["dbeta"] + jnp.moveaxis(jnp.sum(where_real(layout.is_real, v) * y, axis=-1), 2, 1)
    return grads["dq"], grads["dk"], dv, grads.get("dg"), dbeta, through["d_initial_state"], None, None, None


# optimize_remat: under jax.checkpoint the first forward pass is the function itself, which does not save the states.
_recurrence.defvjp(_forward, _backward, optimize_remat=True)


NO_DECAY = Decays(None, None, None)


def _prepare_and_scan_per_key(q, k, v, log_decay, initial_state, layout, scale, interpret, save):
    scores, q_carried, k_tail, key_decay = prepared = per_key.prepare(
        q, k, log_decay, layout, scale=scale, interpret=interpret
    )
    out = scan.forward(
        q_carried, k_tail, v, NO_DECAY, None, key_decay, scores, None, initial_state, layout, scale=scale, save=save,
        interpret=interpret,
    )  # fmt: skip
    return (out["o"], out["final_state"]), (prepared, out.get("states"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _per_key(q, k, v, log_decay, initial_state, layout: Layout, scale: float, interpret: bool):
    """Linear attention with a log-decay a key, float32 [B,N,H,K]."""
    return _prepare_and_scan_per_key(q, k, v, log_decay, initial_state, layout, scale, interpret, save=False)[0]


def _per_key_forward(q, k, v, log_decay, initial_state, layout, scale, interpret):
    outputs, saved = _prepare_and_scan_per_key(q, k, v, log_decay, initial_state, layout, scale, interpret, save=True)
    return outputs, (q, k, v, log_decay, layout, *saved)


def _per_key_backward(scale, interpret, residuals, cotangents):
    q, k, v, log_decay, layout, (scores, q_carried, k_tail, key_decay), states = residuals
    do, d_final_state = cotangents
    through = scan.backward(
        q_carried, k_tail, NO_DECAY, None, key_decay, scores, None, do, d_final_state, layout, scale=scale,
        interpret=interpret,
    )  # fmt: skip
    grads = gradients(
        q_carried, k_tail, v, None, NO_DECAY, None, None, None, states, through["d_states"], do, layout, scale=scale,
        interpret=interpret, per_key=True,
    )  # fmt: skip
    grads = per_key.gradient(
        q, k, log_decay, key_decay, grads["d_scores"], grads["dq"], grads["dk"], grads["d_key_decay"], layout,
        scale=scale, interpret=interpret,
    )  # fmt: skip
    return grads["dq"], grads["dk"], through["y"], grads["d_log_decay"], through["d_initial_state"], None


_per_key.defvjp(_per_key_forward, _per_key_backward, optimize_remat=True)


def gated_delta_rule(q, k, v, log_decay, beta, *, segments: Segments, run_ids, initial_state, scale, interpret):
    """See :func:`pallas_kernels.api.gated_delta_rule`; ``beta`` None is linear attention."""
    batch, num_slots, heads = q.shape[:3]
    real = segments.is_real(num_slots)

    def by_head(x):
        """[B, N, H] -> float32 [B, H, N], zero in dead slots."""
        return jnp.moveaxis(where_real(real, x).astype(jnp.float32), 2, 1)

    layout = Layout.of(segments, run_ids, num_slots)
    g = None
    if log_decay is not None:
        by_chunk = by_head(log_decay).reshape(batch, heads, -1, CHUNK)
        g = jnp.cumsum(by_chunk, axis=-1).reshape(batch, heads, num_slots)
    beta = None if beta is None else by_head(beta)
    # Outside of what is differentiated, and named, so that a policy of jax.checkpoint can save them: they are small.
    matrices = prepare(*jax.lax.stop_gradient((q, k, g, beta)), layout, scale=scale, interpret=interpret)
    matrices = checkpoint_name(matrices, CHUNK_MATRICES)
    return _recurrence(q, k, v, g, beta, initial_state, *matrices, layout, scale, interpret)


def linear_attention(q, k, v, log_decay, *, segments: Segments, run_ids, initial_state, scale, interpret):
    """See :func:`pallas_kernels.api.linear_attention`."""
    if log_decay is None or log_decay.ndim == 3:
        return gated_delta_rule(
            q, k, v, log_decay, None, segments=segments, run_ids=run_ids, initial_state=initial_state, scale=scale,
            interpret=interpret,
        )  # fmt: skip
    layout = Layout.of(segments, run_ids, q.shape[1])
    return _per_key(q, k, v, log_decay.astype(jnp.float32), initial_state, layout, scale, interpret)
