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


def _products_kernel(x_ref, w_ref, layer_ref, y_ref, *, rows: int, columns: int, depth: int):
    matrix, at = pl.program_id(1), pl.ds(pl.program_id(0) * columns, columns)
    row = lax.iota(jnp.int32, rows)
    is_row, layer = (row < x_ref.shape[0])[:, None], layer_ref[()]

    def step(i, acc):
        contracted = pl.ds(i * depth, depth)
        x = plgpu.load(x_ref.at[pl.ds(0, rows), contracted], mask=is_row, other=0)
        return acc + dot(x, w_ref[layer, matrix, contracted, at], x_ref.dtype)

    acc = lax.fori_loop(0, x_ref.shape[1] // depth, step, jnp.zeros((rows, columns), jnp.float32))
    plgpu.store(y_ref.at[pl.ds(0, rows), matrix, at], acc.astype(y_ref.dtype), mask=is_row)


def _sums_kernel(x_ref, w_ref, layer_ref, y_ref, *, columns: int, depth: int):
    matrix, row, at = pl.program_id(1), pl.program_id(2), pl.ds(pl.program_id(0) * columns, columns)
    layer, acc = layer_ref[()], jnp.zeros((depth, columns), jnp.float32)
    for start in range(0, x_ref.shape[1], depth):
        x = x_ref[row, pl.ds(start, depth)].astype(jnp.float32)
        acc += x[:, None] * w_ref[layer, matrix, pl.ds(start, depth), at].astype(jnp.float32)
    y_ref[row, matrix, at] = jnp.sum(acc, axis=0).astype(y_ref.dtype)


def stacked_matmul(x, w, layer, *, out_dtype, interpret=False):
    """See :func:`pallas_kernels.api.stacked_matmul`."""
    (rows, depth), (_, matrices, _, width) = x.shape, w.shape
    by_sums = rows == 1 or width % 16
    columns = tile_of(width, 32 if matrices * width < 64 * MULTIPROCESSORS else 64)
    if by_sums:
        sizes = {"columns": columns, "depth": tile_of(depth, SUMMED // columns)}
        body, grid, config = _sums_kernel, (width // columns, matrices, rows), KernelConfig(columns, num_warps=8)
    else:
        sizes = {"rows": max(16, pl.next_power_of_2(rows)), "columns": columns, "depth": tile_of(depth, 128)}
        config = KernelConfig(columns, num_stages=4 if x.dtype == jnp.bfloat16 else 2)
        body, grid = _products_kernel, (width // columns, matrices)

    def kernel(layer, x, w):
        return launch(
            functools.partial(body, **sizes), x, w, layer, name="stacked_matmul", grid=grid, in_specs=[pl.BlockSpec()] * 3,
            out_specs=pl.BlockSpec(), out_shape=jax.ShapeDtypeStruct((rows, matrices, width), out_dtype), config=config,
            interpret=interpret,
        )  # fmt: skip

    reference = functools.partial(plain.stacked_matmul, out_dtype=out_dtype)
    return with_plain_gradient(kernel, lambda layer, x, w: reference(x, w, layer), layer, x, w)
