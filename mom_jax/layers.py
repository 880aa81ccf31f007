"""Parameters and matmuls in the compute type, and the SwiGLU MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mom_jax.config import ModelConfig
from mom_jax.sharding import constrain, leaf_name


def normal_param(rngs: nnx.Rngs, config: ModelConfig, *shape: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, initializer_range)."""
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones_param(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32))


def einsum(equation: str, *operands: jax.Array, dtype) -> jax.Array:
    """Einsum with operands and result in the compute type; products are accumulated in float32."""
    precision = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    return jnp.einsum(equation, *(x.astype(dtype) for x in operands), precision=precision)


def einsum_float32(equation: str, *operands: jax.Array, dtype) -> jax.Array:
    """Einsum with operands in the compute type and a float32 result.

    The algorithm is named, because the gradient's operands are float32 and would be multiplied as such.
    """
    precision = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.DotAlgorithmPreset.BF16_BF16_F32
    operands = [x.astype(dtype) for x in operands]
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)


def cast_weights(params: Any, dtype, of_embedding: bool = False) -> Any:
    """A tree of parameters with the weights of the layers' matmuls in the compute type: cast once, not at every use.

    Args:
      of_embedding: whether to cast the embedding and the head too; in training their gradients are float32.
    """
    names = ("w_", "shared_", "attention_") + (("embedding", "head") if of_embedding else ())

    def cast(path, x):
        return x.astype(dtype) if leaf_name(path).startswith(names) else x

    return jax.tree_util.tree_map_with_path(cast, params)


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.w_gate = normal_param(rngs, config, config.hidden_size, config.mlp_size)
        self.w_up = normal_param(rngs, config, config.hidden_size, config.mlp_size)
        self.w_down = normal_param(rngs, config, config.mlp_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = einsum("btd,df->btf", x, self.w_gate[...], dtype=self.dtype)
        up = einsum("btd,df->btf", x, self.w_up[...], dtype=self.dtype)
        hidden = constrain(jax.nn.silu(gate) * up, "btf")
        return constrain(einsum("btf,fd->btd", hidden, self.w_down[...], dtype=self.dtype), "btd")
