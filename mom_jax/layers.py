"""Parameters and matmuls in the compute type, and the SwiGLU MLP."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mom_jax.config import ModelConfig
from mom_jax.sharding import constrain, leaf_name
from pallas_kernels.api import stacked_matmul


def normal_param(rngs: nnx.Rngs, config: ModelConfig, *shape: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, initializer_range)."""
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones_param(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32))


class LayerWeight:
    """A layer's weight where it lies in the stack of its run, for the few rows of decoding: nothing is copied out of it.

    Stands for the array in :func:`einsum`, :func:`einsum_float32` and :func:`einsums` only, and is no pytree.
    """

    def __init__(self, stack: jax.Array, layer: jax.Array, implementation: str | None):
        self.stack, self.layer, self.implementation = stack, layer, implementation

    def __getitem__(self, key):
        assert key is ..., "a weight in place is only whole"
        return self

    @staticmethod
    def fits(name: str, stack: jax.Array, dtype: str) -> bool:
        """Whether a parameter can be given as one to a model that computes in ``dtype``."""
        if name == "router":
            return stack.dtype == jnp.float32
        return name.startswith(("w_", "shared_", "attention_")) and stack.dtype == dtype


def einsums(x: jax.Array, products: dict[str, tuple[str, Any]], *, dtype, out_dtype=None) -> dict[str, jax.Array]:
    """Several products of one x by name, each an equation "...d,mde->...me" and its weight; x's last axes are contracted.

    Of layers' weights in place they are one pass over all of them; each weight may have one axis before the contracted.

    Args:
      out_dtype: float32, or None: the compute type ``dtype``.
    """
    if not all(isinstance(w, LayerWeight) for _, w in products.values()):
        multiply = einsum if out_dtype is None else einsum_float32
        return {name: multiply(equation, x, w, dtype=dtype) for name, (equation, w) in products.items()}
    weights, shapes, first = [], [], next(iter(products.values()))[1]  # of one layer and one implementation, all of them
    for equation, weight in products.values():
        of_x, of_w, of_y = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation).groups()
        contracted = [letter for letter in of_x if letter not in of_y]
        before, count = of_w.index(contracted[0]), len(contracted)
        width, shape = math.prod(x.shape[-count:]), weight.stack.shape[1:]
        weights.append(weight.stack.reshape(weight.stack.shape[0], math.prod(shape[:before]), width, -1))
        shapes.append((*x.shape[:-count], *shape[:before], *shape[before + count :]))
    found = stacked_matmul(
        x.reshape(-1, weights[0].shape[2]).astype(dtype), tuple(weights), first.layer, out_dtype=out_dtype,
        implementation=first.implementation,
    )  # fmt: skip
    return {name: y.reshape(shape) for name, y, shape in zip(products, found, shapes, strict=True)}


def einsum(equation: str, *operands: jax.Array | LayerWeight, dtype) -> jax.Array:
    """Einsum with operands and result in the compute type; products are accumulated in float32."""
    if isinstance(operands[-1], LayerWeight):
        return einsums(operands[0], {"": (equation, operands[1])}, dtype=dtype)[""]
    precision = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    return jnp.einsum(equation, *(x.astype(dtype) for x in operands), precision=precision)


def einsum_float32(equation: str, *operands: jax.Array | LayerWeight, dtype) -> jax.Array:
    """Einsum with operands in the compute type and a float32 result.

    The algorithm is named, because the gradient's operands are float32 and would be multiplied as such.
    """
    if isinstance(operands[-1], LayerWeight):
        return einsums(operands[0], {"": (equation, operands[1])}, dtype=dtype, out_dtype=jnp.float32)[""]
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


class LayerState(NamedTuple):
    """The states of a run of layers, stacked, as one of the layers sees them: it updates its own in place, in a loop too.

    Attributes:
      stack: a pytree of arrays [layers, B, ...].
      layer: int32, this layer's number.
    """

    stack: Any
    layer: jax.Array

    def get(self) -> Any:
        """This layer's own state; a copy, which what is called for every token avoids."""
        return jax.tree.map(lambda s: s[self.layer], self.stack)

    def set(self, state: Any) -> Any:
        """The stack with this layer's state replaced."""
        return jax.tree.map(lambda s, new: s.at[self.layer].set(new.astype(s.dtype)), self.stack, state)


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.w_gate = normal_param(rngs, config, config.hidden_size, config.mlp_size)
        self.w_up = normal_param(rngs, config, config.hidden_size, config.mlp_size)
        self.w_down = normal_param(rngs, config, config.mlp_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        equation = "btd,df->btf"
        y = einsums(x, {"gate": (equation, self.w_gate[...]), "up": (equation, self.w_up[...])}, dtype=self.dtype)
        hidden = constrain(jax.nn.silu(y["gate"]) * y["up"], "btf")
        return constrain(einsum("btf,fd->btd", hidden, self.w_down[...], dtype=self.dtype), "btd")
