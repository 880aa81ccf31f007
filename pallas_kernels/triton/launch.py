"""What all kernels of this package share: the launch, and the products of tiles."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.device import current_device

# Given when a program is lowered, so outside our reach but for a filter; README.md says what the way out is.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)


MULTIPROCESSORS = 132  # of an H100 and an H200: how much work is cut into how many programs is reckoned with it


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel is cut up; the same results for every choice, up to the order of sums.

    Attributes:
      tile: side of the tile that one program computes, in elements; each kernel says of which axis.
      num_warps: warps (of 32 threads) of a program.
      num_stages: depth of the software pipeline of loads, where a program may use the 227 KiB of shared memory of an H200,
        on which all defaults were measured; on an A100 (163 KiB) it is one less, which is compiled but has not been run.
    """

    tile: int
    num_warps: int = 4
    num_stages: int = 2


def launch(
    kernel: Callable, *operands, name: str, grid, in_specs, out_specs, out_shape, config: KernelConfig, interpret: bool,
    aliases: dict[int, int] | None = None,
):  # fmt: skip
    """Runs ``kernel`` over ``grid``; ``name`` is what compiled programs and profiles call it.

    Args:
      aliases: flat operands that are written in place, as which flat results.
    """
    _check_blocks(name, grid, in_specs, operands)
    _check_blocks(name, grid, out_specs, out_shape)
    _, kind, capability = current_device()
    num_stages = max(1, config.num_stages - (capability == "8.0" or "A100" in kind))
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        name=name,
        interpret=interpret,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=num_stages),
    )(*operands)


def _check_blocks(name, grid, specs, arrays):
    """A block outside its array is read and written there on a GPU, unseen; the interpreter moves it inside.

    Seen at the grid's last program: index maps that grow with the grid are.
    """
    is_spec = lambda x: isinstance(x, pl.BlockSpec)  # noqa: E731
    for spec, array in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(arrays), strict=True):
        if spec.index_map is not None:
            last = spec.index_map(*(size - 1 for size in grid))
            sizes = (1 if size is None else size for size in spec.block_shape)
            ends = [(index + 1) * size for index, size in zip(last, sizes, strict=True)]
            assert all(end <= size for end, size in zip(ends, array.shape, strict=True)), (name, last, array.shape)


def dot(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """a b with operands in ``dtype`` and a float32 result.

    float32 operands are split into three bfloat16 parts each, six products: as exact as float32, and on the tensor cores,
    which HIGHEST would leave idle. Never TF32.
    """
    precision = lax.DotAlgorithmPreset.BF16_BF16_F32_X6 if dtype == jnp.float32 else None
    return jnp.dot(a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def with_plain_gradient(kernel: Callable, reference: Callable, integers, *arrays):
    """``kernel(integers, *arrays)``, whose gradient is that of the function ``reference`` of the same arguments."""

    def backward(residuals, cotangents):
        integers, arrays = residuals
        return None, *jax.vjp(lambda *arrays: reference(integers, *arrays), *arrays)[1](cotangents)

    function = jax.custom_vjp(kernel)
    function.defvjp(lambda integers, *arrays: (kernel(integers, *arrays), (integers, arrays)), backward)
    return function(integers, *arrays)
