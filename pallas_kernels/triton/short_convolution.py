"""The short convolution over ragged segments with its SiLU and, for queries and keys, the l2 norm: one kernel each way."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import Segments
from pallas_kernels.triton.launch import KernelConfig
from pallas_kernels.triton.short_convolution_kernels import Inputs, Options, backward_kernel, forward_kernel, run

FORWARD = KernelConfig(tile=64, num_warps=1, num_stages=4)
BACKWARD = KernelConfig(tile=128, num_warps=2, num_stages=2)

# Channels of a warp: 8 for each thread, which is 16 bytes of bfloat16; half in the backward pass, for want of registers.
FORWARD_CHANNELS, BACKWARD_CHANNELS = 256, 128


def short_convolution(
    x, weight, bias, segments: Segments, run_ids=None, history=None, *, token_of=None, slot_of=None, normalize=False,
    eps=1e-6, config=FORWARD, grad_config=BACKWARD, interpret=False,
):  # fmt: skip
    """See :func:`pallas_kernels.api.short_convolution`. A tile of dead slots only is not written; the
    gradient of dead slots is zero, whatever x and the cotangent hold there.

    Args:
      eps: of the l2 norm.
      config, grad_config: ``tile`` is in slots, ``num_stages`` the slots whose loads are in flight together.
    """
    head_shape, width = weight.shape[1:], weight.shape[0]
    for c in (config, grad_config):
        if c.tile % c.num_stages:
            raise ValueError(f"short_convolution: tile is {c.tile}; it must be a multiple of num_stages, {c.num_stages}")
    reach = _reach(segments, run_ids, (x if token_of is None else token_of).shape[1], width)
    early = early_of = None
    if history is not None and width > 1:
        early, early_of = _early(weight, history, segments, reach)
    bias = jnp.zeros(head_shape, jnp.float32) if bias is None else bias
    if not normalize:  # heads mean nothing then: pieces of any power of two that divides the channels
        channels = head_shape[0] * head_shape[1]
        piece = min(FORWARD_CHANNELS, channels & -channels)
        x, weight, bias, early = (
            a if a is None else a.reshape(*a.shape[:-2], channels // piece, piece) for a in (x, weight, bias, early)
        )
    inputs = Inputs(x, weight, bias, early, early_of, reach, token_of)
    y = _convolve(Options(normalize, eps, config, grad_config, interpret), inputs, slot_of)
    return y.reshape(*y.shape[:2], *head_shape)


def _reach(segments, run_ids, num_slots, width):
    """How many of the W-1 slots before each slot are of its segment and run; -1 in dead slots."""
    rank = segments.rank(num_slots)
    reach = jnp.zeros_like(rank)
    for tap in range(1, width):
        readable = rank >= tap
        if run_ids is not None:  # in a segment they only grow, so equal means that nothing in between differs
            readable &= run_ids == jnp.roll(run_ids, tap, axis=1)
        reach += readable.astype(jnp.int32)
    return jnp.where(segments.is_real(num_slots), reach, -1)


def _early(weight, history, segments, reach):
    """What ``history`` adds to the first W-1 slots of every segment, [B, S (W-1), H, K], and each slot's row of it."""
    past, num_slots = weight.shape[0] - 1, reach.shape[1]
    history = history.astype(jnp.float32)
    early = [
        sum(weight[past - tap] * history[:, :, past + rank - tap] for tap in range(rank + 1, past + 1))
        for rank in range(past)
    ]
    early = jnp.stack(early, axis=2)
    rank = segments.rank(num_slots)
    # A slot that reaches all the slots before it is of the run of its segment's first token, as the history is.
    has_early = (reach == rank) & (rank < past)
    row = segments.segment_of(num_slots) * past + rank
    return early.reshape(early.shape[0], -1, *early.shape[3:]), jnp.where(has_early, row, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options: Options, inputs: Inputs, slot_of):
    shape = inputs.reach.shape + inputs.x.shape[2:]
    out_shape = jax.ShapeDtypeStruct(shape, inputs.x.dtype)
    return run(forward_kernel, "short_convolution", options, options.forward, FORWARD_CHANNELS, inputs, out_shape=out_shape)


def _convolve_forward(options, inputs, slot_of):
    return _convolve(options, inputs, slot_of), (inputs, slot_of)


def _convolve_backward(options, residuals, dy):
    inputs, slot_of = residuals
    batch, num_slots, *head_shape = dy.shape
    blocks = pl.cdiv(num_slots, options.backward.tile)
    out_shape = (
        jax.ShapeDtypeStruct(dy.shape, inputs.x.dtype),
        jax.ShapeDtypeStruct((batch, blocks, inputs.weight.shape[0] + 1, *head_shape), jnp.float32),
        None if inputs.early is None else jax.ShapeDtypeStruct(inputs.early.shape, jnp.float32),
    )
    dx, dtaps, dearly = run(
        backward_kernel, "short_convolution_grad", options, options.backward, BACKWARD_CHANNELS, inputs, dy,
        out_shape=out_shape,
    )  # fmt: skip
    dtaps = jnp.sum(dtaps, axis=(0, 1))
    if dearly is not None:  # rows that no slot reads were not written
        rows = jnp.arange(dearly.shape[1])
        read = jnp.any(inputs.early_of[:, :, None] == rows, axis=1)
        dearly = jnp.where(read[..., None, None], dearly, 0)
    if slot_of is not None:
        dx = _sum_over_slots(dx, slot_of)
    return Inputs(dx, dtaps[:-1], dtaps[-1], dearly, None, None, None), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _sum_over_slots(dx: Float[Array, "B N H K"], slot_of: Int[Array, "B T R"]) -> Float[Array, "B T H K"]:
    """The sum over each token's slots; an index of N or more stands for nothing."""
    take = jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))
    choices = (take(dx, slot_of[:, :, r]).astype(jnp.float32) for r in range(slot_of.shape[2]))
    return sum(choices).astype(dx.dtype)
