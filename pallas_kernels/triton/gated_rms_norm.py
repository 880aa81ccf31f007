"""The sum over each token's memories, the output norm and the gate of a layer: one kernel forward, two backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.triton.gated_rms_norm_kernels import Inputs, Options, backward_kernel, forward_kernel, slots_kernel
from pallas_kernels.triton.launch import KernelConfig, launch

CONFIG = KernelConfig(tile=8, num_warps=4, num_stages=1)
SLOTS = KernelConfig(tile=16, num_warps=2, num_stages=1)  # of the kernel that gathers the slots' gradients
CHANNELS_PER_WARP = 512


def combine_gated_rms_norm(
    o, weights, gate, scale, eps, *, slot_of, token_of, choice_of, config=CONFIG, slots_config=SLOTS, interpret=False
):
    """See :func:`pallas_kernels.api.combine_gated_rms_norm`; o_t is never in memory.

    Args:
      config, slots_config: ``tile`` in tokens, and in slots for the gradient of ``o``.
    """
    inputs = Inputs(o, gate, scale, weights, slot_of, token_of, choice_of)
    return _norm(Options(eps, config, slots_config, interpret), inputs)


def combine(o, weights, **where):
    """See :func:`pallas_kernels.api.combine`."""
    return combine_gated_rms_norm(o, weights, None, None, 0.0, **where)


def _whole(tree):
    return jax.tree.map(lambda _: pl.BlockSpec(), tree)


def _run(kernel, name, options: Options, grid_of_tokens, *operands, out_shape):
    """Launches a kernel whose first operand is the ``Inputs``; programs next to each other take the heads of one token."""
    num_heads, grid = grid_of_tokens
    return launch(
        partial(kernel, options=options, num_heads=num_heads), *operands, name=name, grid=grid, in_specs=_whole(operands),
        out_specs=_whole(out_shape), out_shape=out_shape, config=options.config, interpret=options.interpret,
    )  # fmt: skip


def _grid(options: Options, shape):
    """Heads of a program, and the grid over heads, tokens and rows."""
    batch, num_tokens, heads, width = shape
    num_heads = min(heads & -heads, options.config.num_warps * CHANNELS_PER_WARP // pl.next_power_of_2(width))
    num_heads = max(1, num_heads)
    return num_heads, (heads // num_heads, pl.cdiv(num_tokens, options.config.tile), batch)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(options: Options, inputs: Inputs):
    shape = inputs.slot_of.shape[:2] + inputs.o.shape[2:]
    out_shape = jax.ShapeDtypeStruct(shape, inputs.o.dtype)
    return _run(forward_kernel, "gated_rms_norm", options, _grid(options, shape), inputs, out_shape=out_shape)


def _norm_forward(options, inputs):
    return _norm(options, inputs), inputs


def _norm_backward(options, inputs, dy):
    num_heads, grid = _grid(options, dy.shape)
    batch, num_tokens, heads, width = dy.shape
    has_norm = inputs.scale is not None
    out_shape = (
        jax.ShapeDtypeStruct(dy.shape, inputs.o.dtype) if has_norm else None,
        None if inputs.gate is None else jax.ShapeDtypeStruct(dy.shape, inputs.gate.dtype),
        jax.ShapeDtypeStruct((batch, grid[1], heads, width), jnp.float32) if has_norm else None,
        jax.ShapeDtypeStruct((*inputs.weights.shape, grid[0]), jnp.float32),
    )
    do, dgate, dscale, dweights = _run(
        backward_kernel, "gated_rms_norm_grad", options, (num_heads, grid), inputs, dy, out_shape=out_shape
    )  # fmt: skip
    do, dweights = _to_slots(options, inputs, do if has_norm else dy), jnp.sum(dweights, axis=-1)
    dscale = jnp.sum(dscale, axis=(0, 1, 2)) if has_norm else None
    return (Inputs(do, dgate, dscale, dweights, None, None, None),)


def _to_slots(options: Options, inputs: Inputs, do):
    """Each slot's part of its token's gradient."""
    config, (batch, num_tokens, heads, width), num_slots = options.slots_config, do.shape, inputs.o.shape[1]
    channels = heads * width
    piece = min(channels & -channels, 256)
    operands = (
        do.reshape(batch, num_tokens, channels), inputs.weights.reshape(batch, -1), inputs.token_of, inputs.choice_of,
    )  # fmt: skip
    out_shape = jax.ShapeDtypeStruct((batch, num_slots, channels), do.dtype)
    dslots = launch(
        partial(slots_kernel, tile=config.tile, width=piece), *operands, name="gated_rms_norm_slots_grad",
        grid=(channels // piece, pl.cdiv(num_slots, config.tile), batch), in_specs=_whole(operands),
        out_specs=_whole(out_shape), out_shape=out_shape, config=config, interpret=options.interpret,
    )  # fmt: skip
    return dslots.reshape(inputs.o.shape)


_norm.defvjp(_norm_forward, _norm_backward)
