"""The kernels of short_convolution.py.

A program walks down ``tile`` slots of some heads, slot by slot, and keeps the W-1 slots before in registers, so that every
input is read from memory once. Where taps must stop is one integer a slot, ``reach``, which knows of segments, of runs and
of dead slots; the kernels know of none of them. The backward pass keeps only the inputs, and recomputes the rest. A tile
without a live slot is not walked: the slots of a device's memories are bounded for the case that all tokens choose them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import ptx
from pallas_kernels.triton.launch import KernelConfig, launch


class Inputs(NamedTuple):
    """Arrays of the forward kernel; the first four are differentiable, None is absent.

    Attributes:
      x: [B, N, H, K], or [B, T, H, K] with ``token_of``.
      weight: float32 [W, H, K].
      bias: float32 [H, K].
      early: float32 [B, E, H, K], what the tokens before a segment add to its first slots (before the SiLU).
      early_of: int32 [B, N], a slot's row of ``early``; -1: none.
      reach: int32 [B, N], how many of the slots before a slot its taps may read, at most W-1; -1: the slot is dead.
      token_of: int32 [B, N], a slot's row of x; any value in dead slots.
    """

    x: Any
    weight: Any
    bias: Any
    early: Any
    early_of: Any
    reach: Any
    token_of: Any


class Options(NamedTuple):
    normalize: bool
    eps: float
    forward: KernelConfig
    backward: KernelConfig
    interpret: bool


class Slot(NamedTuple):
    """A slot's inputs as a program holds them: float32 [heads of the program, K], and scalars."""

    place: jax.Array
    x: jax.Array
    reach: jax.Array
    early_of: jax.Array | None


def _read_slot(inputs: Inputs, batch, place, heads) -> Slot:
    """The slot at ``place``; its reach is -1 if it is dead or not in the row, and then its x means nothing."""
    num_slots, num_rows = inputs.reach.shape[1], inputs.x.shape[1]
    at = jnp.minimum(jnp.maximum(place, 0), num_slots - 1)
    inside = (place >= 0) & (place < num_slots)
    reach = jnp.where(inside, inputs.reach[batch, at], -1)
    early_of = None if inputs.early is None else jnp.where(inside, inputs.early_of[batch, at], -1)
    # Read without a mask, so that the load need not wait for reach.
    row = at if inputs.token_of is None else jnp.minimum(inputs.token_of[batch, at], num_rows - 1)
    return Slot(place, inputs.x[batch, row, heads, :].astype(jnp.float32), reach, early_of)


class Program(NamedTuple):
    """What a program holds throughout: its place, the taps' weights and the bias."""

    batch: jax.Array
    start: jax.Array
    heads: Any
    weight: list[jax.Array]
    bias: jax.Array

    @classmethod
    def of(cls, inputs: Inputs, tile: int, num_heads: int) -> "Program":
        heads = pl.ds(pl.program_id(0) * num_heads, num_heads)
        weight = [inputs.weight[w, heads, :] for w in range(inputs.weight.shape[0])]
        return cls(pl.program_id(2), pl.program_id(1) * tile, heads, weight, inputs.bias[heads, :])

    def is_live(self, inputs: Inputs, tile: int):
        """Whether any slot of the tile is."""
        last = jnp.minimum(tile, inputs.reach.shape[1] - self.start) - 1
        slots = self.start + jnp.minimum(jnp.arange(pl.next_power_of_2(tile)), last)
        return jnp.max(inputs.reach[self.batch, slots]) >= 0

    def walk(self, inputs: Inputs, groups, unroll: int, body, carry):
        """Calls ``body(slot, past, keep, carry) -> carry`` for every slot of the ``groups`` of ``unroll`` slots.

        ``past`` are the W-1 slots' inputs before it; ``keep(condition, a)`` is where(condition, a, 0), or just a where no
        tap of the group's slots reaches too far, which is so nearly always.
        """
        count = len(self.weight) - 1

        def group(i, carry):
            slots = [_read_slot(inputs, self.batch, self.start + i * unroll + j, self.heads) for j in range(unroll)]

            def run(keep, past, carry):
                for slot in slots:
                    carry = body(slot, past, keep, carry)
                    past = (slot.x, *past)[:count]
                return past, carry

            is_inner = slots[0].reach == count
            for slot in slots[1:]:
                is_inner &= slot.reach == count
            return lax.cond(
                is_inner, partial(run, lambda _, a: a), partial(run, lambda condition, a: jnp.where(condition, a, 0)), *carry
            )

        first, last = groups
        start = self.start + first * unroll
        past = tuple(_read_slot(inputs, self.batch, start - tap, self.heads).x for tap in range(1, count + 1))
        return lax.fori_loop(first, last, group, (past, carry))[1]

    def silu(self, inputs: Inputs, slot: Slot, past, keep, interpret: bool):
        """The taps x_n, x_{n-1}, ..., the sum before the SiLU, and its sigmoid."""
        taps = [keep(slot.reach >= tap, x) for tap, x in enumerate((slot.x, *past))]
        pre = self.bias
        for w, x in zip(reversed(self.weight), taps, strict=True):
            pre = ptx.fma(w, x, pre, interpret)
        if inputs.early is not None:
            at = inputs.early.at[self.batch, jnp.maximum(slot.early_of, 0), self.heads, :]
            pre += plgpu.load(at, mask=slot.early_of >= 0, other=0)
        return taps, pre, ptx.sigmoid(pre, interpret)


