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


def linear_cross_entropy(hidden, head, targets, *, chunk, transposed, axis_name, config=CONFIG, interpret=False):
    """See :func:`pallas_kernels.api.linear_cross_entropy`; the products are XLA's.

    Args:
      config: ``tile`` in columns of the logits.
    """
    rows, statistics, gradients = (
        partial(kernel, config=config, interpret=interpret) for kernel in (softmax_rows, row_statistics, row_gradients)
    )
    return cross_entropy.linear_cross_entropy(
        hidden, head, targets, chunk=chunk, transposed=transposed, axis_name=axis_name, rows=rows,
        split_rows=partial(cross_entropy.split_softmax_rows, statistics=statistics, gradients=gradients),
    )  # fmt: skip


def softmax_rows(logits, targets, dtype, *, config=CONFIG, interpret=False):
    """See :func:`pallas_kernels.cross_entropy.softmax_rows`; a program for every row."""
    out_shape = (
        jax.ShapeDtypeStruct((targets.size,), jnp.float32),
        jax.ShapeDtypeStruct((targets.size,), jnp.int32),
        None if dtype is None else jax.ShapeDtypeStruct((targets.size, logits.shape[-1]), dtype),
    )
    losses, hits, dlogits = _launch("softmax_rows", _softmax_rows, (logits, targets), out_shape, config, interpret)
    losses, hits = (x.reshape(targets.shape) for x in (losses, hits))
    return losses, hits, None if dtype is None else dlogits.reshape(logits.shape)


def row_statistics(logits, targets, *, config=CONFIG, interpret=False):
    """See :func:`pallas_kernels.cross_entropy.row_statistics`."""
    out_shape = jax.ShapeDtypeStruct((4, targets.size), jnp.float32)
    found = _launch("row_statistics", _row_statistics, (logits, targets), out_shape, config, interpret)
    return found.reshape(4, *targets.shape)


def row_gradients(logits, targets, log_sums, dtype, *, config=CONFIG, interpret=False):
    """See :func:`pallas_kernels.cross_entropy.row_gradients`."""
    out_shape = jax.ShapeDtypeStruct((targets.size, logits.shape[-1]), dtype)
    operands = logits, targets, log_sums
    return _launch("row_gradients", _row_gradients, operands, out_shape, config, interpret).reshape(logits.shape)


def _launch(name, kernel, operands, out_shape, config, interpret):
    """``kernel``, a program for every row, of logits [B, C, O] and of what there is one of for every row [B, C]."""
    logits, *others = operands
    width, whole = logits.shape[-1], partial(jax.tree.map, lambda _: pl.BlockSpec())
    operands = logits.reshape(-1, width), *(x.reshape(-1) for x in others)
    return launch(
        partial(kernel, tile=min(config.tile, pl.next_power_of_2(width)), interpret=interpret), *operands,
        name=name, grid=(others[0].size,), in_specs=whole(operands), out_specs=whole(out_shape), out_shape=out_shape,
        config=config, interpret=interpret,
    )  # fmt: skip


def _load(logits_ref, row, i, tile: int):
    """The columns of a tile of a row, and its logits, -inf beyond the row."""
    columns = i * tile + jnp.arange(tile)
    return columns, plgpu.load(logits_ref.at[row, columns], mask=columns < logits_ref.shape[1], other=-jnp.inf)


def _reduce(logits_ref, row, tile: int, interpret: bool):
    """The row's maximum, its first place, and sum exp(x - maximum).

    The sweep over the row keeps a maximum, its place and a sum for each lane: nothing is reduced until its end.
    """
    width = logits_ref.shape[1]

    def reduce(i, carry):
        largest, place, total = carry
        x = _load(logits_ref, row, i, tile)[1]
        above = x - largest
        small = ptx.exp(-jnp.abs(above), interpret)  # of the larger of the two to the smaller
        total = jnp.where(above > 0, ptx.fma(total, small, jnp.ones_like(small), interpret), total + small)
        return jnp.maximum(largest, x), jnp.where(above > 0, i, place), total

    zeros = jnp.zeros(tile)
    beginning = zeros + LOWEST, jnp.zeros(tile, jnp.int32), zeros
    largest, place, total = lax.fori_loop(0, pl.cdiv(width, tile), reduce, beginning)
    maximum = jnp.max(largest, axis=0)
    first = jnp.min(jnp.where(largest == maximum, place * tile + jnp.arange(tile), width), axis=0)
    return maximum, first, jnp.sum(total * ptx.exp(largest - maximum, interpret), axis=0)


def _differentiate(logits_ref, dlogits_ref, row, target, shift, tile: int, interpret: bool):
    """Writes exp(x - shift) - one_hot; back from the tile that was read last, the likeliest to be in a cache still."""
    width = logits_ref.shape[1]
    count = pl.cdiv(width, tile)

    def differentiate(i, _):
        columns, x = _load(logits_ref, row, count - 1 - i, tile)
        dlogits = ptx.exp(x - shift, interpret) - jnp.where(columns == target, 1.0, 0.0)
        plgpu.store(dlogits_ref.at[row, columns], dlogits.astype(dlogits_ref.dtype), mask=columns < width)

    lax.fori_loop(0, count, differentiate, None)


def _label(logits_ref, row, target, other):
    """The target's logit, ``other`` if it is no column."""
    width = logits_ref.shape[1]
    is_column = (target >= 0) & (target < width)
    return plgpu.load(logits_ref.at[row, jnp.clip(target, 0, width - 1)], mask=is_column, other=other)


def _softmax_rows(logits_ref, targets_ref, losses_ref, hits_ref, dlogits_ref, *, tile: int, interpret: bool):
    row = pl.program_id(0)
    target = targets_ref[row]
    maximum, first, total = _reduce(logits_ref, row, tile, interpret)
    log_sum, has_target = maximum + jnp.log(total), target >= 0
    losses_ref[row] = jnp.where(has_target, log_sum - _label(logits_ref, row, target, jnp.nan), 0.0)
    hits_ref[row] = (first == target).astype(jnp.int32)
    if dlogits_ref is not None:
        shift = jnp.where(has_target, log_sum, jnp.inf)  # exp(x - inf) is the zero of a row without a target
        _differentiate(logits_ref, dlogits_ref, row, target, shift, tile, interpret)


def _row_statistics(logits_ref, targets_ref, statistics_ref, *, tile: int, interpret: bool):
    row = pl.program_id(0)
    target = targets_ref[row]
    maximum, first, total = _reduce(logits_ref, row, tile, interpret)
    is_first = (first == target).astype(jnp.float32)
    for i, value in enumerate((maximum, total, _label(logits_ref, row, target, 0.0), is_first)):
        statistics_ref[i, row] = value


def _row_gradients(logits_ref, targets_ref, log_sums_ref, dlogits_ref, *, tile: int, interpret: bool):
    row = pl.program_id(0)
    _differentiate(logits_ref, dlogits_ref, row, targets_ref[row], log_sums_ref[row], tile, interpret)
