"""Few rows times a large matrix of a stack: what decoding spends its time with, bound by reading the matrices.

A program has some columns of one matrix, and reads each element once, from the stack where the matrix lies; XLA would first
copy it. Several rows are multiplied on the tensor cores; a row alone by sums, for which all of a program's loads are under
way at once, and which leave time for the norm or the gate before the product in the same kernel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import step as plain
from pallas_kernels.triton.chunks import tile_of
from pallas_kernels.triton.launch import MULTIPROCESSORS, KernelConfig, dot, launch, with_plain_gradient

MOST_ROWS = 64


def choose_config(rows: int, depth: int, total: int, dtype) -> tuple[KernelConfig, int]:
    """Columns of a program at most, warps and stages; and how much of the contracted axis it multiplies at a time."""
    columns = 32 if 2 * total >= 32 * MULTIPROCESSORS else 16
    if rows == 1:
        return KernelConfig(columns, num_warps=16), tile_of(depth, 32768 // columns)
    if dtype == jnp.bfloat16 and total >= 64 * MULTIPROCESSORS:
        return KernelConfig(columns, num_stages=5), tile_of(depth, 64)
    return KernelConfig(columns, num_stages=4 if dtype == jnp.bfloat16 else 2), tile_of(depth, 128)


class Operands(NamedTuple):
    """See :func:`pallas_kernels.api.stacked_matmul`; in a kernel all are references."""

    x: jax.Array
    weights: tuple
    layer: jax.Array
    scale: jax.Array | None
    gate: jax.Array | None
    residual: jax.Array | None
    chosen: jax.Array | None

    def load_x(self, at) -> tuple[jax.Array, jax.Array]:
        """A piece of the only row as it is multiplied but for the norm's division, which comes last; and x's squares."""
        x = self.x[0, at].astype(jnp.float32)
        squares = x * x
        if self.scale is not None:
            x *= self.scale[self.layer[()], at].astype(jnp.float32)
        if self.gate is not None:
            gate = self.gate[0, at].astype(jnp.float32)
            x *= gate * jax.nn.sigmoid(gate)
        return x, squares

    def is_wanted(self, matrix) -> jax.Array:
        rows, count = self.chosen.shape
        entry = lax.iota(jnp.int32, pl.next_power_of_2(rows * count))
        at, mask = (jnp.minimum(entry // count, rows - 1), entry % count), entry < rows * count
        found = plgpu.load(self.chosen.at[at], mask=mask, other=-1)
        return jnp.sum((found == matrix).astype(jnp.int32)) > 0


class Tiles(NamedTuple):
    """How a stack is cut: ``count`` tiles of ``columns`` of a matrix; ``first``: its first matrix's number in its group."""

    columns: int
    count: int
    first: int


def _kernel(operands: Operands, *y_refs, tiles: list[list[Tiles]], body):
    """Every program calls ``body`` for one column tile of one matrix of one stack."""
    program, layer, before = pl.program_id(0), operands.layer[()], 0
    for stacks, of_stacks, y_ref in zip(operands.weights, tiles, y_refs, strict=True):
        for w_ref, tile in zip(stacks, of_stacks, strict=True):
            after = before + w_ref.shape[1] * tile.count
            place = program - before
            @pl.when((place >= 0) & (program < after))
            def _(w_ref=w_ref, tile=tile, place=place, y_ref=y_ref):
                matrix, at = place // tile.count, pl.ds(place % tile.count * tile.columns, tile.columns)
                multiply = functools.partial(
                    body, operands, w_ref, (layer, matrix), y_ref, tile.first + matrix, at
                )
                if operands.chosen is None or y_ref.shape[1] == 1:
                    multiply()
                else:
                    is_wanted = operands.is_wanted(tile.first + matrix)
                    pl.when(is_wanted)(multiply)
                    pl.when(~is_wanted)(lambda: _clear(y_ref, tile.first + matrix, at))

            before = after


def _clear(y_ref, of_y, at):
    rows, columns = lax.iota(jnp.int32, pl.next_power_of_2(y_ref.shape[0])), at.start + lax.iota(jnp.int32, at.size)
    mask = (rows < y_ref.shape[0])[:, None] & (columns < y_ref.shape[2])[None, :]
    plgpu.store(y_ref.at[pl.ds(0, rows.size), of_y, at], jnp.zeros(mask.shape, y_ref.dtype), mask=mask)


