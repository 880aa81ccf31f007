"""The recurrences from the kernels of their stages: prepare, scan (in spans.py), gradients; per_key for decays a key."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.segments import Segments, where_real
from pallas_kernels.triton import per_key, spans
from pallas_kernels.triton.chunks import CHUNK, Decays, Layout
from pallas_kernels.triton.gradients import gradients
from pallas_kernels.triton.prepare import prepare

CHUNK_MATRICES = "chunk_matrices"  # the name of P and T for policies of jax.checkpoint


class Options(NamedTuple):
    scale: float
    num_spans: int
    interpret: bool


class Inputs(NamedTuple):
    """Arrays of a recurrence; None is absent.

    Attributes:
      q, k: [B, N, H, K]. v: [B, N, H, V].
      decay: the log-decay; a head: float32 [B, H, N], cumulative in each chunk; a key: float32 [B, N, H, K], of each token.
      beta: float32 [B, H, N].
      initial_state: float32 [B, S, H, K, V].
      scores, inverse: P and T, see prepare.py; what flows through them is in the gradients of q, k, decay and beta.
      layout: where segments, chunks and runs lie.
    """

    q: Any
    k: Any
    v: Any
    decay: Any
    beta: Any
    initial_state: Any
    scores: Any
    inverse: Any
    layout: Layout


def _no_gradients(inputs: Inputs) -> Inputs:
    return jax.tree.map(lambda _: None, inputs)


def _scan(options: Options, inputs: Inputs, save: bool):
    q, k, v, g, beta, initial_state, scores, inverse, layout = inputs
    out = spans.forward(
        q, k, v, Decays.of(g, layout.run, q.shape[2]), beta, None, scores, inverse, initial_state, layout,
        **options._asdict(), save=save,
    )  # fmt: skip
    return (out["o"], out["final_state"]), (out.get("states"), out.get("new"), out["transitions"])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(options: Options, inputs: Inputs):
    """o [B,N,H,V] and final states."""
    return _scan(options, inputs, save=False)[0]


def _forward(options, inputs):
    outputs, saved = _scan(options, inputs, save=True)
    return outputs, (inputs, saved)


def _backward(options, residuals, cotangents):
    inputs, (states, new, transitions) = residuals
    q, k, v, g, beta, initial_state, scores, inverse, layout = inputs
    do, d_final_state = cotangents
    decays = Decays.of(g, layout.run, q.shape[2])
    through = spans.backward(
        q, k, decays, beta, None, scores, inverse, do, d_final_state, layout, transitions, **options._asdict(),
        wants_initial=initial_state is not None,
    )  # fmt: skip
    y, d_states = through["y"], through["d_states"]
    grads = gradients(
        q, k, v, g, decays, beta, new, y, states, d_states, do, layout, scale=options.scale, interpret=options.interpret
    )  # fmt: skip
    dv, dbeta = y, None
    if beta is not None:
        y, by_slot = y.astype(jnp.float32), jnp.moveaxis(beta, 1, 2)[..., None]
        dv = (by_slot * y).astype(v.dtype)
        dbeta = grads["dbeta"] + jnp.moveaxis(jnp.sum(where_real(layout.is_real, v) * y, axis=-1), 2, 1)
    return (
        _no_gradients(inputs)._replace(
            q=grads["dq"], k=grads["dk"], v=dv, decay=grads.get("dg"), beta=dbeta,
            initial_state=through.get("d_initial_state"),
        ),
    )  # fmt: skip


# optimize_remat: under jax.checkpoint the first forward pass is the function itself, which does not save the states.
_recurrence.defvjp(_forward, _backward, optimize_remat=True)


NO_DECAY = Decays(None, None, None)


def _prepare_and_scan_per_key(options: Options, inputs: Inputs, save: bool):
    scores, q_carried, k_tail, key_decay = prepared = per_key.prepare(
        inputs.q, inputs.k, inputs.decay, inputs.layout, scale=options.scale, interpret=options.interpret
    )
    out = spans.forward(
        q_carried, k_tail, inputs.v, NO_DECAY, None, key_decay, scores, None, inputs.initial_state, inputs.layout,
        **options._asdict(), save=save,
    )  # fmt: skip
    return (out["o"], out["final_state"]), (prepared, out.get("states"), out["transitions"])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_key(options: Options, inputs: Inputs):
    """Linear attention with a log-decay a key."""
    return _prepare_and_scan_per_key(options, inputs, save=False)[0]


def _per_key_forward(options, inputs):
    outputs, saved = _prepare_and_scan_per_key(options, inputs, save=True)
    return outputs, (inputs, saved)


def _per_key_backward(options, residuals, cotangents):
    inputs, ((scores, q_carried, k_tail, key_decay), states, transitions) = residuals
    (do, d_final_state), layout = cotangents, inputs.layout
    how = {"scale": options.scale, "interpret": options.interpret}
    through = spans.backward(
        q_carried, k_tail, NO_DECAY, None, key_decay, scores, None, do, d_final_state, layout, transitions,
        **options._asdict(), wants_initial=inputs.initial_state is not None,
    )  # fmt: skip
    grads = gradients(
        q_carried, k_tail, inputs.v, None, NO_DECAY, None, None, None, states, through["d_states"], do, layout,
        per_key=True, **how,
    )  # fmt: skip
    grads = per_key.gradient(
        inputs.q, inputs.k, inputs.decay, key_decay, grads["d_scores"], grads["dq"], grads["dk"], grads["d_key_decay"],
        layout, **how,
    )  # fmt: skip
    return (
        _no_gradients(inputs)._replace(
            q=grads["dq"], k=grads["dk"], v=through["y"], decay=grads["d_log_decay"],
            initial_state=through.get("d_initial_state"),
        ),
    )  # fmt: skip


_per_key.defvjp(_per_key_forward, _per_key_backward, optimize_remat=True)


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
    # Outside of what is differentiated, and named, so that a policy of jax.checkpoint can save them: they are small.
    matrices = prepare(*jax.lax.stop_gradient((q, k, g, beta)), layout, scale=scale, interpret=interpret)
    matrices = checkpoint_name(matrices, CHUNK_MATRICES)
    num_spans = num_spans or spans.default_spans(k, v, segments, is_delta=beta is not None)
    return _recurrence(Options(scale, num_spans, interpret), Inputs(q, k, v, g, beta, initial_state, *matrices, layout))


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
    num_spans = num_spans or spans.default_spans(k, v, segments, is_delta=False)
    inputs = Inputs(q, k, v, log_decay.astype(jnp.float32), None, initial_state, None, None, layout)
    return _per_key(Options(scale, num_spans, interpret), inputs)
