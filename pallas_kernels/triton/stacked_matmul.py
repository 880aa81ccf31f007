"""Few rows times a large matrix of a stack: what decoding spends its time with, bound by reading the matrices.

A program has some columns of one matrix and all rows, and reads each element once; the matrix is picked out of the stack
where it lies, which XLA would copy first.
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


def _kernel(x_ref, w_ref, layer_ref, y_ref, *, rows: int, columns: int, depth: int):
    matrix, at = pl.program_id(1), pl.ds(pl.program_id(0) * columns, columns)
    row = lax.iota(jnp.int32, rows)
    is_row, layer = (row < x_ref.shape[0])[:, None], layer_ref[()]

    def step(i, acc):
        contracted = pl.ds(i * depth, depth)
        x = plgpu.load(x_ref.at[pl.ds(0, rows), contracted], mask=is_row, other=0)
        return acc + dot(x, w_ref[layer, matrix, contracted, at], x_ref.dtype)

    acc = lax.fori_loop(0, x_ref.shape[1] // depth, step, jnp.zeros((rows, columns), jnp.float32))
    plgpu.store(y_ref.at[pl.ds(0, rows), matrix, at], acc.astype(y_ref.dtype), mask=is_row)


def stacked_matmul(x, w, layer, *, interpret=False, config: KernelConfig | None = None):
    """See :func:`pallas_kernels.api.stacked_matmul`.

    Args:
      config: ``tile`` columns a program; None: as few as give every multiprocessor some.
    """
    (rows, depth), (_, matrices, _, width) = x.shape, w.shape
    if config is None:
        few = matrices * width < 64 * MULTIPROCESSORS
        config = KernelConfig(tile=32 if few else 64, num_warps=4, num_stages=4 if x.dtype == jnp.bfloat16 else 2)
    columns = tile_of(width, config.tile)

    def kernel(layer, x, w):
        return launch(
            functools.partial(
                _kernel, rows=max(16, pl.next_power_of_2(rows)), columns=columns, depth=tile_of(depth, 128)
            ),
            x, w, layer, name="stacked_matmul", grid=(width // columns, matrices), in_specs=[pl.BlockSpec()] * 3,
            out_specs=pl.BlockSpec(), out_shape=jax.ShapeDtypeStruct((rows, matrices, width), x.dtype), config=config,
            interpret=interpret,
        )  # fmt: skip

    return with_plain_gradient(kernel, lambda layer, x, w: plain.stacked_matmul(x, w, layer), layer, x, w)