def forward_kernel(inputs: Inputs, y_ref, *, options: Options, num_heads: int):
    config, interpret, num_slots = options.forward, options.interpret, y_ref.shape[1]
    program = Program.of(inputs, config.tile, num_heads)

    def body(slot, past, keep, carry):
        _, pre, sigmoid = program.silu(inputs, slot, past, keep, interpret)
        y = pre * sigmoid
        if options.normalize:
            y *= lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + options.eps)
        y = keep(slot.reach >= 0, y).astype(y_ref.dtype)
        at = y_ref.at[program.batch, jnp.minimum(slot.place, num_slots - 1), program.heads, :]
        plgpu.store(at, y, mask=slot.place < num_slots)
        return carry

    @pl.when(program.is_live(inputs, config.tile))
    def _():
        program.walk(inputs, (0, config.tile // config.num_stages), config.num_stages, body, ())


def backward_kernel(inputs: Inputs, dy_ref, dx_ref, dtaps_ref, dearly_ref, *, options: Options, num_heads: int):
    """Walks W-1 slots past its own: dx_n = sum_w weight[W-1-w] dpre_{n+w} is complete when slot n+W-1 has been seen."""
    config, interpret, num_slots = options.backward, options.interpret, dx_ref.shape[1]
    program = Program.of(inputs, config.tile, num_heads)
    batch, start, heads, weight, bias = program
    count, end = len(weight) - 1, jnp.minimum(start + config.tile, num_slots)

    def body(slot, past, keep, carry, own: bool):
        dx, dtaps = carry
        dy = dy_ref[batch, jnp.minimum(slot.place, num_slots - 1), heads, :].astype(jnp.float32)
        taps, pre, sigmoid = program.silu(inputs, slot, past, keep, interpret)
        if options.normalize:
            s = pre * sigmoid
            r = lax.rsqrt(jnp.sum(s * s, axis=-1, keepdims=True) + options.eps)
            dy = keep(slot.reach >= 0, dy)
            dy = r * ptx.fma(s, -r * r * jnp.sum(dy * s, axis=-1, keepdims=True), dy, interpret)
        dpre = keep(slot.reach >= 0, dy * sigmoid * ptx.fma(pre, 1 - sigmoid, jnp.ones_like(pre), interpret))

        dx = (jnp.zeros_like(bias), *dx)
        dx = [ptx.fma(w, keep(slot.reach >= tap, dpre), dx[tap], interpret) for tap, w in enumerate(reversed(weight))]
        done = slot.place - count
        at = dx_ref.at[batch, jnp.maximum(jnp.minimum(done, num_slots - 1), 0), heads, :]
        plgpu.store(at, dx[-1].astype(dx_ref.dtype), mask=(done >= start) & (done < end))
        if own:
            dtaps = (*(ptx.fma(dpre, x, d, interpret) for x, d in zip(taps, dtaps, strict=False)), dtaps[-1] + dpre)
            if dearly_ref is not None:
                at = dearly_ref.at[batch, jnp.maximum(slot.early_of, 0), heads, :]
                plgpu.store(at, dpre, mask=slot.early_of >= 0)
        return tuple(dx[:-1]), dtaps

    unroll, zeros = config.num_stages, jnp.zeros_like(bias)
    carry = (zeros,) * count, (zeros,) * (count + 2)
    groups = 0, config.tile // unroll, pl.cdiv(config.tile + count, unroll)

    def walk():
        own = program.walk(inputs, groups[:2], unroll, partial(body, own=True), carry)
        return program.walk(inputs, groups[1:], unroll, partial(body, own=False), own)[1]

    def clear():
        def store(place, _):
            plgpu.store(dx_ref.at[batch, place, heads, :], jnp.zeros(bias.shape, dx_ref.dtype))

        lax.fori_loop(start, end, store, None)
        return carry[1]

    dtaps = lax.cond(program.is_live(inputs, config.tile), walk, clear)
    for row, d in enumerate((*reversed(dtaps[:-1]), dtaps[-1])):
        dtaps_ref[batch, pl.program_id(1), row, heads, :] = d


def run(kernel, name, options: Options, config: KernelConfig, channels_per_warp: int, *operands, out_shape):
    """Launches a kernel whose first operand is the ``Inputs``; programs next to each other take the heads of one slot."""
    inputs = operands[0]
    (batch, num_slots), heads, width = inputs.reach.shape, *inputs.x.shape[2:]
    num_heads = max(1, min(heads & -heads, config.num_warps * channels_per_warp // width))
    return launch(
        partial(kernel, options=options, num_heads=num_heads),
        *operands,
        name=name,
        grid=(heads // num_heads, pl.cdiv(num_slots, config.tile), batch),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), operands),
        out_specs=jax.tree.map(lambda _: pl.BlockSpec(), out_shape),
        out_shape=out_shape,
        config=config,
        interpret=options.interpret,
    )
