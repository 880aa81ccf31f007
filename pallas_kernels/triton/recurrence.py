"""The recurrences from the kernels of their stages: prepare, scan (in spans.py), gradients; per_key for decays a key."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.handover import final_states_of
from pallas_kernels.segments import Segments, where_real
from pallas_kernels.triton import per_key, spans
from pallas_kernels.triton.chunks import CHUNK, Decays, Layout
from pallas_kernels.triton.gradients import gradients
from pallas_kernels.triton.prepare import prepare
from pallas_kernels.triton.scan import local_states

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


NO_DECAY = Decays(None, None, None)


def _is_per_key(inputs: Inputs) -> bool:
    return inputs.decay is not None and inputs.decay.ndim == 4


def _operands(options: Options, inputs: Inputs) -> tuple:
    """What the scan reads: q, k, v, decays, beta, key decay, scores, inverse."""
    q, k, v, decay, beta, _, scores, inverse, layout = inputs
    if not _is_per_key(inputs):
        return q, k, v, Decays.of(decay, layout.run, q.shape[2]), beta, None, scores, inverse
    scores, q, k, key_decay = per_key.prepare(q, k, decay, layout, scale=options.scale, interpret=options.interpret)
    return q, k, v, NO_DECAY, None, key_decay, scores, None


def _scan(options: Options, inputs: Inputs, save: bool):
    """Outputs, and what the backward pass needs of the forward pass."""
    operands = _operands(options, inputs)
    out = spans.forward(*operands, inputs.initial_state, inputs.layout, **options._asdict(), save=save)
    return (out["o"], out["final_state"]), (inputs, operands, out.get("states"), out.get("new"), out["transitions"])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(options: Options, inputs: Inputs):
    """o [B,N,H,V] and final states."""
    return _scan(options, inputs, save=False)[0]


def _forward(options, inputs):
    return _scan(options, inputs, save=True)


def _backward(options, saved, cotangents):
    inputs, operands, states, new, transitions = saved
    q, k, v, decays, beta, key_decay, scores, inverse = operands
    (do, d_final_state), layout = cotangents, inputs.layout
    how = {"scale": options.scale, "interpret": options.interpret}
    through = spans.backward(
        q, k, decays, beta, key_decay, scores, inverse, do, d_final_state, layout, transitions, **options._asdict(),
        wants_initial=inputs.initial_state is not None,
    )  # fmt: skip
    y, is_per_key = through["y"], _is_per_key(inputs)
    grads = gradients(
        q, k, v, None if is_per_key else inputs.decay, decays, beta, new, y, states, through["d_states"], do, layout,
        per_key=is_per_key, **how,
    )  # fmt: skip
    if is_per_key:
        grads = per_key.gradient(
            inputs.q, inputs.k, inputs.decay, key_decay, grads["d_scores"], grads["dq"], grads["dk"],
            grads["d_key_decay"], layout, **how,
        )  # fmt: skip
    dv, dbeta = y, None
    if beta is not None:
        y, by_slot = y.astype(jnp.float32), jnp.moveaxis(beta, 1, 2)[..., None]
        dv = (by_slot * y).astype(v.dtype)
        dbeta = grads["dbeta"] + jnp.moveaxis(jnp.sum(where_real(layout.is_real, v) * y, axis=-1), 2, 1)
    nothing = jax.tree.map(lambda _: None, inputs)
    return (
        nothing._replace(
            q=grads["dq"], k=grads["dk"], v=dv, decay=grads.get("d_log_decay" if is_per_key else "dg"), beta=dbeta,
            initial_state=through.get("d_initial_state"),
        ),
    )  # fmt: skip


# optimize_remat: under jax.checkpoint the first forward pass is the function itself, which does not save the states.
_recurrence.defvjp(_forward, _backward, optimize_remat=True)


def _prepare(q, k, log_decay, beta, segments: Segments, run_ids, scale, interpret):
    """The layout, and as the kernels take them the cumulative log-decay, beta, and P and T."""
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
    return layout, g, beta, checkpoint_name(matrices, CHUNK_MATRICES)


def gated_delta_rule(
    q, k, v, log_decay, beta, *, segments: Segments, run_ids, initial_state, scale, interpret, num_spans=None
):  # fmt: skip
    """See :func:`pallas_kernels.api.gated_delta_rule`; ``beta`` None is linear attention, ``num_spans`` see spans.py."""
    layout, g, beta, matrices = _prepare(q, k, log_decay, beta, segments, run_ids, scale, interpret)
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
    return _recurrence(Options(scale, num_spans, interpret), inputs)


def final_states(q, k, v, log_decay, beta, *, segments: Segments, run_ids, initial_state, scale, interpret):
    """See :func:`pallas_kernels.handover.final_states_of`: a scan that only follows the state."""
    if log_decay is not None and log_decay.ndim == 4:
        return final_states_of(lambda *arrays, **how: linear_attention(*arrays[:-1], **how))(
            q, k, v, log_decay, beta, segments=segments, run_ids=run_ids, initial_state=initial_state, scale=scale,
            interpret=interpret,
        )  # fmt: skip
    layout, g, beta, (_, inverse) = _prepare(q, k, log_decay, beta, segments, run_ids, scale, interpret)
    lengths = jnp.broadcast_to(layout.lengths[:, None], (len(q), q.shape[2], layout.lengths.shape[1]))
    decays = Decays.of(g, layout.run, q.shape[2])
    return local_states(k, v, decays, beta, None, inverse, initial_state, lengths, layout, interpret=interpret)
