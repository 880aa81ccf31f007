"""Arithmetic that Triton, as XLA runs it, does not give: it fuses no product with a sum, and its exp and sigmoid are long.

The memory-bound kernels would be bound by issuing instructions otherwise. The interpreter knows no inline assembly and takes
the plain formula.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

# 1 / (1 + 2^(-x log2(e))); an overflow of the power gives 0, as it should.
_SIGMOID = """{
.reg .f32 t;
mul.f32 t, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 t, t;
add.f32 t, t, 0f3F800000;
rcp.approx.ftz.f32 $0, t;
}"""

# 2^(x log2(e)).
_EXP = """{
.reg .f32 t;
mul.f32 t, $1, 0f3FB8AA3B;
ex2.approx.ftz.f32 $0, t;
}"""


def _inline(asm: str, *args: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(*(a.shape for a in args))
    args = [jnp.broadcast_to(a, shape) for a in args]
    constraints = ",".join(["=f"] + ["f"] * len(args))
    out = [jax.ShapeDtypeStruct(shape, jnp.float32)]
    return plgpu.elementwise_inline_asm(asm, args=args, constraints=constraints, pack=1, result_shape_dtypes=out)[0]


def fma(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    """a b + c of float32 tiles, rounded once."""
    return a * b + c if interpret else _inline("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def exp(x: jax.Array, interpret: bool) -> jax.Array:
    """e^x of a float32 tile; relative error about 1e-7 (1 + |x|)."""
    return jnp.exp(x) if interpret else _inline(_EXP, x)


def sigmoid(x: jax.Array, interpret: bool) -> jax.Array:
    """1 / (1 + exp(-x)) of a float32 tile; relative error about 1e-6 (|x| < 16)."""
    return jax.nn.sigmoid(x) if interpret else _inline(_SIGMOID, x)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2^x of a float32 tile, 0 below the normal numbers; relative error 2^-22."""
    return jnp.exp2(x) if interpret else _inline("ex2.approx.ftz.f32 $0, $1;", x)
