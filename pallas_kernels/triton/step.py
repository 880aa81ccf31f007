"""The ops of decoding (see ../step.py): a program for every state, or part of one, that a token touches, in place.

Both kernels write their pools through ``input_output_aliases``; a program reads all that it changes before it writes, and no
other program touches it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import step as plain
from pallas_kernels.layer_ops import L2_EPS
from pallas_kernels.step import Place
from pallas_kernels.triton.chunks import tile_of
from pallas_kernels.triton.launch import MULTIPROCESSORS, KernelConfig, launch, with_plain_gradient

WHOLE, ALL = pl.BlockSpec(), slice(None)


def _whole(tree):
    return jax.tree.map(lambda _: WHOLE, tree)


def _as_integers(place: Place) -> Place:
    """Triton stores booleans as bits of its own; kernels compare integers."""
    return jax.tree.map(lambda x: x.astype(jnp.int32), place)


def _recurrence_kernel(q_ref, k_ref, v_ref, decay_ref, beta_ref, states_ref, place: Place, o_ref, new_ref, *, scale, tile):
    """S <- a S;  S <- S + k (b (v - S^T k))^T;  o = scale S^T q, for a tile of V of one state."""
    head, row, r = pl.program_id(1), pl.program_id(2) // place.index.shape[1], pl.program_id(2) % place.index.shape[1]
    columns = pl.ds(pl.program_id(0) * tile, tile)
    at = place.layer[()], row, place.index[row, r], head, ALL, columns
    q, k, v = (ref[row, r, head, axis].astype(jnp.float32) for ref, axis in ((q_ref, ALL), (k_ref, ALL), (v_ref, columns)))
    state = jnp.where(place.continues[row, r] > 0, states_ref[at], 0.0) * decay_ref[row, r, head]
    state += k[:, None] * (beta_ref[row, r, head] * (v - jnp.sum(k[:, None] * state, axis=0)))[None, :]
    o_ref[row, r, head, columns] = (scale * jnp.sum(q[:, None] * state, axis=0)).astype(o_ref.dtype)
    plgpu.store(new_ref.at[at], state, mask=jnp.broadcast_to(place.active[row] > 0, state.shape))


def gated_delta_rule_step(q, k, v, log_decay, beta, states, place: Place, *, scale, interpret=False):
    """See :func:`pallas_kernels.api.gated_delta_rule_step`."""
    batch, chosen, heads, width = v.shape
    # Many small programs where there are few states to read; rows of 128 bytes otherwise.
    tile = tile_of(width, 16 if batch * chosen * heads * width < 64 * MULTIPROCESSORS else 32)

    def kernel(place, q, k, v, log_decay, beta, states):
        operands = q, k, v, jnp.exp(log_decay.astype(jnp.float32)), beta, states, _as_integers(place)
        out_shape = jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(states.shape, states.dtype)
        return launch(
            functools.partial(_recurrence_kernel, scale=scale, tile=tile), *operands, name="recurrence_step",
            grid=(width // tile, heads, batch * chosen), in_specs=_whole(operands), out_specs=_whole(out_shape),
            out_shape=out_shape, config=KernelConfig(tile), aliases={5: 1}, interpret=interpret,
        )  # fmt: skip

    def reference(place, *arrays):
        return plain.gated_delta_rule_step(*arrays, place, scale=scale)

    return with_plain_gradient(kernel, reference, place, q, k, v, log_decay, beta, states)


def _convolution_kernel(streams, weights, biases, place: Place, histories, outputs, after, *, normalized):
    """Every stream of one head in one state."""
    head, r, row = (pl.program_id(axis) for axis in range(3))
    layer, state = place.layer[()], place.index[row, r]
    continues, active = place.continues[row, r] > 0, place.active[row] > 0
    for name, x_ref in streams.items():
        past, width = histories[name].shape[3], x_ref.shape[3]
        tile = width if name in normalized else tile_of(width, width)
        for start in range(0, width, tile):
            columns = pl.ds(start, tile)
            taps = [jnp.where(continues, histories[name][layer, row, state, w, head, columns], 0) for w in range(past)]
            taps.append(x_ref[row, r, head, columns].astype(histories[name].dtype))
            y = jnp.zeros((tile,), jnp.float32) if biases[name] is None else biases[name][head, columns]
            for w, tap in enumerate(taps):
                y += weights[name][w, head, columns] * tap.astype(jnp.float32)
            y = (y * jax.nn.sigmoid(y)).astype(x_ref.dtype)
            if name in normalized:
                wide = y.astype(jnp.float32)
                y = (wide * lax.rsqrt(jnp.sum(wide * wide) + L2_EPS)).astype(x_ref.dtype)
            outputs[name][row, r, head, columns] = y
            for w, tap in enumerate(taps[1:]):
                at = after[name].at[layer, row, state, jnp.int32(w), head, columns]  # the interpreter knows no bare number
                plgpu.store(at, tap, mask=jnp.broadcast_to(active, tap.shape))


def short_convolution_step(streams, weights, biases, histories, place: Place, *, normalized, interpret=False):
    """See :func:`pallas_kernels.api.short_convolution_step`."""
    batch, chosen, heads = next(iter(streams.values())).shape[:3]

    def kernel(place, streams, weights, biases, histories):
        operands = streams, weights, biases, _as_integers(place), histories
        out_shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (streams, histories))
        first, count = len(jax.tree.leaves(operands[:-1])), len(histories)
        aliases = {first + i: count + i for i in range(count)}
        return launch(
            functools.partial(_convolution_kernel, normalized=normalized), *operands, name="short_convolution_step",
            grid=(heads, chosen, batch), in_specs=_whole(operands), out_specs=_whole(out_shape), out_shape=out_shape,
            config=KernelConfig(0), aliases=aliases, interpret=interpret,
        )  # fmt: skip

    def reference(place, *arrays):
        return plain.short_convolution_step(*arrays, place, normalized=normalized)

    return with_plain_gradient(kernel, reference, place, streams, weights, biases, histories)
