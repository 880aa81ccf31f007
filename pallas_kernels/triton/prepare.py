"""Stage 1 of the recurrences: scores and the inverse of the delta rule's triangular system, each chunk by itself::

    P_ij = scale q_i . k_j exp(g_i - g_j)  for j <= i          A_ij = b_i k_i . k_j exp(g_i - g_j)  for j < i
    T = (I + A)^-1
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import CHUNK, Layout, load_rows, load_vector, within_chunk
from pallas_kernels.triton.launch import KernelConfig, dot, launch

CONFIG = KernelConfig(tile=CHUNK, num_warps=4, num_stages=1)


def unit_lower_inverse(a: jax.Array, dtype) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A, float32 [C, C], by merging the inverses of blocks of 1, 2, 4 ... rows.

    With X the inverse of the block diagonal and N the blocks below it that the next larger blocks take in, the merged
    inverse is X - X N X: forward substitution, without the cancellation of powers of A for repeated keys. The products
    split their operands into two bfloat16 parts each, three where the inverse is wanted in float32: with one part, or TF32,
    the error would be seen.
    """
    algorithms = lax.DotAlgorithmPreset
    precision = algorithms.BF16_BF16_F32_X6 if dtype == jnp.float32 else algorithms.BF16_BF16_F32_X3

    def product(x, y):
        return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)

    i, j = jnp.arange(CHUNK)[:, None], jnp.arange(CHUNK)[None, :]
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(i // 2 == j // 2, a, 0.0)
    block = 2
    while block < CHUNK:
        merged = (i // (2 * block) == j // (2 * block)) & (i // block != j // block)
        inverse = inverse - product(product(inverse, jnp.where(merged, a, 0.0)), inverse)
        block *= 2
    return inverse


def _kernel(inputs, outputs, *, scale, dtype):
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
            a = load_vector(inputs["beta"], chunk)[:, None] * dot(k, k.T, dtype) * strict
            outputs["inverse"][rows, :] = unit_lower_inverse(a, dtype).astype(dtype)


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
    names = ("scores",) if beta is None else ("scores", "inverse")
    out = launch(
        functools.partial(_kernel, scale=scale, dtype=q.dtype),
        operands,
        name="recurrence_prepare",
        grid=(num_slots // CHUNK, heads, batch),
        in_specs=(specs,),
        out_specs={name: square for name in names},
        out_shape={name: jax.ShapeDtypeStruct((batch, heads, num_slots, CHUNK), q.dtype) for name in names},
        config=config,
        interpret=interpret,
    )
    return out["scores"], out.get("inverse")
