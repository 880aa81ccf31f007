"""Grouped matmul over ragged segments, with its gradients::

    y_n = x_n w[s]        dx_n = dy_n w[s]^T        dw[s] = sum_n x_n^T dy_n        for the slots n of segment s

Rows of y and dx are read and written through lists of row numbers. The slots of all rows are listed segment by segment (see
:class:`SlotList`), so a tile of list places has one matrix however ragged the rows are, no place is wasted but in a
segment's last tile, and gathering x by token costs nothing: the list names tokens instead of slots. ``dw`` goes over blocks
of consecutive slots instead (:class:`BlockList`): of dy a step has one address, not one for every row. It cuts every
segment's blocks into pieces of nearly one length, as many as fill the GPU a whole number of times; a second kernel adds up
the pieces.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.segments import Segments
from pallas_kernels.triton.launch import MULTIPROCESSORS, KernelConfig, dot, launch


@dataclass(frozen=True)
class TileConfig(KernelConfig):
    """How one of the products is cut up; sizes are powers of two, cut down to ones that divide the axes.

    Attributes:
      tile: rows of an output tile: slots of y and dx, elements of D in dw.
      columns: columns of an output tile.
      depth: part of the contracted axis that one step of the loop takes; of dw it divides the alignment of segments.
    """

    columns: int = 256
    depth: int = 64


@dataclass(frozen=True)
class GroupedMatmulConfig:
    """The tiles of the three products.

    Attributes:
      waves: how often dw's programs fill the GPU. More are shorter and evener, and cause more traffic for the sums of their
        pieces, of which each is float32 [D, E].
    """

    forward: TileConfig
    dx: TileConfig
    dw: TileConfig
    waves: int = 3


# 128 x 256 float32 accumulators are 128 registers a thread of 8 warps; 4 stages of bf16 tiles are 192 of 227 KiB.
BFLOAT16 = TileConfig(tile=128, columns=256, depth=64, num_warps=8, num_stages=4)
# float32 operands are split in registers, which leaves fewer for the accumulators.
FLOAT32 = TileConfig(tile=128, columns=128, depth=32, num_warps=8, num_stages=3)
CONFIGS = {jnp.dtype(d): GroupedMatmulConfig(t, t, t) for d, t in ((jnp.bfloat16, BFLOAT16), (jnp.float32, FLOAT32))}


class SlotList(NamedTuple):
    """All B N slots, each once: the real ones segment by segment over all rows, then the dead ones.

    Each segment's part begins at a multiple of ``align`` places and is padded up to the next. Slots are numbered through
    all rows, b N + n; B N stands for none.

    Attributes:
      slot: int32 [L], the slot at each place of the list; B N at padding.
      segment: int32 [L / align], the segment of those places; S where there is none.
      start: int32 [S], where each segment's part begins.
      count: int32 [S], its real slots.
    """

    slot: Int[Array, "L"]
    segment: Int[Array, "L/align"]
    start: Int[Array, "S"]
    count: Int[Array, "S"]

    @classmethod
    def of(cls, segments: Segments, num_slots: int, align: int) -> "SlotList":
        """Looks every place up among the runs of consecutive slots; no sort, no scatter."""
        batch, num_segments = segments.lengths.shape
        none = batch * num_slots
        first_of_row = num_slots * jnp.arange(batch, dtype=jnp.int32)[:, None]
        begin, end = segments.offsets[:, :-1], segments.offsets[:, :-1] + segments.lengths
        dead_begin = jnp.pad(end, [(0, 0), (1, 0)])
        dead_length = jnp.pad(begin, [(0, 0), (0, 1)], constant_values=num_slots) - dead_begin

        count = jnp.sum(segments.lengths, axis=0, dtype=jnp.int32)
        first = jnp.pad((first_of_row + begin).T, [(0, 0), (0, 1)], constant_values=none)
        length = jnp.concatenate([segments.lengths.T, (-count % align)[:, None]], axis=1)
        first = jnp.concatenate([first.reshape(-1), (first_of_row + dead_begin).reshape(-1), jnp.array([none])])
        length = jnp.concatenate([length.reshape(-1), dead_length.reshape(-1)])
        run_start = jnp.pad(jnp.cumsum(length, dtype=jnp.int32), (1, 0))

        num_blocks = none // align + num_segments + 1  # full blocks, and one that is not for each segment and the dead slots
        place = jnp.arange(num_blocks * align, dtype=jnp.int32)
        run = jnp.searchsorted(run_start[1:], place, side="right", method="compare_all")
        slot = jnp.minimum((first - run_start)[run] + place, none).astype(jnp.int32)
        start = run_start[: num_segments * (batch + 1) + 1 : batch + 1]
        segment = jnp.searchsorted(start[1:], place[::align], side="right", method="compare_all").astype(jnp.int32)
        return cls(slot, segment, start[:-1], count)


def _rows_kernel(pairs, segment_ref, source_ref, slot_ref, y_ref, *, config: TileConfig, transpose: bool):
    """y[slot] = sum over the pairs of a[source] w[segment] (or times its transpose) for a tile of list places.

    Zero where there is no segment.
    """
    columns = pl.ds(pl.program_id(0) * config.columns, config.columns)
    place = pl.ds(pl.program_id(1) * config.tile, config.tile)
    segment = segment_ref[pl.program_id(1)]
    source, slot = source_ref[place][:, None], slot_ref[place][:, None]

    acc = jnp.zeros((config.tile, config.columns), jnp.float32)
    for a_ref, w_ref in pairs:

        def step(i, acc, a_ref=a_ref, w_ref=w_ref):
            contracted = pl.ds(i * config.depth, config.depth)
            a = a_ref[source, _iota(contracted)[None, :]]
            w = w_ref[segment, columns, contracted].T if transpose else w_ref[segment, contracted, columns]
            return acc + dot(a, w, a_ref.dtype)

        # Typed: the lowering gives a bare number the type of the condition.
        steps = jnp.where(segment < w_ref.shape[0], jnp.int32(a_ref.shape[1] // config.depth), jnp.int32(0))
        acc = lax.fori_loop(0, steps, step, acc)
    plgpu.store(y_ref.at[slot, _iota(columns)[None, :]], acc.astype(y_ref.dtype), mask=slot < y_ref.shape[0])


def _iota(slice_: pl.Slice) -> jax.Array:
    """The numbers of a slice: the interpreter cannot index by an array and a slice at once."""
    return slice_.start + lax.iota(jnp.int32, slice_.size)


def _rows_matmul(pairs, slots: SlotList, source, num_rows: int, config: TileConfig, transpose: bool, name: str, interpret):
    """Rows y [num_rows, E]: sums over pairs a [rows, D], w [S, D, E] (transpose: [S, E, D]) of a[source] w."""
    a, w = pairs[0]
    width = w.shape[1 if transpose else 2]
    depth = math.gcd(config.depth, *(a.shape[1] for a, _ in pairs))
    config = replace(config, columns=math.gcd(config.columns, width), depth=depth)
    tiles = slots.slot.size // config.tile
    operands = pairs, jnp.repeat(slots.segment, tiles // slots.segment.size), source, slots.slot
    return launch(
        partial(_rows_kernel, config=config, transpose=transpose),
        *operands, name=name, grid=(width // config.columns, tiles),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(), operands), out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), a.dtype), config=config, interpret=interpret,
    )  # fmt: skip


class BlockList(NamedTuple):
    """All blocks of ``unit`` slots that hold a real one, segment by segment over all rows.

    Attributes:
      slot: int32 [L], the first slot of each block, numbered through all rows.
      valid: int32 [L], real slots of each block, which are its first; 0 past the last block.
      start: int32 [S], where each segment's part begins.
      count: int32 [S], its blocks.
    """

    slot: Int[Array, "L"]
    valid: Int[Array, "L"]
    start: Int[Array, "S"]
    count: Int[Array, "S"]

    @classmethod
    def of(cls, segments: Segments, num_slots: int, unit: int) -> "BlockList":
        """``unit`` divides the alignment of segments."""
        batch = segments.lengths.shape[0]
        first = (num_slots * jnp.arange(batch, dtype=jnp.int32)[:, None] + segments.offsets[:, :-1]).T.reshape(-1)
        length = segments.lengths.T.reshape(-1)
        blocks = -(-length // unit)
        end = jnp.cumsum(blocks, dtype=jnp.int32)
        place = jnp.arange(batch * num_slots // unit, dtype=jnp.int32)
        run = jnp.minimum(jnp.searchsorted(end, place, side="right", method="compare_all"), end.size - 1)
        before = unit * (place - (end - blocks)[run])
        valid = jnp.clip(length[run] - before, 0, unit)
        count = jnp.sum(blocks.reshape(-1, batch), axis=1, dtype=jnp.int32)
        slot = jnp.where(valid > 0, first[run] + before, 0)
        return cls(slot, valid, jnp.cumsum(count, dtype=jnp.int32) - count, count)


def _dw_kernel(x_ref, dy_ref, source_ref, slot_ref, valid_ref, begin_ref, end_ref, sums_ref, *, config: TileConfig):
    """A tile of sums[piece] = sum_n x_n^T dy_n over the real slots of the piece's blocks; x by slot or by source."""
    columns = pl.ds(pl.program_id(0) * config.columns, config.columns)
    rows = pl.ds(pl.program_id(1) * config.tile, config.tile)
    piece = pl.program_id(2)
    begin, end = begin_ref[piece], end_ref[piece]

    def block_of(step):
        place = jnp.minimum(begin + step, slot_ref.shape[0] - 1)
        source = None if source_ref is None else source_ref[pl.ds(place * config.depth, config.depth)]
        return slot_ref[place], valid_ref[place], source

    def step(i, carry):
        acc, (slot, valid, source) = carry
        # A step ahead: found in the same step, it would keep the compiler from loading the rows themselves several steps
        # ahead. And first in the step: the fence before each product waits for loads to registers (README.md).
        ahead = block_of(i + 1)
        slots = pl.ds(pl.multiple_of(slot, config.depth), config.depth)
        real = (lax.iota(jnp.int32, config.depth) < valid)[:, None]
        x = x_ref.at[slots, rows] if source is None else x_ref.at[source[:, None], _iota(rows)[None, :]]
        x = plgpu.load(x, mask=real, other=0)
        dy = plgpu.load(dy_ref.at[slots, columns], mask=real, other=0)
        return acc + dot(x.T, dy, x_ref.dtype), ahead

    @pl.when(begin < end)
    def _():
        acc = jnp.zeros((config.tile, config.columns), jnp.float32)
        sums_ref[piece, rows, columns], _ = lax.fori_loop(0, end - begin, step, (acc, block_of(0)))