def _multiply(operands: Operands, w_ref, of_w, y_ref, of_y, at, *, rows: int, depth: int):
    (num_rows, width), columns = operands.x.shape, at.start + lax.iota(jnp.int32, at.size)
    is_row, is_column = (lax.iota(jnp.int32, rows) < num_rows)[:, None], (columns < w_ref.shape[3])[None, :]
    all_rows = pl.ds(0, rows)

    def step(i, acc):
        contracted = pl.ds(i * depth, depth)
        x = plgpu.load(operands.x.at[all_rows, contracted], mask=jnp.broadcast_to(is_row, (rows, depth)), other=0)
        mask = None if w_ref.shape[3] % at.size == 0 else jnp.broadcast_to(is_column, (depth, at.size))
        w = plgpu.load(w_ref.at[(*of_w, contracted, at)], mask=mask, other=None if mask is None else 0)
        return acc + dot(x, w, x.dtype)

    acc = lax.fori_loop(0, width // depth, step, jnp.zeros((rows, at.size), jnp.float32))
    if operands.residual is not None:
        acc += plgpu.load(operands.residual.at[all_rows, at], mask=is_row & is_column, other=0).astype(jnp.float32)
    plgpu.store(y_ref.at[all_rows, of_y, at], acc.astype(y_ref.dtype), mask=is_row & is_column)


def _add_up(operands: Operands, w_ref, of_w, y_ref, of_y, at, *, depth: int, eps: float):
    width = operands.x.shape[1]
    acc, squares = jnp.zeros((depth, at.size), jnp.float32), jnp.zeros((depth,), jnp.float32)
    for start in range(0, width, depth):
        contracted = pl.ds(start, depth)
        x, of_x = operands.load_x(contracted)
        acc += x[:, None] * w_ref[(*of_w, contracted, at)].astype(jnp.float32)
        squares += of_x
    y = jnp.sum(acc, axis=0)
    if operands.scale is not None:
        y *= lax.rsqrt(jnp.sum(squares) / width + eps)
    if operands.residual is not None:
        y += operands.residual[0, at].astype(jnp.float32)
    y_ref[0, of_y, at] = y.astype(y_ref.dtype)


def stacked_matmul(x, weights, layer, *, scale, eps, gate, residual, chosen, out_dtypes, interpret=False):
    """See :func:`pallas_kernels.api.stacked_matmul`."""
    rows = x.shape[0]
    total = sum(w.shape[1] * w.shape[3] for stacks in weights for w in stacks)
    config, depth = choose_config(*x.shape, total, x.dtype)
    tiles, num_programs = [], 0
    for stacks in weights:
        tiles.append([])
        for w in stacks:
            columns = tile_of(w.shape[3], config.tile)
            if rows > 1 and columns < 16:  # the tensor cores multiply 16 columns at least
                columns = max(16, pl.next_power_of_2(w.shape[3]))
            tiles[-1].append(Tiles(columns, -(-w.shape[3] // columns), sum(w.shape[1] for w in stacks[: len(tiles[-1])])))
            num_programs += w.shape[1] * tiles[-1][-1].count
    if rows == 1:
        body = functools.partial(_add_up, depth=depth, eps=eps)
    else:
        body = functools.partial(_multiply, rows=max(16, pl.next_power_of_2(rows)), depth=depth)

    def kernel(integers, x, weights, scale, gate, residual):
        layer, chosen = integers
        if rows > 1:  # in the kernel they would stand between the loads and the tensor cores, in every program
            x, scale, gate = plain.before_product(x, layer, scale, eps, gate), None, None
        operands = Operands(x, weights, layer, scale, gate, residual, chosen)
        out_shape = tuple(
            jax.ShapeDtypeStruct((rows, sum(w.shape[1] for w in stacks), stacks[0].shape[3]), dtype)
            for stacks, dtype in zip(weights, out_dtypes, strict=True)
        )
        return launch(
            functools.partial(_kernel, tiles=tiles, body=body), operands, name="stacked_matmul", grid=(num_programs,),
            in_specs=(jax.tree.map(lambda _: pl.BlockSpec(), operands),),
            out_specs=jax.tree.map(lambda _: pl.BlockSpec(), out_shape), out_shape=out_shape, config=config,
            interpret=interpret,
        )  # fmt: skip

    def reference(integers, x, weights, scale, gate, residual):
        layer, chosen = integers
        options = {"scale": scale, "gate": gate, "residual": residual, "chosen": chosen}
        return plain.stacked_matmul(x, weights, layer, eps=eps, out_dtypes=out_dtypes, **options)

    return with_plain_gradient(kernel, reference, (layer, chosen), x, weights, scale, gate, residual)
