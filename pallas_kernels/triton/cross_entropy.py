"""The rows of the cross-entropy over a vocabulary: from a row of logits to its loss and its gradient in one kernel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cross_entropy
from pallas_kernels.triton import ptx
from pallas_kernels.triton.launch import KernelConfig, launch

CONFIG = KernelConfig(tile=4096, num_warps=16, num_stages=1)
LOWEST = -1e30  # below every logit, and finite: its difference to -inf is a number


def linear_cross_entropy(hidden, head, targets, *, chunk, transposed, config=CONFIG, interpret=False):
    """See :func:`pallas_kernels.api.linear_cross_entropy`; the products are XLA's.

    Args:
      config: ``tile`` in columns of the logits.
    """
    rows = partial(softmax_rows, config=config, interpret=interpret)
    return cross_entropy.linear_cross_entropy(hidden, head, targets, chunk=chunk, transposed=transposed, rows=rows)


def softmax_rows(logits, targets, dtype, *, config=CONFIG, interpret=False):
    """See :func:`pallas_kernels.cross_entropy.softmax_rows`; a program for every row."""
    width = logits.shape[-1]
    operands = logits.reshape(-1, width), targets.reshape(-1)
    count = targets.size
    out_shape = (
        jax.ShapeDtypeStruct((count,), jnp.float32),
        jax.ShapeDtypeStruct((count,), jnp.int32),
        None if dtype is None else jax.ShapeDtypeStruct((count, width), dtype),
    )
    whole = partial(jax.tree.map, lambda _: pl.BlockSpec())
    losses, hits, dlogits = launch(
        partial(_kernel, tile=min(config.tile, pl.next_power_of_2(width)), interpret=interpret), *operands,
        name="softmax_rows", grid=(count,), in_specs=whole(operands), out_specs=whole(out_shape), out_shape=out_shape,
        config=config, interpret=interpret,
    )  # fmt: skip
    losses, hits = (x.reshape(targets.shape) for x in (losses, hits))
    return losses, hits, None if dtype is None else dlogits.reshape(logits.shape)


def _kernel(logits_ref, targets_ref, losses_ref, hits_ref, dlogits_ref, *, tile: int, interpret: bool):
    """The first sweep over the row keeps a maximum, its place and a sum for each lane: nothing is reduced until its end.

    The second goes back from the tile that was read last, which is the likeliest to be in a cache still.
    """
    row, width = pl.program_id(0), logits_ref.shape[1]
    count, lanes = pl.cdiv(width, tile), jnp.arange(tile)
    target = targets_ref[row]

    def load(i):
        columns = i * tile + lanes
        return columns, plgpu.load(logits_ref.at[row, columns], mask=columns < width, other=-jnp.inf)

    def reduce(i, carry):
        largest, place, total = carry
        x = load(i)[1]
        above = x - largest
        small = ptx.exp(-jnp.abs(above), interpret)  # of the larger of the two to the smaller
        total = jnp.where(above > 0, ptx.fma(total, small, jnp.ones_like(small), interpret), total + small)
        return jnp.maximum(largest, x), jnp.where(above > 0, i, place), total

    zeros = jnp.zeros(tile)
    largest, place, total = lax.fori_loop(0, count, reduce, (zeros + LOWEST, jnp.zeros(tile, jnp.int32), zeros))
    maximum = jnp.max(largest, axis=0)
    first = jnp.min(jnp.where(largest == maximum, place * tile + lanes, width), axis=0)
    log_sum = maximum + jnp.log(jnp.sum(total * ptx.exp(largest - maximum, interpret), axis=0))

    has_target, is_id = target >= 0, (target >= 0) & (target < width)
    label = plgpu.load(logits_ref.at[row, jnp.clip(target, 0, width - 1)], mask=is_id, other=jnp.nan)
    losses_ref[row] = jnp.where(has_target, log_sum - label, 0.0)
    hits_ref[row] = (first == target).astype(jnp.int32)
    if dlogits_ref is None:
        return
    shift = jnp.where(has_target, log_sum, jnp.inf)  # exp(x - inf) is the zero of a row without a target

    def differentiate(i, _):
        columns, x = load(count - 1 - i)
        dlogits = ptx.exp(x - shift, interpret) - jnp.where(columns == target, 1.0, 0.0)
        plgpu.store(dlogits_ref.at[row, columns], dlogits.astype(dlogits_ref.dtype), mask=columns < width)

    lax.fori_loop(0, count, differentiate, None)
