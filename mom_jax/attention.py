"""Causal softmax attention for the hybrid models: grouped heads, sliding window, rotary positions, a cache.

Padded tokens do not exist: positions and windows count a row's real tokens, those of a document from its beginning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from mom_jax.config import ModelConfig
from mom_jax.layers import Deferred, LayerState, Product, einsum, einsums, normal_param
from mom_jax.sharding import constrain, constrain_tokens
from pallas_kernels.api import with_states


class AttentionState(NamedTuple):
    """Keys and values of earlier tokens. With a window the cache is a ring of that size; otherwise it holds ``max_length``.

    Attributes:
      k, v: [B, cache, G, K], keys already rotated.
      position: int32 [B, cache], the token's place among the row's real tokens; -1: empty.
      document: int32 [B, cache].
      count: int32 [B], real tokens so far.
    """

    k: Float[Array, "B cache G K"]
    v: Float[Array, "B cache G K"]
    position: Int[Array, "B cache"]
    document: Int[Array, "B cache"]
    count: Int[Array, "B"]


def rotate(x: Float[Array, "B T H K"], position: Int[Array, "B T"], theta: float) -> Float[Array, "B T H K"]:
    """Rotary position embedding on halves of the head (arXiv 2104.09864, as in GPT-NeoX), in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(K)) v over the earlier real tokens of the same document (arXiv 1706.03762)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        attention = config.attention
        d, h = config.hidden_size, attention.num_heads
        self.num_kv_heads = attention.num_kv_heads or h
        self.head_width = d // h
        self.attention_q = normal_param(rngs, config, d, h, self.head_width)
        self.attention_k = normal_param(rngs, config, d, self.num_kv_heads, self.head_width)
        self.attention_v = normal_param(rngs, config, d, self.num_kv_heads, self.head_width)
        self.attention_o = normal_param(rngs, config, h, self.head_width, d)

    def init_state(self, batch_size: int, max_length: int) -> AttentionState:
        """An empty cache for ``max_length`` tokens, or for the window."""
        size = self.config.attention.window_size or max_length
        shape = (batch_size, size, self.num_kv_heads, self.head_width)
        return AttentionState(
            k=constrain(jnp.zeros(shape, self.config.dtype), "bTg"),
            v=constrain(jnp.zeros(shape, self.config.dtype), "bTg"),
            position=constrain(jnp.full((batch_size, size), -1, jnp.int32), "bT"),
            document=constrain(jnp.full((batch_size, size), -1, jnp.int32), "bT"),
            count=constrain(jnp.zeros(batch_size, jnp.int32), "b"),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"] | Deferred,
        mask: Bool[Array, "B T"] | None,
        documents: Int[Array, "B T"] | None,
        state: LayerState | None,
        residual: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], None, AttentionState | None]:
        """See :meth:`mom_jax.memory.MixtureOfMemories.__call__`; there is no routing to return.

        Tokens beyond the end of a cache without a window come out as NaN: nothing is forgotten silently.
        """
        config, attention = self.config, self.config.attention
        batch, num_tokens = x.shape[:2]
        real = jnp.ones((batch, num_tokens), bool) if mask is None else mask
        position = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        if state is not None:
            position = position + state.stack.count[state.layer][:, None]
        weights = {"q": self.attention_q, "k": self.attention_k, "v": self.attention_v}
        products = {name: Product("btd,dhk->bthk", (w[...],)) for name, w in weights.items()}
        letters = {"q": "bthk", "k": "btgk", "v": "btgk"}
        q, k, v = (constrain(y, letters[name]) for name, y in einsums(x, products, dtype=config.dtype).items())
        # Only differences of positions matter, so that counting through document borders changes nothing.
        q, k = (rotate(a, position, attention.rope_theta) for a in (q, k))

        if state is None and mask is None and documents is None:
            window = attention.window_size
            o = self._attend(q, k, v, is_causal=True, local_window_size=None if window is None else (window - 1, 0))
            return self._project(o, residual), None, None

        documents = jnp.zeros((batch, num_tokens), jnp.int32) if documents is None else documents
        new = AttentionState(k, v, jnp.where(real, position, -1), documents, jnp.sum(real, axis=1, dtype=jnp.int32))
        seen = new
        if state is not None:
            after = _write(state, new, is_ring=attention.window_size is not None)
            # A ring overwrites what the first tokens of a long piece still see: then old and new stand side by side.
            overwrites = attention.window_size is not None and num_tokens > 1
            seen = (state if overwrites else LayerState(after, state.layer)).get()
            # Left to choose a layout for the products, XLA would copy the caches of all layers to it and back.
            seen = jax.tree.map(lambda x: with_layout_constraint(x, Layout(range(x.ndim))), seen)
            if overwrites:
                parts = (jnp.concatenate(both, axis=1) for both in zip(seen[:4], new[:4], strict=True))
                seen = AttentionState(*parts, count=new.count)
        distance = position[:, :, None] - seen.position[:, None, :]
        visible = (seen.position[:, None, :] >= 0) & (distance >= 0)
        visible &= documents[:, :, None] == seen.document[:, None, :]
        if attention.window_size is not None:
            visible &= distance < attention.window_size
        visible |= ~real[..., None]  # padded tokens attend to anything, so that no softmax is empty
        if num_tokens == 1:
            o = _attend_once(q, seen, visible)
        else:
            o = self._attend(q, seen.k.astype(q.dtype), seen.v.astype(q.dtype), mask=visible[:, None])
        if state is None:
            return self._project(o, residual), None, None
        if attention.window_size is None:
            o = jnp.where((real & (position >= state.stack.k.shape[2]))[..., None, None], jnp.nan, o)
        return self._project(o, residual), None, after

    def _attend(self, q, k, v, **how):
        # A float32 product is not float32 on a GPU or TPU unless asked for, and this function has no argument for it.
        exact = jax.default_matmul_precision("highest" if self.config.dtype == "float32" else None)
        with exact:
            return jax.nn.dot_product_attention(q, k, v, **how)

    def _project(self, o, residual):
        y = einsum("bthk,hkd->btd", o, self.attention_o[...], dtype=self.config.dtype, residual=residual)
        return constrain_tokens(y)