def _add_pieces_kernel(sums_ref, first_ref, dw_ref, *, tile: int):
    """dw[s] = the sum of its pieces, from first[s] up to first[s+1], for some of its elements."""
    elements, segment = pl.ds(pl.program_id(0) * tile, tile), pl.program_id(1)
    acc = jnp.zeros(tile, jnp.float32)
    acc = lax.fori_loop(first_ref[segment], first_ref[segment + 1], lambda piece, acc: acc + sums_ref[piece, elements], acc)
    dw_ref[segment, elements] = acc.astype(dw_ref.dtype)


def _piece_length(count, most: int):
    """How many blocks a piece of each segment of ``count`` blocks has: the fewest that make ``most`` pieces at most.

    Tried are lengths up to twice that of ``most`` equal pieces, which is enough if ``most`` is twice the segments or more.
    """
    tried = jnp.maximum(jnp.sum(count), 1) * (1 + jnp.arange(33) / 32) / most
    pieces = jnp.ceil(count / tried[:, None]).astype(jnp.int32)
    pieces = pieces[jnp.argmax(jnp.sum(pieces, axis=1) <= most)]
    return jnp.maximum(-(-count // jnp.maximum(pieces, 1)), 1)


def _dw(x, dy, blocks: BlockList, source, config: TileConfig, waves: int, interpret: bool):
    """dw [S, D, E] from x [rows, D] and dy [B N, E]; source: int32 [B N], the row of x of each slot, None: x is by slot."""
    num_segments, depth, width = blocks.count.size, x.shape[1], dy.shape[1]
    config = replace(config, tile=math.gcd(config.tile, depth), columns=math.gcd(config.columns, width))
    tiles = (depth // config.tile) * (width // config.columns)
    num_pieces = min(waves * MULTIPROCESSORS // tiles, blocks.slot.size + num_segments)
    num_pieces = max(num_pieces, 2 * num_segments)
    length = _piece_length(blocks.count, num_pieces)
    first = jnp.pad(jnp.cumsum(-(-blocks.count // length), dtype=jnp.int32), (1, 0))
    piece = jnp.arange(num_pieces, dtype=jnp.int32)
    segment = jnp.searchsorted(first[1:], piece, side="right", method="compare_all")
    begin = blocks.start[segment] + length[segment] * (piece - first[segment])
    end = jnp.minimum(begin + length[segment], (blocks.start + blocks.count)[segment])
    end = jnp.where(segment < num_segments, end, begin)  # past the last piece there is nothing to do
    if source is not None:  # in the order of the list
        source = source.reshape(-1, config.depth)[blocks.slot // config.depth].reshape(-1)
    whole = pl.BlockSpec()
    specs = [whole, whole, None if source is None else whole, whole, whole, whole, whole]
    sums = launch(
        partial(_dw_kernel, config=config), x, dy, source, blocks.slot, blocks.valid, begin, end,
        name="grouped_matmul_dw", grid=(width // config.columns, depth // config.tile, num_pieces),
        in_specs=specs, out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((num_pieces, depth, width), jnp.float32), config=config, interpret=interpret,
    )  # fmt: skip
    tile = math.gcd(depth * width, 2048)
    dw = launch(
        partial(_add_pieces_kernel, tile=tile), sums.reshape(num_pieces, -1), first,
        name="grouped_matmul_dw_add", grid=(depth * width // tile, num_segments), in_specs=[pl.BlockSpec()] * 2,
        out_specs=pl.BlockSpec(), out_shape=jax.ShapeDtypeStruct((num_segments, depth * width), x.dtype),
        config=KernelConfig(tile), interpret=interpret,
    )  # fmt: skip
    return dw.reshape(num_segments, depth, width)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(config: GroupedMatmulConfig, interpret, x, weights, slots: SlotList, blocks: BlockList, source, slot_of):
    batch, num_tokens, depth = x.shape
    num_rows = batch * (num_tokens if source is None else source.size // batch)
    own = jnp.minimum(slots.slot, num_rows - 1)  # padding reads some row, whose product is not stored
    x, listed = x.reshape(-1, depth), own if source is None else source[own]
    return tuple(
        _rows_matmul([(x, w)], slots, listed, num_rows, config.forward, False, "grouped_matmul", interpret)
        .reshape(batch, num_rows // batch, -1)
        for w in weights
    )  # fmt: skip


def _forward(config, interpret, *operands):
    return _grouped_matmul(config, interpret, *operands), operands


def _backward(config, interpret, operands, dys):
    x, weights, slots, blocks, source, slot_of = operands
    dys = [dy.reshape(-1, dy.shape[2]) for dy in dys]
    num_rows = dys[0].shape[0]
    own = jnp.minimum(slots.slot, num_rows - 1)
    pairs = list(zip(dys, weights, strict=True))
    dx = _rows_matmul(pairs, slots, own, num_rows, config.dx, True, "grouped_matmul_dx", interpret)
    dx = dx.reshape(x.shape[0], -1, x.shape[2])
    if slot_of is not None:
        choices = jax.vmap(lambda dx, slot: dx.at[slot].get(mode="fill", fill_value=0))(dx, slot_of)
        dx = jnp.sum(choices.astype(jnp.float32), axis=2).astype(x.dtype)
    x = x.reshape(-1, x.shape[2])
    dws = tuple(_dw(x, dy, blocks, source, config.dw, config.waves, interpret) for dy in dys)
    return dx, dws, None, None, None, None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul(x, weights, *, segments: Segments, token_of=None, slot_of=None, config=None, interpret=False):
    """See :func:`pallas_kernels.api.grouped_matmul`. Nothing that belongs to a dead slot is read, neither of x nor of dy.

    Args:
      config: tiles; None: chosen for an H200 and the dtype.
    """
    batch, num_tokens = x.shape[:2]
    config = CONFIGS[x.dtype] if config is None else config
    num_slots = num_tokens if token_of is None else token_of.shape[1]
    slots = SlotList.of(segments, num_slots, max(config.forward.tile, config.dx.tile))
    blocks = BlockList.of(segments, num_slots, config.dw.depth)
    source = None
    if token_of is not None:
        source = num_tokens * jnp.arange(batch, dtype=jnp.int32)[:, None] + jnp.minimum(token_of, num_tokens - 1)
        source = source.reshape(-1)
    return _grouped_matmul(config, interpret, x, weights, slots, blocks, source, slot_of)
