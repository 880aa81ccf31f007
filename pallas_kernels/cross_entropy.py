"""The cross-entropy of a linear head, chunk by chunk of the tokens: the logits of all tokens never exist.

When it is differentiated, the forward pass makes the gradients too, while a chunk's logits are there: three products of the
head's size, where computing the logits again in the backward pass takes four. The backward pass scales what was kept, the
gradients of the sum of losses: hidden's in its dtype, the head's in float32.
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


class Options(NamedTuple):
    chunk: int
    transposed: bool
    rows: Callable


def linear_cross_entropy(hidden, head, targets, *, chunk, transposed, rows=softmax_rows):
    """See :func:`pallas_kernels.api.linear_cross_entropy`; ``rows`` is :func:`softmax_rows` or a kernel like it."""
    chunk = min(chunk, hidden.shape[1])
    pad = -hidden.shape[1] % chunk
    hidden = jnp.pad(hidden, [(0, 0), (0, pad), (0, 0)])
    targets = jnp.pad(targets, [(0, 0), (0, pad)], constant_values=-1)
    return _sums(Options(chunk, transposed, rows), hidden, head, targets)


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
    return *((cotangents[0] * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None


_sums.defvjp(_sums_forward, _sums_backward)