def _attend_once(q: Float[Array, "B 1 H K"], seen: AttentionState, visible: Bool[Array, "B 1 cache"]) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v [B, 1, H, K] of one token. As sums, which read the cache once; products would copy v."""
    batch, _, num_heads, width = q.shape
    num_kv_heads = seen.k.shape[2]
    q_grouped = q.reshape(batch, 1, num_kv_heads, num_heads // num_kv_heads, width).astype(jnp.float32)
    logits = jnp.sum(q_grouped * seen.k[:, :, :, None], axis=-1) / width**0.5  # [B, cache, G, H / G]
    p = jax.nn.softmax(logits, axis=1, where=visible[:, 0, :, None, None])
    return jnp.sum(p[..., None] * seen.v[:, :, :, None], axis=1).reshape(q.shape).astype(q.dtype)


def _write(state: LayerState, new: AttentionState, is_ring: bool) -> AttentionState:
    """Puts the piece's real tokens into the layer's cache, at their positions; in a ring modulo its size, the last ones."""
    stack, layer = state
    size = stack.k.shape[2]
    count = stack.count[layer] + new.count
    is_kept, slots = new.position >= 0, new.position
    if is_ring:
        is_kept &= new.position >= count[:, None] - size
        slots = slots % size
    slots = jnp.where(is_kept, slots, size)  # from size on: dropped
    written = (with_states(old, layer, slots, fresh, mode="drop") for old, fresh in zip(stack[:4], new[:4], strict=True))
    return AttentionState(*written, count=stack.count.at[layer].set(count))
