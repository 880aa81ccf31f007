"""The kernels of gated_rms_norm.py.

A program works through ``tile`` tokens of some heads, one token at a time: rows of the next power of two, masked. The
backward pass keeps only the inputs. No sum is scattered: a token's gradient is gathered by its slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import ptx
from pallas_kernels.triton.launch import KernelConfig


class Inputs(NamedTuple):
    """Arrays of the kernels; the first four are differentiable, None is absent.

    Attributes:
      o: [B, N, H, V].
      gate: [B, T, H, V].
      scale: float32 [V]; without it there is no norm, and no gate.
      weights: float32 [B, T, R], of a token's slots.
      slot_of: int32 [B, T, R], N or more for none.
      token_of: int32 [B, N], T or more in dead slots.
      choice_of: int32 [B, N], token * R + the slot's place among the token's; any value in dead slots.
    """

    o: Any
    gate: Any
    scale: Any
    weights: Any
    slot_of: Any
    token_of: Any
    choice_of: Any


class Options(NamedTuple):
    eps: float
    config: KernelConfig
    slots_config: KernelConfig
    interpret: bool


class Program(NamedTuple):
    """What a program holds throughout: its place, the columns of a row that exist, and the scale, if there is one."""

    batch: jax.Array
    start: jax.Array
    heads: jax.Array
    columns: jax.Array
    mask: jax.Array
    scale: jax.Array | None

    @classmethod
    def of(cls, inputs: Inputs, tile: int, num_heads: int) -> "Program":
        width = inputs.o.shape[3]
        heads = (pl.program_id(0) * num_heads + jnp.arange(num_heads))[:, None]
        columns = jnp.arange(pl.next_power_of_2(width))[None, :]
        mask, scale = columns < width, None
        if inputs.scale is not None:
            scale = plgpu.load(inputs.scale.at[columns], mask=mask, other=0)
        return cls(pl.program_id(2), pl.program_id(1) * tile, heads, columns, mask, scale)

    def load(self, ref, row, exists=True):
        at = ref.at[self.batch, row, self.heads, self.columns]
        return plgpu.load(at, mask=self.mask & exists, other=0).astype(jnp.float32)

    def store(self, ref, row, value, exists):
        at = ref.at[self.batch, row, self.heads, self.columns]
        plgpu.store(at, value.astype(ref.dtype), mask=self.mask & exists)

    def slots(self, inputs: Inputs, token):
        """The outputs of a token's slots and their weights; zeros for those that it has not."""
        for choice in range(inputs.slot_of.shape[2]):
            slot, num_slots = inputs.slot_of[self.batch, token, choice], inputs.o.shape[1]
            o = self.load(inputs.o, jnp.minimum(slot, num_slots - 1), slot < num_slots)
            yield o, inputs.weights[self.batch, token, choice]

    def normed(self, inputs: Inputs, o, eps):
        """o / rms and 1 / rms."""
        rms = lax.rsqrt(jnp.sum(o * o, axis=-1, keepdims=True) / inputs.scale.shape[0] + eps)
        return o * rms, rms


def forward_kernel(inputs: Inputs, y_ref, *, options: Options, num_heads: int):
    program, num_tokens = Program.of(inputs, options.config.tile, num_heads), y_ref.shape[1]

    def body(i, _):
        exists = program.start + i < num_tokens
        token = jnp.minimum(program.start + i, num_tokens - 1)
        y = sum(weight * o for o, weight in program.slots(inputs, token))
        if program.scale is not None:
            y = program.normed(inputs, y, options.eps)[0] * program.scale
        if inputs.gate is not None:
            gate = program.load(inputs.gate, token)
            y *= gate * ptx.sigmoid(gate, options.interpret)
        program.store(y_ref, token, y, exists)

    lax.fori_loop(0, options.config.tile, body, None)


def backward_kernel(
    inputs: Inputs, dy_ref, do_ref, dgate_ref, dscale_ref, dweights_ref, *, options: Options, num_heads: int
):
    """Gradients with respect to o_t, the gate and the weights, and the program's part of the scale's."""
    program, num_tokens = Program.of(inputs, options.config.tile, num_heads), dy_ref.shape[1]
    group = pl.program_id(0)  # of heads; the interpreter knows it only outside the loop

    def body(i, dscale):
        exists = program.start + i < num_tokens
        token = jnp.minimum(program.start + i, num_tokens - 1)
        dy = program.load(dy_ref, token, exists)
        slots = list(program.slots(inputs, token))
        if program.scale is None:
            do = dy
        else:
            o = sum(weight * o for o, weight in slots)
            normed, rms = program.normed(inputs, o, options.eps)
            if inputs.gate is not None:
                gate = program.load(inputs.gate, token)
                sigmoid = ptx.sigmoid(gate, options.interpret)
                slope = sigmoid * ptx.fma(gate, 1 - sigmoid, jnp.ones_like(gate), options.interpret)
                program.store(dgate_ref, token, dy * normed * program.scale * slope, exists)
                dy *= gate * sigmoid
            dscale += dy * normed
            dy *= program.scale
            mean = jnp.sum(dy * normed, axis=-1, keepdims=True) / inputs.scale.shape[0]
            do = rms * (dy - normed * mean)
            program.store(do_ref, token, do, exists)
        for choice, (o, _) in enumerate(slots):
            at = dweights_ref.at[program.batch, token, jnp.int32(choice), group]
            plgpu.store(at, jnp.sum(jnp.sum(do * o, axis=1), axis=0), mask=exists)
        return dscale

    zeros = None if program.scale is None else jnp.zeros((num_heads, program.columns.shape[1]))
    dscale = lax.fori_loop(0, options.config.tile, body, zeros)
    if dscale is None:
        return
    at = dscale_ref.at[program.batch, pl.program_id(1), program.heads, program.columns]
    plgpu.store(at, dscale, mask=program.mask)


def slots_kernel(do_ref, weights_ref, token_of_ref, choice_of_ref, dslots_ref, *, tile: int, width: int):
    """dslots_n = weight of n in its token * do of its token; zero in dead slots. Tiles of slots x channels."""
    batch, num_slots, num_tokens = pl.program_id(2), dslots_ref.shape[1], do_ref.shape[1]
    slots = pl.program_id(1) * tile + jnp.arange(tile)
    exists, at = slots < num_slots, jnp.minimum(slots, num_slots - 1)
    channels = (pl.program_id(0) * width + jnp.arange(width))[None, :]
    tokens = token_of_ref[batch, at]
    real = exists & (tokens < num_tokens)
    weights = plgpu.load(weights_ref.at[batch, choice_of_ref[batch, at]], mask=real, other=0)
    row = do_ref.at[batch, jnp.minimum(tokens, num_tokens - 1)[:, None], channels]
    do = plgpu.load(row, mask=real[:, None], other=0).astype(jnp.float32)
    dslots = (weights[:, None] * do).astype(dslots_ref.dtype)
    plgpu.store(dslots_ref.at[batch, at[:, None], channels], dslots, mask=exists[:, None])
