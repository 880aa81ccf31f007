"""What a chunk of one head does to the state, on plain 2-d values: the body of the forward kernel and, through ``jax.vjp``,
of the backward kernel.

Mosaic, the TPU's compiler for Pallas, has no cumulative sum, sort or triangular solve, and a row does not become a column by
a reshape: sums over masks and products with masks do all of that.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunked import CHUNK, unit_lower_inverse


def step(state, q, k, v, g, beta, run, *, scale: float):
    """The chunk's outputs and the state after it, both float32; the equations and their names are those of chunked.py.

    Args:
      state: float32 [K, V].
      q, k: [C, K]. v: [C, V], whose dtype is that of the operands of products.
      g: cumulative log-decay, float32, a head [1, C] or a key [C, K]; None: no decay.
      beta: float32 [1, C]; None: linear attention.
      run: float32 [1, C], how many runs begin in the chunk up to and including the slot.
    """
    dtype, row, column = v.dtype, _iota(0), _iota(1)
    q, k, new = q.astype(jnp.float32) * scale, k.astype(jnp.float32), v.astype(jnp.float32)
    run_column, last_run = _as_column(run), jnp.max(run, axis=1, keepdims=True)
    same_run = run_column == run
    is_per_key = g is not None and g.shape[0] == CHUNK
    if g is None:
        decay, decay_to_end, decay_of_state = None, None, jnp.ones((1, 1), jnp.float32)
    else:
        at = g if is_per_key else _as_column(g)
        end = jnp.sum(jnp.where(lax.broadcasted_iota(jnp.int32, at.shape, 0) == CHUNK - 1, at, 0), axis=0, keepdims=True)
        decay, decay_to_end = jnp.exp(at), jnp.exp(end - at)
        decay_of_state = _as_column(jnp.exp(end)) if is_per_key else jnp.exp(end)

    def scores(a, mask):
        if is_per_key:
            return jnp.where(mask, _scores_per_key(a, k, g, dtype), 0)
        products = product("ik,jk->ij", a, k, dtype)
        if g is not None:
            products *= jnp.exp(jnp.where(mask, at - g, 0))  # masked before exp: above the diagonal it would overflow
        return jnp.where(mask, products, 0)

    def carried(x):
        """What meets the state before the chunk: its own decay, and nothing from the first run border on."""
        return jnp.where(run_column == 0, x if g is None else x * decay, 0)

    if beta is not None:
        beta = _as_column(beta)
        inverse = unit_lower_inverse(beta * scores(k, same_run & (column < row)), CHUNK)
        # The error first and its product with the inverse then: what is rounded is not the two large parts of it.
        error = new - product("ik,kv->iv", carried(k), state, dtype)
        new = product("ij,jv->iv", inverse, beta * error, dtype)
    o = product("ik,kv->iv", carried(q), state, dtype)
    o += product("ij,jv->iv", scores(q, same_run & (column <= row)), new, dtype)
    tail = jnp.where(run_column == last_run, k if g is None else k * decay_to_end, 0)
    state = jnp.where(last_run == 0, decay_of_state, 0) * state + product("ik,iv->kv", tail, new, dtype)
    return state, o


def _scores_per_key(a, b, g, dtype):
    """P_ij = sum_c a_ic b_jc exp(g_ic - g_jc) for j <= i, anything for j > i.

    Every pair j < i has one largest power of two, ``size``, in which i lies in an odd block and j in the even block before
    it. Relative to the end of that even block both decays are at most 1: a product for every size.
    """
    row, column = _iota(0), _iota(1)
    scores = jnp.where(row == column, jnp.sum(a * b, axis=1, keepdims=True), 0)
    size = 1
    while size < CHUNK:
        pairs = _pairs(size, a, b, g, dtype)
        scores += jnp.where(row // (2 * size) == column // (2 * size), pairs, 0)
        size *= 2
    return scores


def _pairs(size, a, b, g, dtype):
    row, column, slot = _iota(0), _iota(1), lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0)
    border = jnp.where(column == row // (2 * size) * (2 * size) + size - 1, 1.0, 0.0)
    since, is_odd = g - product("ij,jk->ik", border, g, jnp.float32), slot // size % 2 == 1
    late = jnp.where(is_odd, a * jnp.exp(jnp.where(is_odd, since, 0)), 0)
    early = jnp.where(is_odd, 0, b * jnp.exp(jnp.where(is_odd, 0, -since)))
    return product("ik,jk->ij", late, early, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, a, b, dtype):
    """Einsum of two matrices, operands in ``dtype``, the result float32; its gradients are such products too."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        equation, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


def _product_forward(equation, a, b, dtype):
    return product(equation, a, b, dtype), (a, b)


def _product_backward(equation, dtype, operands, cotangent):
    a, b = operands
    inputs, result = equation.split("->")
    of_a, of_b = inputs.split(",")
    da = product(f"{result},{of_b}->{of_a}", cotangent, b, dtype)
    return da, product(f"{of_a},{result}->{of_b}", a, cotangent, dtype)


product.defvjp(_product_forward, _product_backward)


def _iota(axis: int):
    return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)


def _as_column(row):
    """[1, n] as [n, 1]."""
    shape = (row.shape[1],) * 2
    is_same = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.sum(jnp.where(is_same, row, 0), axis=1, keepdims=True)
