"""Gathers whose gradients are gathers: no float is ever scattered."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def gather_sum(
    x: Float[Array, "B P *C"], index: Int[Array, "B Q R"], inverse: Int[Array, "B P U"]
) -> Float[Array, "B Q *C"]:
    """y[b, q] = sum_r x[b, index[b, q, r]]; an index of P stands for nothing.

    ``inverse`` lists, for every row of x, the rows of y that took it (Q for none), so that the gradient is the same gather
    the other way round and no float is ever scattered.
    """
    padded = index.reshape(index.shape[0], -1)
    y = jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, padded)
    y = y.reshape(index.shape + x.shape[2:])
    return y[:, :, 0] if index.shape[2] == 1 else jnp.sum(y.astype(jnp.float32), axis=2).astype(x.dtype)


def _gather_sum_forward(x, index, inverse):
    return gather_sum(x, index, inverse), (index, inverse)


def _gather_sum_backward(indices, dy):
    index, inverse = indices
    return gather_sum(dy, inverse, index), None, None


gather_sum.defvjp(_gather_sum_forward, _gather_sum_backward)
