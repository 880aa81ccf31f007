"""Products in the compute type, and the MLP against numpy."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import draw, small
from numerics import relative_l2

from mom_jax import layers
from mom_jax.layers import SwiGLU


def silu(x):
    return x / (1 + np.exp(-x))


def test_einsum_accumulates_in_float32():
    """4,096 products of 1 are 4,096 in bfloat16 only if the sum is not; float32 products are full float32."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert layers.einsum("ij,kj->ik", ones, ones, dtype="bfloat16")[0, 0] == 4096
    precise = jnp.array([[1.0 + 2.0**-12]])
    assert layers.einsum("ij,kj->ik", precise, jnp.ones((1, 1)), dtype="float32")[0, 0] == precise[0, 0]


def test_swiglu():
    graph, values = nnx.split(nnx.eval_shape(lambda: SwiGLU(small(), rngs=nnx.Rngs(0))))
    weights = draw(nnx.to_pure_dict(values))
    nnx.replace_by_pure_dict(values, weights)
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    gate, up, down = (np.asarray(weights[name], np.float64) for name in ("w_gate", "w_up", "w_down"))
    expected = (silu(x @ gate) * (x @ up)) @ down
    assert relative_l2(nnx.merge(graph, values)(jnp.asarray(x)), expected) < 1e-5
