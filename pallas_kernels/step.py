"""One token at a time: the steps of the update rules, and the ops of decoding, over pools of which a token touches a few.

A *step* takes one token into one state and reads it. Steps work on any leading axes, so that decoding uses the same function
that defines the op.

A pool [L, B, S, ...] holds what every layer, row and segment (a memory, to the model) carries from token to token. Only the
chosen ones are read and written; in a compiled loop that carries the pool nothing else of it moves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.layer_ops import gated_rms_norm, l2_norm, rms_norm, route


def delta_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One token of the gated delta rule (arXiv 2412.06464, eq. 10), or of linear attention where ``beta`` is None::

        S <- a S;   S <- S + k (b (v - S^T k))^T   or   S <- S + k v^T;   o = S^T q

    Args:
      state: float32 [..., H, K, V].
      q, k: [..., H, K]; q is already scaled.
      v: [..., H, V].
      log_decay: log a, [..., H] a head or [..., H, K] a key; None: no decay.
      beta: b, [..., H]; None: no erasing.

    Returns:
      The new state and the output, float32 [..., H, V].
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(jnp.float32))
        state = state * (decay[..., None] if decay.ndim == k.ndim else decay[..., None, None])
    if beta is not None:
        erased = jnp.einsum("...kv,...k->...v", state, k, precision=lax.Precision.HIGHEST)
        v = beta.astype(jnp.float32)[..., None] * (v - erased)
    state = state + k[..., None] * v[..., None, :]
    return state, jnp.einsum("...kv,...k->...v", state, q, precision=lax.Precision.HIGHEST)


class Place(NamedTuple):
    """Which states of a pool [L, B, S, ...] the tokens of a step go into, one token a row.

    Attributes:
      layer: int32.
      index: int32 [B, R], different ones in a row.
      continues: bool [B, R], False: the state is entered afresh, as zeros.
      active: bool [B], False: the row's token is padding, and all its states stay to the bit.
    """

    layer: Int[Array, ""]
    index: Int[Array, "B R"]
    continues: Bool[Array, "B R"]
    active: Bool[Array, "B"]

    def read(self, pool: jax.Array) -> jax.Array:
        """The states [B, R, ...] as the tokens find them."""
        return jnp.where(_wide(self.continues, pool.ndim - 1), states_at(pool, self.layer, self.index), 0)

    def write(self, pool: jax.Array, new: jax.Array) -> jax.Array:
        """The pool with these states [B, R, ...], but for inactive rows."""
        old = states_at(pool, self.layer, self.index)
        new = jnp.where(_wide(self.active, pool.ndim - 1), new.astype(pool.dtype), old)
        return with_states(pool, self.layer, self.index, new, unique_indices=True, mode="promise_in_bounds")


def states_at(pool: jax.Array, layer: jax.Array, index: Int[Array, "B R"]) -> jax.Array:
    """pool[layer, b, index[b, r]] as [B, R, ...]; rows are a batch dimension, so that devices need no other's rows."""
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(2, pool.ndim - 1)), collapsed_slice_dims=(0, 2), start_index_map=(0, 2),
        operand_batching_dims=(1,), start_indices_batching_dims=(0,),
    )  # fmt: skip
    return lax.gather(pool, _pairs(layer, index), dimensions, (1, 1, 1, *pool.shape[3:]), mode="promise_in_bounds")


def with_states(pool: jax.Array, layer: jax.Array, index: Int[Array, "B R"], new: jax.Array, **how) -> jax.Array:
    """The pool with ``new`` [B, R, ...] at pool[layer, b, index[b, r]]; rows are a batch dimension here too.

    Args:
      how: the mode and so on of ``lax.scatter``.
    """
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, new.ndim)), inserted_window_dims=(0, 2), scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,), scatter_indices_batching_dims=(0,),
    )  # fmt: skip
    return lax.scatter(pool, _pairs(layer, index), new.astype(pool.dtype), dimensions, **how)


def _pairs(layer, index):
    return jnp.stack([jnp.broadcast_to(layer, index.shape), index], axis=-1)


def _wide(mask, ndim):
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def gated_delta_rule_step(q, k, v, log_decay, beta, states, place: Place, *, scale):
    """See :func:`pallas_kernels.api.gated_delta_rule_step`."""
    new, o = delta_step(place.read(states), scale * q.astype(jnp.float32), k, v, log_decay, beta)
    return o.astype(v.dtype), place.write(states, new)


def short_convolution_step(streams, weights, biases, histories, place: Place, *, normalized):
    """See :func:`pallas_kernels.api.short_convolution_step`."""
    outputs, after = {}, {}
    for name, x in streams.items():
        at = place.index if x.shape[1] > 1 else jnp.zeros_like(place.index)
        x = jnp.take_along_axis(x, at[..., None, None], axis=1)
        window = jnp.concatenate([place.read(histories[name]), x[:, :, None].astype(histories[name].dtype)], axis=2)
        y = jnp.sum(window.astype(jnp.float32) * weights[name][place.layer], axis=2)
        y = jax.nn.silu(y if biases[name] is None else y + biases[name][place.layer]).astype(x.dtype)
        outputs[name] = l2_norm(y) if name in normalized else y
        after[name] = place.write(histories[name], window[:, :, 1:])
    return outputs, after


def before_product(x, layer, scale, eps, gate):
    """silu(gate) rms_norm(x, scale[layer], eps), each if given."""
    x = x if scale is None else rms_norm(x, scale[layer], eps)
    return x if gate is None else jax.nn.silu(gate) * x


def stacked_matmul(x, weights, layer, *, scale, eps, gate, residual, chosen, out_dtypes):
    """See :func:`pallas_kernels.api.stacked_matmul`."""
    x = before_product(x, layer, scale, eps, gate)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.DotAlgorithmPreset.BF16_BF16_F32

    def product(stacks, dtype):
        parts = (
            jnp.einsum("rd,mdn->rmn", x, w[layer], precision=precision, preferred_element_type=jnp.float32) for w in stacks
        )
        y = jnp.concatenate(list(parts), axis=1)
        return (y if residual is None else y + residual[:, None]).astype(dtype)

    return tuple(product(stacks, dtype) for stacks, dtype in zip(weights, out_dtypes, strict=True))


def router_step(x, scale, weight, bias, layer, *, eps, top_k, has_shared):
    """See :func:`pallas_kernels.api.router_step`."""
    x = rms_norm(x, scale[layer], eps).astype(jnp.float32)
    logits = jnp.einsum("rd,dm->rm", x, weight[layer], precision=lax.Precision.HIGHEST)
    memories, weights, _ = route(logits, None if bias is None else bias[layer], top_k, has_shared)
    return memories, weights, logits


def combine_step(o, weights, gate, scale, layer, *, eps):
    """See :func:`pallas_kernels.api.combine_step`."""
    o = jnp.sum(o.astype(jnp.float32) * weights[..., None, None], axis=1).astype(o.dtype)
    return gated_rms_norm(o, gate, scale[layer], eps)
