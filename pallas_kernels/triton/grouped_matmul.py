"""Grouped matmul over ragged segments, with its gradients::

    y_n = x_n w[s]        dx_n = dy_n w[s]^T        dw[s] = sum_n x_n^T dy_n        for the slots n of segment s

Rows are only ever read and written through lists of row numbers. The slots of all rows are listed segment by segment (see
:class:`SlotList`), so a tile of list places has one matrix however ragged the rows are, no place is wasted but in a
segment's last tile, and gathering x by token costs nothing: the list names tokens instead of slots. ``dw`` cuts every
segment's list into pieces of nearly one length, as many as fill the GPU a whole number of times; a second kernel adds up the
pieces in order.
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
      depth: part of the contracted axis that one step of the loop takes.
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


def _rows_kernel(a_ref, w_ref, segment_ref, source_ref, slot_ref, y_ref, *, config: TileConfig, depth: int, transpose: bool):
    """y[slot] = a[source] w[segment] (or times its transpose) for a tile of list places; zero where there is no segment."""
    columns = pl.ds(pl.program_id(0) * config.columns, config.columns)
    place = pl.ds(pl.program_id(1) * config.tile, config.tile)
    segment = segment_ref[pl.program_id(1)]
    source, slot = source_ref[place][:, None], slot_ref[place][:, None]

    def step(i, acc):
        contracted = pl.ds(i * config.depth, config.depth)
        a = a_ref[source, _iota(contracted)[None, :]]
        w = w_ref[segment, columns, contracted].T if transpose else w_ref[segment, contracted, columns]
        return acc + dot(a, w, a_ref.dtype)

    # Typed: the lowering gives a bare number the type of the condition.
    steps = jnp.where(segment < w_ref.shape[0], jnp.int32(depth // config.depth), jnp.int32(0))
    acc = lax.fori_loop(0, steps, step, jnp.zeros((config.tile, config.columns), jnp.float32))
    plgpu.store(y_ref.at[slot, _iota(columns)[None, :]], acc.astype(y_ref.dtype), mask=slot < y_ref.shape[0])


def _iota(slice_: pl.Slice) -> jax.Array:
    """The numbers of a slice: the interpreter cannot index by an array and a slice at once."""
    return slice_.start + lax.iota(jnp.int32, slice_.size)


def _rows_matmul(a, w, slots: SlotList, source, num_rows: int, config: TileConfig, transpose: bool, name: str, interpret):
    """Rows y [num_rows, E] of products of the rows ``source`` of a [rows, D] with w [S, D, E] (transpose: [S, E, D])."""
    depth, width = (w.shape[2], w.shape[1]) if transpose else (w.shape[1], w.shape[2])
    config = replace(config, columns=math.gcd(config.columns, width), depth=math.gcd(config.depth, depth))
    tiles = slots.slot.size // config.tile
    return launch(
        partial(_rows_kernel, config=config, depth=depth, transpose=transpose),
        a, w, jnp.repeat(slots.segment, tiles // slots.segment.size), source, slots.slot,
        name=name, grid=(width // config.columns, tiles), in_specs=[pl.BlockSpec()] * 5, out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((num_rows, width), a.dtype), config=config, interpret=interpret,
    )  # fmt: skip


def _dw_kernel(x_ref, dy_ref, source_ref, slot_ref, begin_ref, end_ref, sums_ref, *, config: TileConfig):
    """A tile of sums[piece] = sum_p x[source[p]]^T dy[slot[p]] over the list places of the piece."""
    columns = pl.ds(pl.program_id(0) * config.columns, config.columns)
    rows = pl.ds(pl.program_id(1) * config.tile, config.tile)
    piece = pl.program_id(2)
    begin, end = begin_ref[piece], end_ref[piece]

    def rows_of(step):
        place = pl.ds(pl.multiple_of(begin + step * config.depth, config.depth), config.depth)
        return source_ref[place], slot_ref[place]

    # The numbers of a step's rows are loaded a step ahead: found in the same step, they would keep the compiler from loading
    # the rows themselves several steps ahead. The list is longer than its last segment, so a step too far is within it.
    def step(i, carry):
        acc, (source, slot) = carry
        real = (i * config.depth + lax.iota(jnp.int32, config.depth) < end - begin)[:, None]
        x = plgpu.load(x_ref.at[source[:, None], _iota(rows)[None, :]], mask=real, other=0)
        dy = plgpu.load(dy_ref.at[slot[:, None], _iota(columns)[None, :]], mask=real, other=0)
        return acc + dot(x.T, dy, x_ref.dtype), rows_of(i + 1)

    @pl.when(begin < end)
    def _():
        acc = jnp.zeros((config.tile, config.columns), jnp.float32)
        steps = pl.cdiv(end - begin, config.depth)
        sums_ref[piece, rows, columns], _ = lax.fori_loop(0, steps, step, (acc, rows_of(0)))


def _add_pieces_kernel(sums_ref, first_ref, dw_ref, *, tile: int):
    """dw[s] = the sum of its pieces, from first[s] up to first[s+1], for some of its elements."""
    elements, segment = pl.ds(pl.program_id(0) * tile, tile), pl.program_id(1)
    acc = jnp.zeros(tile, jnp.float32)
    acc = lax.fori_loop(first_ref[segment], first_ref[segment + 1], lambda piece, acc: acc + sums_ref[piece, elements], acc)
    dw_ref[segment, elements] = acc.astype(dw_ref.dtype)


def _piece_length(count, most: int, unit: int):
    """A multiple of ``unit`` for each segment: the shortest for which there are at most ``most`` pieces in all.

    Tried are lengths up to twice that of ``most`` equal pieces, which is enough if ``most`` is twice the segments or more.
    """
    tried = jnp.maximum(jnp.sum(count), 1) * (1 + jnp.arange(33) / 32) / most
    pieces = jnp.ceil(count / tried[:, None]).astype(jnp.int32)
    pieces = pieces[jnp.argmax(jnp.sum(pieces, axis=1) <= most)]
    length = -(-count // jnp.maximum(pieces, 1))
    return jnp.maximum(-(-length // unit), 1) * unit


def _dw(x, dy, slots: SlotList, source, config: TileConfig, waves: int, interpret: bool):
    """dw [S, D, E] from x [rows, D] and dy [B N, E]."""
    num_segments, depth, width = slots.count.size, x.shape[1], dy.shape[1]
    config = replace(config, tile=math.gcd(config.tile, depth), columns=math.gcd(config.columns, width))
    tiles = (depth // config.tile) * (width // config.columns)
    num_pieces = min(waves * MULTIPROCESSORS // tiles, dy.shape[0] // config.depth + num_segments)
    num_pieces = max(num_pieces, 2 * num_segments)
    length = _piece_length(slots.count, num_pieces, config.depth)
    first = jnp.pad(jnp.cumsum(-(-slots.count // length), dtype=jnp.int32), (1, 0))
    piece = jnp.arange(num_pieces, dtype=jnp.int32)
    segment = jnp.searchsorted(first[1:], piece, side="right", method="compare_all")
    begin = slots.start[segment] + length[segment] * (piece - first[segment])
    end = jnp.minimum(begin + length[segment], (slots.start + slots.count)[segment])
    end = jnp.where(segment < num_segments, end, begin)  # past the last piece there is nothing to do
    sums = launch(
        partial(_dw_kernel, config=config), x, dy, source, slots.slot, begin, end,
        name="grouped_matmul_dw", grid=(width // config.columns, depth // config.tile, num_pieces),
        in_specs=[pl.BlockSpec()] * 6, out_specs=pl.BlockSpec(),
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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped_matmul(num_slots: int, config: GroupedMatmulConfig, interpret: bool, x, w, slots: SlotList, source, slot_of):
    rows = x.reshape(-1, x.shape[2])
    y = _rows_matmul(
        rows, w, slots, source, x.shape[0] * num_slots, config.forward, False, "grouped_matmul", interpret
    )  # fmt: skip
    return y.reshape(x.shape[0], num_slots, -1)


def _forward(num_slots, config, interpret, *operands):
    return _grouped_matmul(num_slots, config, interpret, *operands), operands


def _backward(num_slots, config, interpret, operands, dy):
    x, w, slots, source, slot_of = operands
    num_rows = x.shape[0] * num_slots
    dy = dy.reshape(num_rows, -1)
    own = jnp.minimum(slots.slot, num_rows - 1)
    dx = _rows_matmul(dy, w, slots, own, num_rows, config.dx, True, "grouped_matmul_dx", interpret)
    dx = dx.reshape(x.shape[0], num_slots, -1)
    if slot_of is not None:
        choices = jax.vmap(lambda dx, slot: dx.at[slot].get(mode="fill", fill_value=0))(dx, slot_of)
        dx = jnp.sum(choices.astype(jnp.float32), axis=2).astype(x.dtype)
    dw = _dw(x.reshape(-1, x.shape[2]), dy, slots, source, config.dw, config.waves, interpret)
    return dx, dw, None, None, None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul(x, w, *, segments: Segments, token_of=None, slot_of=None, config=None, interpret=False):
    """See :func:`pallas_kernels.api.grouped_matmul`. Nothing that belongs to a dead slot is read, neither of x nor of dy.

    Args:
      config: tiles; None: chosen for an H200 and the dtype.
    """
    batch, num_tokens = x.shape[:2]
    config = CONFIGS[x.dtype] if config is None else config
    num_slots = num_tokens if token_of is None else token_of.shape[1]
    slots = SlotList.of(segments, num_slots, max(config.forward.tile, config.dx.tile, config.dw.depth))
    source = jnp.minimum(slots.slot, batch * num_slots - 1)  # padding reads some row, whose product is not stored
    if token_of is not None:
        source = source // num_slots * num_tokens + jnp.minimum(token_of.reshape(-1)[source], num_tokens - 1)
    return _grouped_matmul(num_slots, config, interpret, x, w, slots, source, slot_of)
