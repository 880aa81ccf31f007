"""Segments that go on from device to device: rows whose tokens lie along a mesh axis, in order.

What a device's part of a segment does to its state is linear, final = A initial + local. As in LASP-2 (arXiv 2502.07563),
where A is a product of decays; for the delta rule it is K x K::

    1 every device     local, from zero, and A, from the identity with v = 0: one pass over its tokens
    2 one all-gather   of local and A; every device joins those before it:  S <- A S + local
    3 every device     its tokens from the state that it found

and backwards likewise, with dS <- A^T dS + local from the last device on. A part without tokens has A = 1. What is of an
older run than a part's first token does not reach it, neither a state nor the inputs of a convolution.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.layer_ops import convolution_history
from pallas_kernels.segments import Segments, states_or_zeros


@partial(jax.tree_util.register_dataclass, data_fields=["keeps", "lengths"], meta_fields=["axis_name"])
@dataclasses.dataclass(frozen=True)
class Handover:
    """How each segment goes on along a mesh axis of P devices; for use inside ``shard_map`` (``check_vma=False``).

    Attributes:
      keeps: bool [P, B, S], whether what comes to a device's part of a segment is of the run of its first token, or only
        passes it by.
      lengths: int32 [P, B, S], tokens of each part; so many that nothing older counts if another run begins in it.
      axis_name: of the mesh axis.
    """

    keeps: Any
    lengths: Any
    axis_name: str

    @classmethod
    def of(cls, segments: Segments, run_ids: Int[Array, "B N"] | None, axis_name: str) -> "Handover":
        """Of this device's segments and runs, which are parts of the same S segments on every device."""
        lengths = segments.lengths
        first = last = jnp.zeros_like(lengths)
        if run_ids is not None:
            starts, most = segments.offsets[:, :-1], run_ids.shape[1] - 1
            first, last = (
                jnp.take_along_axis(run_ids, jnp.clip(slots, 0, most), axis=1) for slots in (starts, starts + lengths - 1)
            )
        parts = lax.all_gather(jnp.stack([lengths, first, last]), axis_name)
        nothing = jnp.iinfo(jnp.int32).min

        def part(run, part):
            lengths, first, last = part
            return jnp.where(lengths > 0, last, run), (lengths == 0) | (run == first) | (run == nothing)

        _, keeps = lax.scan(part, jnp.full(lengths.shape, nothing, jnp.int32), parts)
        lengths, first, last = jnp.moveaxis(parts, 1, 0)
        return cls(keeps, jnp.where((first != last) & (lengths > 0), jnp.iinfo(jnp.int32).max, lengths), axis_name)

    def convolution_history(
        self, x: Float[Array, "B P *C"], segments: Segments, run_ids: Int[Array, "B N"] | None, count: int,
        token_of: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B S past *C"]:  # fmt: skip
        """The ``count`` inputs of every segment before this device's part, which may lie several devices back.

        Args:
          x: slots, or with ``token_of`` tokens, see :func:`pallas_kernels.api.short_convolution`.
        """
        nothing = jnp.zeros((*segments.lengths.shape, count, *x.shape[2:]), x.dtype)
        if count == 0:
            return nothing
        tails = lax.all_gather(convolution_history(x, segments, run_ids, nothing, token_of), self.axis_name)

        def part(history, part):
            tail, keep, lengths = part
            entered = jnp.where(_like(keep, history), history, 0)
            place = jnp.arange(count) + jnp.minimum(lengths, count)[..., None]
            older = jnp.take_along_axis(entered, _like(jnp.minimum(place, count - 1), history), axis=2)
            return jnp.where(_like(place < count, history), older, tail), entered

        _, entered = lax.scan(part, nothing, (tails, self.keeps, self.lengths))
        return entered[lax.axis_index(self.axis_name)]


def _like(x: jax.Array, array: jax.Array) -> jax.Array:
    """With axes of 1 at the end, as many as ``array`` has more."""
    return x.reshape(x.shape + (1,) * (array.ndim - x.ndim))


def _multiply(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def final_states_of(run: Callable) -> Callable:
    """The ``final_states`` of an implementation, made of its recurrence: from initial states that have more columns than v
    the final states, whose additional columns are those of v = 0."""

    def final_states(q, k, v, log_decay, beta, *, initial_state, **how):
        columns = initial_state.shape[4] - v.shape[3]
        v = jnp.pad(v, [(0, 0)] * 3 + [(0, columns)])
        return run(q, k, v, log_decay, beta, initial_state=initial_state, **how)[1]

    return final_states


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_along(
    run: Callable, final_states: Callable, arrays: tuple, initial_state, segments: Segments, run_ids, handover: Handover
):
    """A recurrence whose segments go on along a mesh axis.

    Args:
      run: ``run(*arrays, segments=, run_ids=, initial_state=)`` gives o and the final states float32 [B, S, H, K, V].
      final_states: of the same implementation, see :func:`final_states_of`.
      arrays: q, k, v, the log-decay and, for a delta rule, beta.
      initial_state: of the first device, which is before all others; None: zeros.

    Returns:
      o, and the states after this device's part.
    """
    return _forward(run, final_states, arrays, initial_state, segments, run_ids, handover)[0]


def _forward(run, final_states, arrays, initial_state, segments, run_ids, handover):
    axis = handover.axis_name
    where = {"segments": segments, "run_ids": run_ids}
    q, k, v, log_decay, *beta = arrays
    own, key_width, value_width = lax.axis_index(axis), k.shape[3], v.shape[3]
    initial = jnp.where(own == 0, states_or_zeros(initial_state, k, v, segments.num_segments), 0)
    identity = jnp.broadcast_to(jnp.eye(key_width), (*initial.shape[:-1], key_width))
    starts = jnp.concatenate([initial, identity], axis=-1)
    parts = final_states(q, k, v, log_decay, *beta or (None,), initial_state=starts, **where)
    parts = lax.all_gather(parts, axis)
    local, transitions = parts[..., :value_width], parts[..., value_width:]

    def part(state, part):
        local, transition, keep = part
        entered = jnp.where(_like(keep, state), state, 0)
        return _multiply("bshij,bshjv->bshiv", transition, entered) + local, entered

    _, entered = lax.scan(part, jnp.zeros_like(initial), (local, transitions, handover.keeps))
    out, pull = jax.vjp(lambda arrays, state: run(*arrays, initial_state=state, **where), arrays, initial + entered[own])
    return out, (pull, transitions, handover, own, initial_state is None)


def _backward(run, final_states, saved, cotangents):
    pull, transitions, handover, own, has_none = saved
    do, d_final = cotangents
    local = lax.all_gather(pull((do, d_final))[1], handover.axis_name)

    def part(d_after, part):
        local, transition, keep = part
        d_entered = _multiply("bshji,bshjv->bshiv", transition, d_after) + local
        return jnp.where(_like(keep, d_entered), d_entered, 0), d_after

    _, d_after = lax.scan(part, jnp.zeros_like(d_final), (local, transitions, handover.keeps), reverse=True)
    d_arrays, d_initial = pull((do, d_final + d_after[own]))
    return d_arrays, None if has_none else jnp.where(own == 0, d_initial, 0), None, None, None


run_along.defvjp(_forward, _backward)
