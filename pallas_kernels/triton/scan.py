"""Stage 2 of the recurrences: the states, handed from chunk to chunk, and the outputs (forward) or the values' gradients.

With S the state before a chunk and the factors of :class:`chunks.Decays` (c carried, t tail, s state)::

    forward     n = T (b (v - c k S))        o = scale c q S + P n         S <- s S + k^T (t n)
    backward    dn = P^T do + t k dS         y = T^T dn                    dS <- s dS + q^T (scale c do) - k^T (b c y)

dS is the gradient of the state after the chunk, y that of b v. Linear attention has n = v and y = dn = dv. Nothing of
T (b v) and T (b k exp g), the usual u and w, is ever stored: n and y take their place.

A program owns one segment, one head and a tile of V, and keeps its tile of the state, float32 [K, tile], in registers.
Outputs that are not wanted are not computed: for spans.py both kernels only follow the state.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import CHUNK, Layout, load_rows, load_vector, scale_rows, tile_of
from pallas_kernels.triton.launch import KernelConfig, dot, launch


def default_config(dtype, key_width: int) -> KernelConfig:
    """The fastest of those tried on an H200 in bfloat16; in float32 what fits into its shared memory."""
    if dtype == jnp.float32 and key_width >= 128:
        return KernelConfig(tile=32, num_warps=4, num_stages=1)
    return KernelConfig(tile=64, num_warps=4, num_stages=3 if dtype == jnp.bfloat16 and key_width <= 128 else 2)


def _decayed(state, inputs, chunk):
    """The state's own way through a chunk."""
    if inputs["key_decay"] is not None:
        state = state * inputs["key_decay"][chunk, :][:, None]
    return state if inputs["state"] is None else inputs["state"][chunk] * state


