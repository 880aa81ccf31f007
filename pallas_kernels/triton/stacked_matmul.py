"""Few rows times a large matrix of a stack: what decoding spends its time with, bound by reading the matrices.

A program has some columns of one matrix, and reads each element once; the matrix is picked out of the stack where it lies,
which XLA would copy first. Several rows are multiplied on the tensor cores; a row alone, and matrices of few columns, by
sums, for which all of a program's loads are under way at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import step as plain
from pallas_kernels.triton.chunks import tile_of
from pallas_kernels.triton.launch import MULTIPROCESSORS, KernelConfig, dot, launch, with_plain_gradient

MOST_ROWS = 64
SUMMED = 8192  # elements that a program multiplies at a time when it sums


def _kernel(x_ref, w_refs, layer_ref, *y_refs, tiles: list[tuple[int, int]], body):
    """Every program calls ``body`` for one column tile of one matrix of one stack; ``tiles``: their width and number."""
    program, row, first = pl.program_id(0), pl.program_id(1), 0
    for w_ref, y_ref, (columns, per_matrix) in zip(w_refs, y_refs, tiles, strict=True):
        after = first + w_ref.shape[1] * per_matrix

        @pl.when((program >= first) & (program < after))
        def _(w_ref=w_ref, y_ref=y_ref, columns=columns, per_matrix=per_matrix, place=program - first):
            matrix, at = place // per_matrix, pl.ds(place % per_matrix * columns, columns)
            body(x_ref, w_ref, y_ref, layer_ref[()], matrix, at, row)

        first = after


def _multiply(x_ref, w_ref, y_ref, layer, matrix, at, _, *, rows: int, depth: int):
    row = lax.iota(jnp.int32, rows)
    is_row = (row < x_ref.shape[0])[:, None]

    def step(i, acc):
        contracted = pl.ds(i * depth, depth)
        x = plgpu.load(x_ref.at[pl.ds(0, rows), contracted], mask=is_row, other=0)
        return acc + dot(x, w_ref[layer, matrix, contracted, at], x_ref.dtype)

    acc = lax.fori_loop(0, x_ref.shape[1] // depth, step, jnp.zeros((rows, at.size), jnp.float32))
    plgpu.store(y_ref.at[pl.ds(0, rows), matrix, at], acc.astype(y_ref.dtype), mask=is_row)


def _add_up(x_ref, w_ref, y_ref, layer, matrix, at, row):
    depth = tile_of(x_ref.shape[1], SUMMED // at.size)
    acc = jnp.zeros((depth, at.size), jnp.float32)
    for start in range(0, x_ref.shape[1], depth):
        x = x_ref[row, pl.ds(start, depth)].astype(jnp.float32)
        acc += x[:, None] * w_ref[layer, matrix, pl.ds(start, depth), at].astype(jnp.float32)
    y_ref[row, matrix, at] = jnp.sum(acc, axis=0).astype(y_ref.dtype)


def stacked_matmul(x, weights, layer, *, out_dtype, interpret=False):
    """See :func:`pallas_kernels.api.stacked_matmul`."""
    rows, depth = x.shape
    total = sum(w.shape[1] * w.shape[3] for w in weights)
    most = next(columns for columns in (64, 32, 16) if columns == 16 or total >= columns * 0.9 * MULTIPROCESSORS)
    columns = [tile_of(w.shape[3], most) for w in weights]
    tiles = [(c, w.shape[3] // c) for c, w in zip(columns, weights, strict=True)]
    num_tiles = sum(w.shape[1] * per_matrix for w, (_, per_matrix) in zip(weights, tiles, strict=True))
    if rows == 1 or min(columns) < 16:
        body, grid, config = _add_up, (num_tiles, rows), KernelConfig(most, num_warps=8)
    else:
        body = functools.partial(_multiply, rows=max(16, pl.next_power_of_2(rows)), depth=tile_of(depth, 128))
        grid, config = (num_tiles, 1), KernelConfig(most, num_stages=4 if x.dtype == jnp.bfloat16 else 2)

    def kernel(layer, x, weights):
        operands = x, weights, layer
        out_shape = tuple(jax.ShapeDtypeStruct((rows, w.shape[1], w.shape[3]), out_dtype) for w in weights)
        return launch(
            functools.partial(_kernel, tiles=tiles, body=body), *operands, name="stacked_matmul", grid=grid,
            in_specs=jax.tree.map(lambda _: pl.BlockSpec(), operands),
            out_specs=jax.tree.map(lambda _: pl.BlockSpec(), out_shape), out_shape=out_shape, config=config,
            interpret=interpret,
        )  # fmt: skip

    reference = functools.partial(plain.stacked_matmul, out_dtype=out_dtype)
    return with_plain_gradient(kernel, lambda layer, *arrays: reference(*arrays, layer), layer, x, tuple(weights))
