"""The recurrences from the kernels of their stages: prepare, spans of scans, gradients (scalar or no decay) and per_key."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.segments import Segments, where_real
from pallas_kernels.triton import per_key, spans
from pallas_kernels.triton.chunks import CHUNK, Decays, Layout
from pallas_kernels.triton.gradients import gradients
from pallas_kernels.triton.prepare import prepare


def _prepare_and_scan(q, k, v, g, beta, initial_state, layout, scale, num_spans, interpret, save):
    scores, inverse = prepare(q, k, g, beta, layout, scale=scale, interpret=interpret)
    out = spans.forward(
        q, k, v, Decays.of(g, layout.run, q.shape[2]), beta, None, scores, inverse, initial_state, layout,
        num_spans=num_spans, scale=scale, save=save, interpret=interpret,
    )  # fmt: skip
    return (out["o"], out["final_state"]), (scores, inverse, out.get("states"), out.get("new"), out["transitions"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _recurrence(q, k, v, g, beta, initial_state, layout: Layout, scale: float, num_spans: int, interpret: bool):
    """o [B,N,H,V] and final states; g, beta: float32 [B,H,N] or None, see chunks.py."""
    return _prepare_and_scan(q, k, v, g, beta, initial_state, layout, scale, num_spans, interpret, save=False)[0]


def _forward(q, k, v, g, beta, initial_state, layout, scale, num_spans, interpret):
    outputs, saved = _prepare_and_scan(q, k, v, g, beta, initial_state, layout, scale, num_spans, interpret, save=True)
    return outputs, (q, k, v, g, beta, layout, *saved)


def _backward(scale, num_spans, interpret, residuals, cotangents):
    q, k, v, g, beta, layout, scores, inverse, states, new, transitions = residuals
    do, d_final_state = cotangents
    decays = Decays.of(g, layout.run, q.shape[2])
    through = spans.backward(
        q, k, decays, beta, None, scores, inverse, do, d_final_state, layout, transitions, num_spans=num_spans,
        scale=scale, interpret=interpret,
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
    return grads["dq"], grads["dk"], dv, grads.get("dg"), dbeta, through["d_initial_state"], None


_recurrence.defvjp(_forward, _backward)


NO_DECAY = Decays(None, None, None)


def _prepare_and_scan_per_key(q, k, v, g, initial_state, layout, scale, num_spans, interpret, save):
    scores, q_carried, k_tail, key_decay = prepared = per_key.prepare(q, k, g, layout, scale=scale, interpret=interpret)
    out = spans.forward(
        q_carried, k_tail, v, NO_DECAY, None, key_decay, scores, None, initial_state, layout,
        num_spans=num_spans, scale=scale, save=save, interpret=interpret,
    )  # fmt: skip
    return (out["o"], out["final_state"]), (prepared, out.get("states"), out["transitions"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _per_key(q, k, v, g, initial_state, layout: Layout, scale: float, num_spans: int, interpret: bool):
    """Linear attention with g, the log-decay a key, cumulative in each chunk, float32 [B,N,H,K]."""
    return _prepare_and_scan_per_key(q, k, v, g, initial_state, layout, scale, num_spans, interpret, save=False)[0]


def _per_key_forward(q, k, v, g, initial_state, layout, scale, num_spans, interpret):
    outputs, saved = _prepare_and_scan_per_key(q, k, v, g, initial_state, layout, scale, num_spans, interpret, save=True)
    return outputs, (q, k, v, g, layout, *saved)


def _per_key_backward(scale, num_spans, interpret, residuals, cotangents):
    q, k, v, g, layout, (scores, q_carried, k_tail, key_decay), states, transitions = residuals
    do, d_final_state = cotangents
    through = spans.backward(
        q_carried, k_tail, NO_DECAY, None, key_decay, scores, None, do, d_final_state, layout, transitions,
        num_spans=num_spans, scale=scale, interpret=interpret,
    )  # fmt: skip
    grads = gradients(
        q_carried, k_tail, v, None, NO_DECAY, None, None, None, states, through["d_states"], do, layout, scale=scale,
        interpret=interpret, per_key=True,
    )  # fmt: skip
    grads = per_key.gradient(
        q, k, g, grads["d_scores"], grads["dq"], grads["dk"], grads["d_key_decay"], layout, scale=scale,
        interpret=interpret,
    )  # fmt: skip
    return grads["dq"], grads["dk"], through["y"], grads["dg"], through["d_initial_state"], None


_per_key.defvjp(_per_key_forward, _per_key_backward)


def gated_delta_rule(
    q, k, v, log_decay, beta, *, segments: Segments, run_ids, initial_state, scale, interpret, num_spans=None
):  # fmt: skip
    """See :func:`pallas_kernels.api.gated_delta_rule`; ``beta`` None is linear attention, ``num_spans`` see spans.py."""
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
    num_spans = num_spans or spans.default_spans(k, v, segments, is_delta=beta is not None)
    return _recurrence(q, k, v, g, beta, initial_state, layout, scale, num_spans, interpret)


def linear_attention(
    q, k, v, log_decay, *, segments: Segments, run_ids, initial_state, scale, interpret, num_spans=None
):  # fmt: skip
    """See :func:`pallas_kernels.api.linear_attention`."""
    if log_decay is None or log_decay.ndim == 3:
        return gated_delta_rule(
            q, k, v, log_decay, None, segments=segments, run_ids=run_ids, initial_state=initial_state, scale=scale,
            interpret=interpret, num_spans=num_spans,
        )  # fmt: skip
    layout = Layout.of(segments, run_ids, q.shape[1])
    by_chunk = where_real(layout.is_real, log_decay).astype(jnp.float32).reshape(q.shape[0], -1, CHUNK, *q.shape[2:])
    g = jnp.cumsum(by_chunk, axis=2).reshape(q.shape)
    num_spans = num_spans or spans.default_spans(k, v, segments, is_delta=False)
    return _per_key(q, k, v, g, initial_state, layout, scale, num_spans, interpret)