def _clear_unowned(inputs, output, segment, begin, end):
    """Zeros in the chunks of ``output`` that nobody owns, or in which the segment has no token.

    The first segment clears those before it, every segment those up to its successor.
    """

    def clear(chunk, _):
        output[pl.ds(chunk * CHUNK, CHUNK), :] = jnp.zeros((CHUNK, output.shape[1]), output.dtype)

    is_last = segment == inputs["lengths"].shape[0] - 1
    lax.fori_loop(0, jnp.where(segment == 0, begin, 0), clear, None)
    after = jnp.where(is_last, inputs["valid"].shape[0], inputs["offsets"][segment + 1] // CHUNK)
    lax.fori_loop(end, after, clear, None)


def _first_state(inputs, segment):
    if inputs["initial_state"] is None:
        return jnp.zeros((inputs["k"].shape[1], inputs["v"].shape[1]), jnp.float32)
    return inputs["initial_state"][segment, :, :]


def _forward_kernel(inputs, outputs, *, scale, dtype):
    segment = pl.program_id(2)
    begin, length = inputs["offsets"][segment] // CHUNK, inputs["lengths"][segment]
    is_transition = None  # whether the tile is one of the transition's columns, which nothing is written to
    if inputs["transition_lengths"] is not None:
        key_tiles = inputs["k"].shape[1] // inputs["v"].shape[1]
        is_transition = pl.program_id(0) >= pl.num_programs(0) - key_tiles
        length = jnp.where(is_transition, inputs["transition_lengths"][segment], length)
    end = begin + pl.cdiv(length, CHUNK)

    def one_chunk(chunk, state):
        rows = pl.ds(chunk * CHUNK, CHUNK)
        valid = jnp.minimum(length - (chunk - begin) * CHUNK, CHUNK)
        carried, tail = load_vector(inputs["carried"], chunk), load_vector(inputs["tail"], chunk)
        k = load_rows(inputs["k"], chunk, valid)
        new = load_rows(inputs["v"], chunk, valid if is_transition is None else jnp.where(is_transition, 0, valid))
        before = state.astype(dtype)
        if "states" in outputs:
            outputs["states"][chunk, :, :] = before
        if inputs["inverse"] is not None:
            error = new.astype(jnp.float32) - scale_rows(dot(k, before, dtype), carried)
            beta = load_vector(inputs["beta"], chunk)
            new = dot(inputs["inverse"][rows, :], scale_rows(error, beta), dtype)
            if "new" in outputs:
                outputs["new"][rows, :] = new.astype(dtype)
        if "o" in outputs:
            read = scale_rows(dot(load_rows(inputs["q"], chunk, valid), before, dtype), carried, scale)
            outputs["o"][rows, :] = (read + dot(inputs["scores"][rows, :], new, dtype)).astype(dtype)
        return _decayed(state, inputs, chunk) + dot(k.T, scale_rows(new, tail), dtype)

    state = lax.fori_loop(begin, end, one_chunk, _first_state(inputs, segment))
    outputs["final_state"][segment, :, :] = state
    if "o" in outputs:
        _clear_unowned(inputs, outputs["o"], segment, begin, end)


def _backward_kernel(inputs, outputs, *, scale, dtype):
    segment = pl.program_id(2)
    begin, length = inputs["offsets"][segment] // CHUNK, inputs["lengths"][segment]
    count = pl.cdiv(length, CHUNK)

    def one_chunk(step, d_state):
        chunk = begin + count - 1 - step
        rows = pl.ds(chunk * CHUNK, CHUNK)
        valid = jnp.minimum(length - (chunk - begin) * CHUNK, CHUNK)
        carried, tail = load_vector(inputs["carried"], chunk), load_vector(inputs["tail"], chunk)
        k, do = load_rows(inputs["k"], chunk, valid), load_rows(inputs["do"], chunk, valid)
        after = d_state.astype(dtype)
        if "d_states" in outputs:
            outputs["d_states"][chunk, :, :] = after
        y = dot(inputs["scores"][rows, :].T, do, dtype) + scale_rows(dot(k, after, dtype), tail)
        if inputs["inverse"] is not None:
            y = dot(inputs["inverse"][rows, :].T, y, dtype)
        if "y" in outputs:
            outputs["y"][rows, :] = y.astype(dtype)
        q = load_rows(inputs["q"], chunk, valid)
        d_before = _decayed(d_state, inputs, chunk) + dot(q.T, scale_rows(do, carried, scale), dtype)
        if inputs["inverse"] is not None:
            beta = load_vector(inputs["beta"], chunk)
            d_before += dot(k.T, scale_rows(y, carried, -beta), dtype)
        return d_before

    d_state = lax.fori_loop(0, count, one_chunk, inputs["d_final_state"][segment, :, :])
    if "d_initial_state" in outputs:
        outputs["d_initial_state"][segment, :, :] = d_state
    if "y" in outputs:
        _clear_unowned(inputs, outputs["y"], segment, begin, begin + count)


def _call(kernel, name, operands, layout: Layout, value_width, state_width, wanted, *, scale, interpret, config):
    """Launches either kernel; ``wanted``: names of outputs. ``state_width``: V, and K more with transitions."""
    batch, num_slots, heads, key_width = operands["k"].shape
    num_chunks, num_segments, dtype = num_slots // CHUNK, layout.lengths.shape[1], operands["k"].dtype
    config = config or default_config(dtype, key_width)
    tile = tile_of(state_width, tile_of(value_width, config.tile))

    # Grid (V tiles, heads, segments, rows): programs that read the same keys are neighbours.
    def spec(shape, index):
        return pl.BlockSpec(shape, index)

    rows = spec((None, num_slots, None, key_width), lambda v, h, s, b: (b, 0, h, 0))
    value_rows = spec((None, num_slots, None, tile), lambda v, h, s, b: (b, 0, h, v))
    if state_width > value_width:  # what a transition's tiles would load is masked
        value_rows = spec((None, num_slots, None, tile), lambda v, h, s, b: (b, 0, h, v % (value_width // tile)))
    vector = spec((None, None, num_slots), lambda v, h, s, b: (b, h, 0))
    square = spec((None, None, num_slots, CHUNK), lambda v, h, s, b: (b, h, 0, 0))
    segment_states = spec((None, num_segments, None, key_width, tile), lambda v, h, s, b: (b, 0, h, 0, v))
    chunk_states = spec((None, num_chunks, None, key_width, tile), lambda v, h, s, b: (b, 0, h, 0, v))
    per_row = {
        "offsets": spec((None, num_segments + 1), lambda v, h, s, b: (b, 0)),
        "lengths": spec((None, num_segments), lambda v, h, s, b: (b, 0)),
        "valid": spec((None, num_chunks), lambda v, h, s, b: (b, 0)),
    }
    specs = per_row | {
        "q": rows, "k": rows, "v": value_rows, "do": value_rows, "beta": vector, "carried": vector, "tail": vector,
        "transition_lengths": spec((None, None, num_segments), lambda v, h, s, b: (b, h, 0)),
        "state": spec((None, None, num_chunks), lambda v, h, s, b: (b, h, 0)),
        "key_decay": spec((None, num_chunks, None, key_width), lambda v, h, s, b: (b, 0, h, 0)),
        "scores": square, "inverse": square, "initial_state": segment_states, "d_final_state": segment_states,
    }  # fmt: skip
    values = (batch, num_slots, heads, value_width)
    state = (heads, key_width, state_width)
    states = (batch, num_chunks, *state)
    results = {
        "o": (value_rows, values, dtype), "new": (value_rows, values, dtype), "y": (value_rows, values, dtype),
        "states": (chunk_states, states, dtype), "d_states": (chunk_states, states, dtype),
        "final_state": (segment_states, (batch, num_segments, *state), jnp.float32),
        "d_initial_state": (segment_states, (batch, num_segments, *state), jnp.float32),
    }  # fmt: skip
    operands = operands | {name: getattr(layout, name) for name in per_row}
    return launch(
        functools.partial(kernel, scale=scale, dtype=dtype),
        operands,
        name=name,
        grid=(state_width // tile, heads, num_segments, batch),
        in_specs=({name: None if x is None else specs[name] for name, x in operands.items()},),
        out_specs={name: results[name][0] for name in wanted},
        out_shape={name: jax.ShapeDtypeStruct(*results[name][1:]) for name in wanted},
        config=config,
        interpret=interpret,
    )


def forward(
    q, k, v, decays, beta, key_decay, scores, inverse, initial_state, layout, *, scale, save, interpret, config=None
) -> dict[str, jax.Array]:
    """Outputs and final states; with ``save`` also the states before each chunk and, for the delta rule, n.

    Returns:
      dict of o [B,N,H,V] and final_state float32 [B,S,H,K,V]; states [B,chunks,H,K,V] and new [B,N,H,V] of v's dtype,
      not written in chunks that nobody owns.
    """
    wanted = ["o", "final_state"] + ["states"] * save + ["new"] * (save and inverse is not None)
    operands = {
        "q": q, "k": k, "v": v, "beta": beta, "key_decay": key_decay, "scores": scores, "inverse": inverse,
        "initial_state": initial_state, "transition_lengths": None, **decays._asdict(),
    }  # fmt: skip
    return _call(
        _forward_kernel, "recurrence_scan", operands, layout, v.shape[-1], v.shape[-1], wanted, scale=scale,
        interpret=interpret, config=config,
    )  # fmt: skip


def local_states(
    k, v, decays, beta, key_decay, inverse, initial_state, transition_lengths, layout, *, interpret, config=None
) -> jax.Array:
    """Final states alone, float32 like ``initial_state``.

    With ``transition_lengths``, int32 [B,H,S], there are K more columns in the states, for which every v is 0 and the
    segments have these lengths: from an identity they come to the matrix that takes the initial state to the final one.
    """
    operands = {
        "k": k, "v": v, "beta": beta, "key_decay": key_decay, "inverse": inverse, "initial_state": initial_state,
        "transition_lengths": transition_lengths, **decays._asdict(),
    }  # fmt: skip
    return _call(
        _forward_kernel, "recurrence_local_states", operands, layout, v.shape[-1], initial_state.shape[-1],
        ["final_state"], scale=None, interpret=interpret, config=config,
    )["final_state"]  # fmt: skip


def backward(
    q, k, decays, beta, key_decay, scores, inverse, do, d_final_state, layout, *, scale, interpret,
    wanted=("d_states", "y", "d_initial_state"), config=None,
) -> dict[str, jax.Array]:  # fmt: skip
    """Gradients through the states.

    Returns:
      dict, as far as ``wanted``, of d_states [B,chunks,H,K,V], of the state after each chunk, not written in chunks that
      nobody owns; y [B,N,H,V]; d_initial_state float32 [B,S,H,K,V].
    """
    operands = {
        "q": q, "k": k, "beta": beta, "key_decay": key_decay, "scores": scores, "inverse": inverse, "do": do,
        "d_final_state": d_final_state, **decays._asdict(),
    }  # fmt: skip
    name = "recurrence_scan_grad" if "y" in wanted else "recurrence_local_states_grad"
    return _call(
        _backward_kernel, name, operands, layout, do.shape[-1], do.shape[-1], wanted, scale=scale, interpret=interpret,
        config=config,
    )  # fmt: skip
