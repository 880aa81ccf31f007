"""Parameters and matmuls in the compute type, and the SwiGLU MLP."""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mom_jax.config import ModelConfig
from mom_jax.sharding import (
    constrain,
    constrain_tokens,
    leaf_name,
    letters_of_mlp,
    products_over_mesh,
    shares_tokens,
)
from pallas_kernels.api import rms_norm, stacked_matmul


def normal_param(rngs: nnx.Rngs, config: ModelConfig, *shape: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, initializer_range)."""
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones_param(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32))


class LayerWeight:
    """A layer's weight where it lies in the stack of its run, for the few rows of decoding: nothing is copied out of it.

    Stands for the array where this module's functions and the ops of decoding take it, and is no pytree.
    """

    def __init__(self, stack: jax.Array, layer: jax.Array, implementation: str | None):
        self.stack, self.layer, self.implementation = stack, layer, implementation

    def __getitem__(self, key):
        assert key is ..., "a weight in place is only whole"
        return self

    @staticmethod
    def fits(name: str, stack: jax.Array, dtype: str) -> bool:
        """Whether a parameter can be given as one to a model that computes in ``dtype``."""
        if name.startswith(("w_", "shared_", "attention_")):
            return stack.dtype == dtype
        return name.startswith(("router", "conv_")) or name.endswith("_norm")


def stack_of(weight: jax.Array | LayerWeight | None) -> jax.Array | None:
    """The stack [L, ...] in which a weight lies, of itself alone if it is an array."""
    return weight.stack if isinstance(weight, LayerWeight) else None if weight is None else weight[None]


class Deferred(NamedTuple):
    """RMSNorm(x), or silu(gate) x, left to the kernels of the products that take it; stands for the array in them."""

    x: jax.Array
    scale: LayerWeight | None = None
    eps: float = 0.0
    gate: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    def value(self) -> jax.Array:
        x = self.x if self.scale is None else rms_norm(self.x, self.scale.stack[self.scale.layer], self.eps)
        return x if self.gate is None else jax.nn.silu(self.gate) * x


def normalize(x: jax.Array, scale: jax.Array | LayerWeight, eps: float) -> jax.Array | Deferred:
    """RMSNorm(x), now or later."""
    return Deferred(x, scale, eps) if isinstance(scale, LayerWeight) else rms_norm(x, scale, eps)


class Product(NamedTuple):
    """One of the products of :func:`einsums`.

    Attributes:
      equation: "...d,mde->...me" or the like; the last axes of the first operand are contracted.
      weights: one, or those of several memories, one after another along the axis before the contracted ones; one without
        that axis is of one memory.
      out_dtype: of the result, None: the compute type.
    """

    equation: str
    weights: tuple[jax.Array | LayerWeight, ...]
    out_dtype: Any = None


def einsums(
    x: jax.Array | Deferred, products: dict[str, Product], *, dtype, residual: jax.Array | None = None,
    chosen: jax.Array | None = None,
) -> dict[str, jax.Array]:  # fmt: skip
    """Several products of one x by name. Of weights in place they are one pass over all of them.

    Args:
      dtype: the compute type, that of the operands; products are accumulated in float32.
      residual: is added to the results.
      chosen: the memories that count, [..., R]; what no x chose may come out as 0.
    """
    weights = [w for product in products.values() for w in product.weights]
    x = x if isinstance(x, Deferred) else Deferred(x)
    if not all(isinstance(w, LayerWeight) for w in weights):
        found = _products(x.value(), products, dtype)
        return found if residual is None else {name: residual + y for name, y in found.items()}
    matrices, shapes = zip(*(_in_place(x.shape, product) for product in products.values()), strict=True)
    width = matrices[0][0].shape[2]

    def rows(a):
        return None if a is None else a.reshape(-1, width).astype(dtype)

    found = stacked_matmul(
        rows(x.x), matrices, weights[0].layer, scale=stack_of(x.scale), eps=x.eps, gate=rows(x.gate),
        residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
        chosen=None if chosen is None else chosen.reshape(-1, chosen.shape[-1]),
        out_dtypes=tuple(product.out_dtype or dtype for product in products.values()),
        implementation=weights[0].implementation,
    )  # fmt: skip
    return {name: y.reshape(shape) for name, y, shape in zip(products, found, shapes, strict=True)}


def _in_place(shape: tuple[int, ...], product: Product) -> tuple[tuple[jax.Array, ...], tuple[int, ...]]:
    """The stacks of a product as [L, M, D, N], and the shape of its result for x of this shape."""
    of_x, of_w, of_y = re.fullmatch(r"(\w+),(\w+)->(\w+)", product.equation).groups()
    contracted = [letter for letter in of_x if letter not in of_y]
    before, count, stacks = of_w.index(contracted[0]), len(contracted), [w.stack for w in product.weights]
    rest = stacks[0].shape[stacks[0].ndim - len(of_w) + before + count :]
    width = math.prod(shape[-count:])
    matrices = tuple(w.reshape(w.shape[0], -1, width, math.prod(rest)) for w in stacks)
    memories = (sum(w.shape[1] for w in matrices),) * before
    return matrices, (*shape[:-count], *memories, *rest)


def _products(x: jax.Array, products: dict[str, Product], dtype) -> dict[str, jax.Array]:
    if shares_tokens(x) and all(map(_is_of_one_matrix, products.values())):
        factors = [(product.equation, *product.weights) for product in products.values()]
        return dict(zip(products, products_over_mesh(partial(_einsum, dtype=dtype), x, factors), strict=True))
    return {name: _product(x, product, dtype) for name, product in products.items()}


def _is_of_one_matrix(product: Product) -> bool:
    """Whether it is of one weight that has the equation's axes, and its result of the compute type."""
    of_w = re.fullmatch(r"\w+,(\w+)->\w+", product.equation)[1]
    return len(product.weights) == 1 and product.weights[0].ndim == len(of_w) and product.out_dtype is None


