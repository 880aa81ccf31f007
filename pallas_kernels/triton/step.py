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
ROUTER_TILE = 8192  # elements of the router's matrix that a program multiplies at a time


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
        source = state if x_ref.shape[1] > 1 else 0
        tile = width if name in normalized else tile_of(width, width)
        for start in range(0, width, tile):
            columns = pl.ds(start, tile)
            taps = [jnp.where(continues, histories[name][layer, row, state, w, head, columns], 0) for w in range(past)]
            taps.append(x_ref[row, source, head, columns].astype(histories[name].dtype))
            y = jnp.zeros((tile,), jnp.float32) if biases[name] is None else biases[name][layer, head, columns]
            for w, tap in enumerate(taps):
                y += weights[name][layer, w, head, columns] * tap.astype(jnp.float32)
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
    batch, chosen = place.index.shape
    heads = next(iter(streams.values())).shape[2]

    def kernel(place, streams, weights, biases, histories):
        operands = streams, weights, biases, _as_integers(place), histories
        outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, chosen, *x.shape[2:]), x.dtype), streams)
        out_shape = outputs, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), histories)
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


def _router_kernel(operands, memories_ref, weights_ref, logits_ref, *, eps, top_k, tile):
    """One row: the norm, the logits, and the top k one after another, of equal ones the first."""
    x_ref, scale_ref, w_ref, bias_ref, layer_ref = operands
    row, layer, (depth, count) = pl.program_id(0), layer_ref[()], w_ref.shape[1:]
    lane = lax.iota(jnp.int32, pl.next_power_of_2(count))
    is_lane = lane < count

    def part(start):
        at = start + lax.iota(jnp.int32, tile)
        mask = at < depth
        return at, mask, plgpu.load(x_ref.at[row, at], mask=mask, other=0).astype(jnp.float32)

    squares = sum(jnp.sum(x * x) for _, _, x in map(part, range(0, depth, tile)))
    factor, logits = lax.rsqrt(squares / depth + eps), jnp.zeros(lane.shape, jnp.float32)
    for at, mask, x in map(part, range(0, depth, tile)):
        scale = plgpu.load(scale_ref.at[layer, at], mask=mask, other=0)
        x = (x * factor * scale).astype(x_ref.dtype).astype(jnp.float32)
        both = mask[:, None] & is_lane[None, :]
        w = plgpu.load(w_ref.at[layer, at[:, None], lane[None, :]], mask=both, other=0)
        logits += jnp.sum(x[:, None] * w, axis=0)
    plgpu.store(logits_ref.at[row, pl.ds(0, lane.size)], logits, mask=is_lane)

    exponentials = jnp.where(is_lane, jnp.exp(logits - jnp.max(jnp.where(is_lane, logits, -jnp.inf))), 0)
    rest = exponentials / jnp.sum(exponentials)
    if bias_ref is not None:
        rest += plgpu.load(bias_ref.at[layer, pl.ds(0, lane.size)], mask=is_lane, other=0)
    is_free, chosen = is_lane, []
    for r in range(top_k):
        is_best = is_free & (rest == jnp.max(jnp.where(is_free, rest, -jnp.inf)))
        best = jnp.min(jnp.where(is_best, lane, count))
        # None is the best of NaNs; the memories of a row are different ones even then, for states are written in place.
        best = jnp.where(best < count, best, jnp.min(jnp.where(is_free, lane, count)))
        chosen.append(jnp.sum(jnp.where(lane == best, logits, 0)))
        is_free &= lane != best
        memories_ref[row, r] = best
    chosen = [jnp.exp(logit - functools.reduce(jnp.maximum, chosen)) for logit in chosen]
    for r, weight in enumerate(chosen):
        weights_ref[row, r] = weight / sum(chosen)
    if memories_ref.shape[1] > top_k:
        memories_ref[row, top_k], weights_ref[row, top_k] = jnp.int32(count), jnp.float32(1)


def router_step(x, scale, weight, bias, layer, *, eps, top_k, has_shared, interpret=False):
    """See :func:`pallas_kernels.api.router_step`."""
    rows, count = x.shape[0], weight.shape[2]
    tile = min(pl.next_power_of_2(x.shape[1]), ROUTER_TILE // pl.next_power_of_2(count))

    def kernel(layer, x, scale, weight, bias):
        operands, width = (x, scale, weight, bias, layer), top_k + has_shared
        out_shape = tuple(
            jax.ShapeDtypeStruct((rows, columns), dtype)
            for columns, dtype in ((width, jnp.int32), (width, jnp.float32), (count, jnp.float32))
        )
        return launch(
            lambda *refs: _router_kernel(refs[:5], *refs[5:], eps=eps, top_k=top_k, tile=tile), *operands,
            name="router_step", grid=(rows,), in_specs=_whole(operands), out_specs=_whole(out_shape), out_shape=out_shape,
            config=KernelConfig(tile), interpret=interpret,
        )  # fmt: skip

    def reference(layer, *arrays):
        return plain.router_step(*arrays, layer, eps=eps, top_k=top_k, has_shared=has_shared)

    return with_plain_gradient(kernel, reference, layer, x, scale, weight, bias)


def _combine_kernel(o_ref, weights_ref, gate_ref, scale_ref, layer_ref, y_ref, *, eps):
    """One head of one row."""
    row, head, width = pl.program_id(0), pl.program_id(1), o_ref.shape[3]
    at = pl.ds(0, pl.next_power_of_2(width))
    mask = lax.iota(jnp.int32, at.size) < width

    def load(ref, *place):
        return plgpu.load(ref.at[(*place, at)], mask=mask, other=0).astype(jnp.float32)

    o = sum(load(o_ref, row, jnp.int32(r), head) * weights_ref[row, r] for r in range(o_ref.shape[1]))
    o = o * lax.rsqrt(jnp.sum(o * o) / width + eps) * load(scale_ref, layer_ref[()])
    if gate_ref is not None:
        gate = load(gate_ref, row, head)
        o *= gate * jax.nn.sigmoid(gate)
    plgpu.store(y_ref.at[row, head, at], o.astype(y_ref.dtype), mask=mask)


def combine_step(o, weights, gate, scale, layer, *, eps, interpret=False):
    """See :func:`pallas_kernels.api.combine_step`."""

    def kernel(layer, o, weights, gate, scale):
        operands, out_shape = (o, weights, gate, scale, layer), jax.ShapeDtypeStruct((o.shape[0], *o.shape[2:]), o.dtype)
        return launch(
            functools.partial(_combine_kernel, eps=eps), *operands, name="combine_step", grid=(o.shape[0], o.shape[2]),
            in_specs=_whole(operands), out_specs=WHOLE, out_shape=out_shape, config=KernelConfig(0), interpret=interpret,
        )  # fmt: skip

    def reference(layer, *arrays):
        return plain.combine_step(*arrays, layer, eps=eps)

    return with_plain_gradient(kernel, reference, layer, o, weights, gate, scale)
