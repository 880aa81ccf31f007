"""The cross-entropy of a linear head, chunk by chunk of the tokens: the logits of all tokens never exist.

When it is differentiated, the forward pass makes the gradients too, while a chunk's logits are there: three products of the
head's size, where computing the logits again in the backward pass takes four. The backward pass scales what was kept, the
gradients of the sum of losses: hidden's in its dtype, the head's in float32.

A vocabulary that is split over devices costs each chunk one collective, of four numbers a row and device.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def softmax_rows(logits, targets, dtype):
    """What the cross-entropy needs of each row of logits.

    Args:
      logits: float32 [B, C, O]. targets: [B, C], -1 for none.
      dtype: of the gradient; None: no gradient.

    Returns:
      float32 losses [B, C], zero without a target; whether the target is the first maximum [B, C]; and the losses' gradient
      with respect to the logits, softmax - one_hot, zero without a target, or None.
    """
    has_target, log_sum = targets >= 0, jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses, hits = jnp.where(has_target, log_sum - label, 0), jnp.argmax(logits, axis=-1) == targets
    if dtype is None:
        return losses, hits, None
    one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
    dlogits = jnp.exp(logits - log_sum[..., None]) - one_hot
    return losses, hits, jnp.where(has_target[..., None], dlogits, 0).astype(dtype)


def row_statistics(logits, targets):
    """What the other devices must know of each row of one device's logits.

    Args:
      logits: float32 [B, C, O]. targets: [B, C], columns of these logits, or others.

    Returns:
      float32 [4, B, C]: the maximum, sum exp(logits - maximum), the target's logit (0 if it is not here) and whether the
      target is the first maximum (0 or 1).
    """
    maximum = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - maximum[..., None]), axis=-1)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    label = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jnp.stack([maximum, total, label, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)])


def row_gradients(logits, targets, log_sums, dtype):
    """exp(logits - log_sums) - one_hot of the targets that are columns of these logits; log_sums: float32 [B, C]."""
    one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - log_sums[..., None]) - one_hot).astype(dtype)


def split_softmax_rows(logits, targets, dtype, *, axis_name, statistics=row_statistics, gradients=row_gradients):
    """:func:`softmax_rows` inside of ``shard_map``, where every device has its part of each row of logits.

    Args:
      axis_name: of the mesh axis, or axes, over which the rows are split, in their order.
      statistics, gradients: :func:`row_statistics` and :func:`row_gradients`, or kernels like them.
    """
    width, has_target = logits.shape[-1], targets >= 0
    columns = targets - lax.axis_index(axis_name) * width
    # Together, since what such a small collective takes is its latency.
    maximum, total, label, is_first = jnp.moveaxis(lax.all_gather(statistics(logits, columns), axis_name), 1, 0)
    log_sum = jnp.max(maximum, axis=0)
    log_sum += jnp.log(jnp.sum(total * jnp.exp(maximum - log_sum), axis=0))
    label = jnp.where(targets < len(maximum) * width, jnp.sum(label, axis=0), jnp.nan)
    losses = jnp.where(has_target, log_sum - label, 0)
    hits = jnp.take_along_axis(is_first, jnp.argmax(maximum, axis=0)[None], axis=0)[0] > 0
    if dtype is None:
        return losses, hits, None
    # exp(x - inf) is the zero of a row without a target.
    return losses, hits, gradients(logits, columns, jnp.where(has_target, log_sum, jnp.inf), dtype)


class Options(NamedTuple):
    chunk: int
    transposed: bool
    axis_name: str | tuple[str, ...] | None
    rows: Callable


def linear_cross_entropy(
    hidden, head, targets, *, chunk, transposed, axis_name, rows=softmax_rows, split_rows=split_softmax_rows
):  # fmt: skip
    """See :func:`pallas_kernels.api.linear_cross_entropy`; ``rows`` and ``split_rows``: those above, or with kernels."""
    chunk = min(chunk, hidden.shape[1])
    pad = -hidden.shape[1] % chunk
    hidden = jnp.pad(hidden, [(0, 0), (0, pad), (0, 0)])
    targets = jnp.pad(targets, [(0, 0), (0, pad)], constant_values=-1)
    rows = rows if axis_name is None else partial(split_rows, axis_name=axis_name)
    return _sums(Options(chunk, transposed, axis_name, rows), hidden, head, targets)


def _product(equation: str, a, b):
    """Einsum with a float32 result; the algorithm is named, so that float32 is never multiplied as less."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.DotAlgorithmPreset.BF16_BF16_F32
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _loop(options: Options, hidden, head, targets, differentiate: bool):
    """The sums, and the gradients of the first with respect to hidden and the head (or None)."""
    dtype, axes = hidden.dtype, "od" if options.transposed else "do"
    weight = head.astype(dtype)

    def piece(dhead, xs):
        hidden, targets = xs
        logits = _product(f"btd,{axes}->bto", hidden, weight)
        losses, hits, dlogits = options.rows(logits, targets, dtype if differentiate else None)
        if not differentiate:
            return None, (losses, hits, None)
        operands = {"d": hidden, "o": dlogits}
        dhead += _product(f"bt{axes[0]},bt{axes[1]}->{axes}", *(operands[axis] for axis in axes))
        return dhead, (losses, hits, _product(f"bto,{axes}->btd", dlogits, weight).astype(dtype))

    def pieces(x):
        """Of every row, so that rows stay on their devices."""
        return jnp.moveaxis(x.reshape(x.shape[0], -1, options.chunk, *x.shape[2:]), 1, 0)

    dhead = jnp.zeros(head.shape, jnp.float32) if differentiate else None
    dhead, (losses, hits, dhidden) = lax.scan(piece, dhead, (pieces(hidden), pieces(targets)))
    sums = jnp.sum(losses), jnp.sum(hits, dtype=jnp.float32)
    return sums, (jnp.moveaxis(dhidden, 0, 1).reshape(hidden.shape), dhead.astype(head.dtype)) if differentiate else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options, hidden, head, targets):
    return _loop(options, hidden, head, targets, differentiate=False)[0]


def _sums_forward(options, hidden, head, targets):
    return _loop(options, hidden, head, targets, differentiate=True)


def _sums_backward(options, gradients, cotangents):
    cotangent = cotangents[0]
    if options.axis_name is not None:  # the gradient of a sum over devices: shard_map gives each of them a part of it
        cotangent = lax.psum(cotangent, options.axis_name)
    return *((cotangent * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None


_sums.defvjp(_sums_forward, _sums_backward)
