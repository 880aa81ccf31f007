"""Stage 1 of the recurrences: scores and the inverse of the delta rule's triangular system, each chunk by itself::

    P_ij = scale q_i . k_j exp(g_i - g_j)  for j <= i          A_ij = b_i k_i . k_j exp(g_i - g_j)  for j < i
    T = (I + A)^-1

Two kernels: products of whole chunks want four warps and large operands, the inverse is a chain of small products that
each wait for the one before. There a program is one warp, so that many of them hide each other's waiting.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import CHUNK, Layout, load_rows, load_vector, within_chunk
from pallas_kernels.triton.launch import KernelConfig, dot, launch

CONFIG = KernelConfig(tile=CHUNK, num_warps=4, num_stages=1)
INVERSE = KernelConfig(tile=16, num_warps=1, num_stages=1)  # the smallest tile that tensor cores take


def unit_lower_inverse(a: dict, product) -> dict:
    """(I + A)^-1 for strictly lower triangular A, as blocks {(i, j): [C', C']} for j <= i, a power of two a side.

    Forward substitution, without the cancellation of powers of A for repeated keys: with X and Z the inverses of two
    neighbours on the diagonal and N the block below X and left of Z, the block between them is -Z N X.
    """
    count = max(i for i, _ in a) + 1
    inverse, size = {(i, i): _inverse_of_block(a[i, i], product) for i in range(count)}, 1
    while size < count:
        for first in range(0, count, 2 * size):
            columns, rows = range(first, first + size), range(first + size, first + 2 * size)
            right = {
                (i, j): sum(product(a[i, m], inverse[m, j]) for m in columns if m >= j) for i in rows for j in columns
            }  # fmt: skip
            inverse |= {
                (i, j): -sum(product(inverse[i, m], right[m, j]) for m in rows if m <= i) for i in rows for j in columns
            }  # fmt: skip
        size *= 2
    return inverse


def _inverse_of_block(a, product):
    """The same within a block: the inverses of 2, 4, 8 ... rows are merged by X - X N X, N masked."""
    i, j = jnp.arange(a.shape[0])[:, None], jnp.arange(a.shape[0])[None, :]
    inverse, size = jnp.where(i == j, 1.0, 0.0) - jnp.where(i // 2 == j // 2, a, 0.0), 2
    while size < a.shape[0]:
        merged = (i // (2 * size) == j // (2 * size)) & (i // size != j // size)
        inverse = inverse - product(product(inverse, jnp.where(merged, a, 0.0)), inverse)
        size *= 2
    return inverse


def _products_kernel(inputs, outputs, *, scale, dtype):
    chunk = pl.program_id(0)
    valid = inputs["valid"][chunk]

    @pl.when(valid > 0)
    def _():
        k = load_rows(inputs["k"], chunk, valid)
        within = within_chunk(inputs, chunk)
        rows = pl.ds(chunk * CHUNK, CHUNK)
        scores = scale * dot(load_rows(inputs["q"], chunk, valid), k.T, dtype) * within
        outputs["scores"][rows, :] = scores.astype(dtype)
        if inputs["beta"] is not None:
            i = jnp.arange(CHUNK)
            strict = jnp.where(i[:, None] > i[None, :], within, 0.0)
            outputs["system"][rows, :] = load_vector(inputs["beta"], chunk)[:, None] * dot(k, k.T, dtype) * strict


def _inverse_kernel(system_ref, valid_ref, inverse_ref, *, block):
    """The products split their operands into two bfloat16 parts each, three where the inverse is wanted in float32: with one
    part, or TF32, the error would be seen.
    """
    chunk, blocks = pl.program_id(0), range(CHUNK // block)
    algorithms = lax.DotAlgorithmPreset
    is_float32 = inverse_ref.dtype == jnp.float32
    precision = algorithms.BF16_BF16_F32_X6 if is_float32 else algorithms.BF16_BF16_F32_X3

    def product(x, y):
        return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)

    def at(i, j):
        return pl.ds(chunk * CHUNK + i * block, block), pl.ds(j * block, block)

    @pl.when(valid_ref[chunk] > 0)
    def _():
        inverse = unit_lower_inverse({(i, j): system_ref[at(i, j)] for i in blocks for j in blocks if j <= i}, product)
        for i in blocks:
            for j in blocks:
                value = inverse[i, j] if j <= i else jnp.zeros((block, block), jnp.float32)
                inverse_ref[at(i, j)] = value.astype(inverse_ref.dtype)


def prepare(q, k, g, beta, layout: Layout, *, scale: float, interpret: bool, config: KernelConfig = CONFIG):
    """Scores P and inverses T, [B, H, N, C] of q's dtype; T is None without ``beta``. Unowned chunks are not written."""
    batch, num_slots, heads, width = q.shape
    rows = pl.BlockSpec((None, num_slots, None, width), lambda n, h, b: (b, 0, h, 0))
    vector = pl.BlockSpec((None, None, num_slots), lambda n, h, b: (b, h, 0))
    square = pl.BlockSpec((None, None, num_slots, CHUNK), lambda n, h, b: (b, h, 0, 0))
    operands = {"q": q, "k": k, "g": g, "beta": beta, "run": layout.run, "valid": layout.valid}
    specs = {
        "q": rows, "k": rows, "g": None if g is None else vector, "beta": None if beta is None else vector,
        "run": None if layout.run is None else pl.BlockSpec((None, num_slots), lambda n, h, b: (b, 0)),
        "valid": pl.BlockSpec((None, layout.valid.shape[1]), lambda n, h, b: (b, 0)),
    }  # fmt: skip
    squares = (batch, heads, num_slots, CHUNK)
    shapes = {"scores": jax.ShapeDtypeStruct(squares, q.dtype)}
    if beta is not None:
        shapes["system"] = jax.ShapeDtypeStruct(squares, jnp.float32)
    grid = (num_slots // CHUNK, heads, batch)
    out = launch(
        functools.partial(_products_kernel, scale=scale, dtype=q.dtype), operands, name="recurrence_prepare", grid=grid,
        in_specs=(specs,), out_specs=dict.fromkeys(shapes, square), out_shape=shapes, config=config, interpret=interpret,
    )  # fmt: skip
    if beta is None:
        return out["scores"], None
    inverse = launch(
        functools.partial(_inverse_kernel, block=INVERSE.tile), out["system"], layout.valid, name="recurrence_inverse",
        grid=grid, in_specs=[square, specs["valid"]], out_specs=square, out_shape=jax.ShapeDtypeStruct(squares, q.dtype),
        config=INVERSE, interpret=interpret,
    )  # fmt: skip
    return out["scores"], inverse