def _product(x: jax.Array, product: Product, dtype) -> jax.Array:
    of_w = re.fullmatch(r"\w+,(\w+)->\w+", product.equation)[1]
    weights = [w.stack[w.layer] if isinstance(w, LayerWeight) else w for w in product.weights]
    weights = [w[None] if w.ndim < len(of_w) else w for w in weights]
    multiply = _einsum if product.out_dtype is None else einsum_float32
    y = [multiply(product.equation, x, w, dtype=dtype) for w in weights]
    return y[0] if len(y) == 1 else jnp.concatenate(y, axis=-1 - (len(of_w) - 2))


def einsum(equation: str, x: jax.Array | Deferred, w: jax.Array | LayerWeight, *, dtype, residual=None) -> jax.Array:
    """x w, plus ``residual``: :func:`einsums` of one product."""
    return einsums(x, {"": Product(equation, (w,))}, dtype=dtype, residual=residual)[""]


def _einsum(equation: str, x: jax.Array, w: jax.Array, *, dtype) -> jax.Array:
    precision = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    return jnp.einsum(equation, x.astype(dtype), w.astype(dtype), precision=precision)


def einsum_float32(equation: str, x: jax.Array, w: jax.Array, *, dtype) -> jax.Array:
    """Einsum with operands in the compute type and a float32 result.

    The algorithm is named, because the gradient's operands are float32 and would be multiplied as such.
    """
    precision = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.DotAlgorithmPreset.BF16_BF16_F32
    x, w = x.astype(dtype), w.astype(dtype)
    return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32)


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
        self.dtype, self.width = config.dtype, config.mlp_size
        self.w_gate = normal_param(rngs, config, config.hidden_size, config.mlp_size)
        self.w_up = normal_param(rngs, config, config.hidden_size, config.mlp_size)
        self.w_down = normal_param(rngs, config, config.mlp_size, config.hidden_size)

    def __call__(
        self, x: Float[Array, "B T D"] | Deferred, residual: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        of_x = letters_of_mlp(x, self.width)
        weights = {"gate": self.w_gate, "up": self.w_up}
        products = {name: Product(f"{of_x}d,df->{of_x}f", (w[...],)) for name, w in weights.items()}
        y, w_down = einsums(x, products, dtype=self.dtype), self.w_down[...]
        if isinstance(w_down, LayerWeight):
            hidden = Deferred(y["up"], gate=y["gate"])
        else:
            hidden = constrain(jax.nn.silu(y["gate"]) * y["up"], f"{of_x}f")
        return constrain_tokens(einsum(f"{of_x}f,fd->{of_x}d", hidden, w_down, dtype=self.dtype, residual=residual))
