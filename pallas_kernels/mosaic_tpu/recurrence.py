"""The recurrences as one kernel, and one for their gradients: a program for every row, some heads, and chunk.

The chunks of a row are worked through in order, backwards for the gradients, by programs that follow one another on the same
core. The state travels between them in the block of the final states (backwards: of the initial states' gradients), which
stays in VMEM for as long as the chunks are of the same segment.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunked import CHUNK, Chunks
from pallas_kernels.mosaic_tpu import chunk
from pallas_kernels.segments import Segments, states_or_zeros, where_real

# Largest state for which a program works on two heads together, whose products then hide each other's latency.
STATE_OF_PAIRS = 256 * 256
VMEM_BYTES = 2**26


class Options(NamedTuple):
    scale: float
    interpret: bool


class Layout(NamedTuple):
    """Where segments, chunks and runs lie.

    Attributes:
      segment: int32 [B, chunks], the segment that owns the chunk.
      offsets: int32 [B, S+1], the segments' first chunks; offsets[b, S] is the first that is not used.
      run: float32 [B, chunks, 1, C], how many runs begin in the chunk up to and including the slot.
    """

    segment: jax.Array
    offsets: jax.Array
    run: jax.Array

    @classmethod
    def of(cls, segments: Segments, run_ids: jax.Array | None, num_slots: int) -> "Layout":
        chunks = Chunks.of(segments, run_ids, num_slots)
        shape = (*chunks.segment.shape, 1, CHUNK)
        run = jnp.zeros(shape, jnp.float32) if chunks.run is None else chunks.run.astype(jnp.float32).reshape(shape)
        return cls(chunks.segment, segments.offsets // CHUNK, run)


class Position(NamedTuple):
    """Of a program's chunk: whether a segment owns it, and whether it is the segment's first or last one."""

    is_owned: jax.Array
    is_first: jax.Array
    is_last: jax.Array

    @classmethod
    def of(cls, segment, offsets, n) -> "Position":
        row, count = pl.program_id(0), offsets.shape[1] - 1
        owner = segment[row, n]
        is_owned = (n >= offsets[row, 0]) & (n < offsets[row, count])
        return cls(is_owned, is_owned & (n == offsets[row, owner]), is_owned & (n + 1 == offsets[row, owner + 1]))


def _heads_step(inputs, state, run, scale):
    """:func:`chunk.step` of several heads; ``inputs``: q, k, v and, where there are any, g and beta, each [heads, ...]."""

    def one_head(state, inputs):
        return chunk.step(state, *(inputs.get(name) for name in ("q", "k", "v", "g", "beta")), run, scale=scale)

    return jax.vmap(one_head)(state, inputs)


def _forward_kernel(segment, offsets, run, inputs, initial_state, outputs, *, scale):
    position = Position.of(segment, offsets, pl.program_id(2))
    state = outputs["final_state"]

    @pl.when(position.is_first)
    def _():
        state[...] = initial_state[...]

    @pl.when(position.is_owned)
    def _():
        if "before" in outputs:
            outputs["before"][...] = state[...].astype(outputs["before"].dtype)
        values = {name: ref[...] for name, ref in inputs.items()}
        state[...], o = _heads_step(values, state[...], run[...], scale)
        outputs["o"][...] = o.astype(outputs["o"].dtype)


def _backward_kernel(segment, offsets, run, inputs, before, do, d_final_state, d_initial_state, grads, *, scale):
    position = Position.of(segment, offsets, pl.num_programs(2) - 1 - pl.program_id(2))

    @pl.when(position.is_last)
    def _():
        d_initial_state[...] = d_final_state[...]

    @pl.when(position.is_owned)
    def _():
        values = {name: ref[...] for name, ref in inputs.items()}
        state = before[...].astype(jnp.float32)
        _, pull = jax.vjp(lambda values, state: _heads_step(values, state, run[...], scale), values, state)
        d_values, d_initial_state[...] = pull((d_initial_state[...], do[...].astype(jnp.float32)))
        for name, grad in grads.items():
            grad[...] = d_values[name]


class Blocks:
    """The grid of a call, and the block of every array in it; chunks in reverse order for the backward pass.

    Chunks past the end have the blocks of the last one that is used: nothing is copied for them.
    """

    def __init__(self, inputs: dict, layout: Layout, state_shape: tuple[int, ...], *, reverse: bool):
        batch, _, heads, key_width, value_width = state_shape
        self.chunks = layout.segment.shape[1]
        self.heads = 2 if heads % 2 == 0 and max(key_width, CHUNK) * value_width <= STATE_OF_PAIRS else 1
        self.grid, self.reverse = (batch, heads // self.heads, self.chunks), reverse
        self.run = pl.BlockSpec((None, None, 1, CHUNK), lambda b, h, n, *where: (b, self._chunk(b, n, *where), 0, 0))
        self.state = pl.BlockSpec((None, None, self.heads, key_width, value_width), self._state_index)
        self.inputs = {name: self.of(x) for name, x in inputs.items()}

    def _chunk(self, b, n, segment, offsets):
        n = self.chunks - 1 - n if self.reverse else n
        return jnp.minimum(n, jnp.maximum(offsets[b, offsets.shape[1] - 1] - 1, 0))

    def _state_index(self, b, h, n, segment, offsets):
        return b, segment[b, self._chunk(b, n, segment, offsets)], h, 0, 0

    def of(self, x) -> pl.BlockSpec:
        """Of an array [B, H, chunks, ...]."""
        shape = (None, self.heads, None, *x.shape[3:])
        zeros = (0,) * len(x.shape[3:])
        return pl.BlockSpec(shape, lambda b, h, n, *where: (b, h, self._chunk(b, n, *where), *zeros))


def _launch(kernel, name, blocks: Blocks, layout: Layout, options: Options, in_specs, out_specs, out_shape, *operands):
    return pl.pallas_call(
        partial(kernel, scale=options.scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=blocks.grid, in_specs=(blocks.run, *in_specs), out_specs=out_specs
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name=name,
        interpret=options.interpret,
    )(*layout, *operands)  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(options: Options, inputs: dict, initial_state, layout: Layout):
    """o [B, H, chunks, C, V], with rubbish in chunks that nobody owns, and final states."""
    return _forward(options, inputs, initial_state, layout, save=False)[0]


def _forward(options, inputs, initial_state, layout, save=True):
    blocks, v = Blocks(inputs, layout, initial_state.shape, reverse=False), inputs["v"]
    shapes = {"o": v, "final_state": initial_state}
    specs = {"o": blocks.of(v), "final_state": blocks.state}
    if save:
        # Products take the state in v's dtype anyway.
        shapes["before"] = jax.ShapeDtypeStruct((*v.shape[:3], *initial_state.shape[3:]), v.dtype)
        specs["before"] = blocks.of(shapes["before"])
    out = _launch(
        _forward_kernel, "recurrence", blocks, layout, options, (blocks.inputs, blocks.state), specs,
        jax.tree.map(_shape, shapes), inputs, initial_state,
    )  # fmt: skip
    final_state = _where_owned(layout, out["final_state"], initial_state)
    return (out["o"], final_state), (inputs, out.get("before"), layout)


def _backward(options, saved, cotangents):
    inputs, before, layout = saved
    do, d_final_state = cotangents
    blocks = Blocks(inputs, layout, d_final_state.shape, reverse=True)
    d_initial_state, grads = _launch(
        _backward_kernel, "recurrence_grad", blocks, layout, options,
        (blocks.inputs, blocks.of(before), blocks.of(do), blocks.state), (blocks.state, blocks.inputs),
        jax.tree.map(_shape, (d_final_state, inputs)), inputs, before, do, d_final_state,
    )  # fmt: skip
    return grads, _where_owned(layout, d_initial_state, d_final_state), None


# optimize_remat: under jax.checkpoint the first forward pass is the function itself, which does not save the states.
_recurrence.defvjp(_forward, _backward, optimize_remat=True)


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _where_owned(layout: Layout, states, otherwise):
    """``states`` [B, S, ...] of segments that own slots, which alone the kernels write; ``otherwise`` of the others."""
    owns_slots = layout.offsets[:, 1:] > layout.offsets[:, :-1]
    return jnp.where(owns_slots[..., None, None, None], states, otherwise)


def gated_delta_rule(q, k, v, log_decay, beta, *, segments: Segments, run_ids, initial_state, scale, interpret):
    """See :func:`pallas_kernels.api.gated_delta_rule`; ``beta`` None is linear attention."""
    batch, num_slots, heads = q.shape[:3]
    real = segments.is_real(num_slots)

    def by_chunk(x):
        """[B, N, H, ...] -> [B, H, chunks, C, ...], zero in dead slots."""
        return jnp.moveaxis(where_real(real, x), 2, 1).reshape(batch, heads, -1, CHUNK, *x.shape[3:])

    inputs = {"q": by_chunk(q), "k": by_chunk(k), "v": by_chunk(v)}
    if log_decay is not None:
        g = jnp.cumsum(by_chunk(log_decay).astype(jnp.float32), axis=3)
        inputs["g"] = g if log_decay.ndim == 4 else g[..., None, :]
    if beta is not None:
        inputs["beta"] = by_chunk(beta).astype(jnp.float32)[..., None, :]
    states = states_or_zeros(initial_state, k, v, segments.num_segments)
    layout = Layout.of(segments, run_ids, num_slots)
    o, final_state = _recurrence(Options(scale, interpret), inputs, states, layout)
    o = jnp.moveaxis(o.reshape(batch, heads, num_slots, -1), 1, 2)
    return where_real(real, o), final_state


def linear_attention(q, k, v, log_decay, *, segments: Segments, run_ids, initial_state, scale, interpret):
    """See :func:`pallas_kernels.api.linear_attention`."""
    return gated_delta_rule(
        q, k, v, log_decay, None, segments=segments, run_ids=run_ids, initial_state=initial_state, scale=scale,
        interpret=interpret,
    )  # fmt: skip
