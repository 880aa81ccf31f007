"""Gated DeltaNet (arXiv 2412.06464), the update rule of the official MoM layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mom_jax.config import ModelConfig
from mom_jax.layers import einsum, einsum_float32, einsums, normal_param
from mom_jax.routing import Dispatch
from pallas_kernels import api
from pallas_kernels.api import SEGMENT_ALIGNMENT, Place, Segments

Streams = dict[str, jax.Array]


class GatedDelta(nnx.Module):
    """The projections and gates of every memory, and the gated delta rule::

        q = l2norm(x W_q)    k = l2norm(x W_k^m)    v = x W_v^m         each after the short convolution
        log a = -exp(A_log) softplus(x W_a^m + dt_bias)    b = sigmoid(x W_b^m)
        S <- a S + b k (v - a S^T k)^T                     o = K^-1/2 S^T q

    W_q, A_log and dt_bias serve all memories; with ``single_kv_proj`` so do the shared memory's k, v, a and b. *Streams* go
    through the short convolution: {"q", "k": [..., H, K], "v": [..., H, V]}; *gates* do not:
    {"log_decay", "beta": float32 [..., H]}. The state of a memory is one float32 matrix a head, [H, K, V].
    """

    normalized = ("q", "k")  # streams whose heads are divided by their l2 norm after the convolution

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, h, m = config.hidden_size, config.num_heads, config.num_memories
        k, v = config.head_dim, config.value_head_dim
        self.w_q = normal_param(rngs, config, d, h, k)
        if not config.single_kv_proj:
            self.w_k = normal_param(rngs, config, m, d, h, k)
            self.w_v = normal_param(rngs, config, m, d, h, v)
            self.w_a = normal_param(rngs, config, m, d, h)
            self.w_b = normal_param(rngs, config, m, d, h)
        if config.shared_memory or config.single_kv_proj:
            self.shared_k = normal_param(rngs, config, d, h, k)
            self.shared_v = normal_param(rngs, config, d, h, v)
            self.shared_a = normal_param(rngs, config, d, h)
            self.shared_b = normal_param(rngs, config, d, h)
        # A uniform in (0, 16), and decays whose time scales are log-uniform: dt from 0.001 to 0.1 after the softplus.
        tiny = jnp.finfo(jnp.float32).tiny
        self.a_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (h,), minval=tiny, maxval=16.0)))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (h,), minval=math.log(0.001), maxval=math.log(0.1)))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))

    def _stacked(self, name: str) -> jax.Array:
        """The weights of all memories, the shared one last; with ``single_kv_proj`` a stack of one."""
        stack = [] if self.config.single_kv_proj else [getattr(self, f"w_{name}")[...]]
        if self.config.shared_memory or self.config.single_kv_proj:
            stack.append(getattr(self, f"shared_{name}")[...][None])
        return jnp.concatenate(stack)

    def _side_by_side(self, *names: str) -> dict[str, tuple[str, Any]]:
        """Products with the weights of every memory, for short inputs.

        Not with one stack of them all, which would be a copy of them for every token.
        """
        products = {}
        for name in names:
            axes = "hk" if name in "kv" else "h"
            if not self.config.single_kv_proj:
                products[f"w_{name}"] = f"btd,md{axes}->btm{axes}", getattr(self, f"w_{name}")[...]
            if self.config.shared_memory or self.config.single_kv_proj:
                products[f"shared_{name}"] = f"btd,d{axes}->bt{axes}", getattr(self, f"shared_{name}")[...]
        return products

    def _of_all(self, name: str, products: dict[str, jax.Array]) -> jax.Array:
        """Those of ``_side_by_side`` as [B, T, M', ...], the shared memory the last."""
        parts = [products[f"w_{name}"]] if f"w_{name}" in products else []
        if f"shared_{name}" in products:
            parts.append(products[f"shared_{name}"][:, :, None])
        return jnp.concatenate(parts, axis=2)

    def projections(self) -> dict[str, tuple[str, Any]]:
        """The products of x that the streams of a short input are made of, as ``einsums`` takes them."""
        return {"q": ("btd,dhk->bthk", self.w_q[...])} | self._side_by_side("k", "v")

    def chosen_streams(self, products: dict[str, jax.Array], memories: Int[Array, "B T R"]) -> Streams:
        """The streams of each token in each of its memories, [B, T, R, H, ...], of the products of a short input."""
        streams = {"q": products["q"][:, :, None]}
        for name in "kv":
            y = self._of_all(name, products)
            at = jnp.zeros_like(memories) if self.config.single_kv_proj else memories
            streams[name] = jnp.take_along_axis(y, at[..., None, None], axis=2)
        return {name: jnp.broadcast_to(s, memories.shape + s.shape[3:]) for name, s in streams.items()}

    def token_streams(self, x: Float[Array, "B T D"]) -> Streams:
        """What does not depend on the memory, once a token."""
        dtype = self.config.dtype
        streams = {"q": einsum("btd,dhk->bthk", x, self.w_q[...], dtype=dtype)}
        if self.config.single_kv_proj:
            streams["k"] = einsum("btd,dhk->bthk", x, self.shared_k[...], dtype=dtype)
            streams["v"] = einsum("btd,dhv->bthv", x, self.shared_v[...], dtype=dtype)
        return streams

    def slot_streams(self, x: Float[Array, "B T D"], dispatch: Dispatch) -> Streams:
        """What depends on the memory, [B, N, H, ...]: grouped matmuls of the dispatched tokens."""
        if self.config.single_kv_proj:
            return {}

        weights = [self._stacked(name).astype(x.dtype) for name in ("k", "v")]
        # Two matrices and not one of both: the kernels that follow want k and v whole, so its halves would be copied.
        products = api.grouped_matmul(
            x, tuple(w.reshape(*w.shape[:2], -1) for w in weights), dispatch.segments, token_of=dispatch.token_of,
            slot_of=dispatch.slot_of, implementation=self.config.implementation,
        )  # fmt: skip
        k, v = (y.reshape(*y.shape[:2], *w.shape[2:]) for y, w in zip(products, weights, strict=True))
        return {"k": k, "v": v}

    def gates(self, x: Float[Array, "B T D"], memories: Int[Array, "B T R"]) -> Streams:
        """The gates of each token in each of its memories, [B, T, R, H]: a dense matmul for all memories, but if short."""
        if x.shape[1] < SEGMENT_ALIGNMENT:
            products = einsums(x, self._side_by_side("a", "b"), dtype=self.config.dtype, out_dtype=jnp.float32)
            raw = jnp.stack([self._of_all(name, products) for name in "ab"], axis=2)
        else:
            w = jnp.stack([self._stacked("a"), self._stacked("b")])  # [2, M', D, H]
            raw = einsum_float32("btd,gmdh->btgmh", x, w, dtype=self.config.dtype)
        log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(raw[:, :, 0] + self.dt_bias[...])
        gates = {"log_decay": log_decay, "beta": jax.nn.sigmoid(raw[:, :, 1])}
        if self.config.single_kv_proj:
            return {name: jnp.broadcast_to(g, memories.shape + g.shape[3:]) for name, g in gates.items()}
        chosen = (memories[..., None] == jnp.arange(raw.shape[3]))[..., None]  # [B, T, R, M', 1]
        # A masked sum instead of a gather: its gradient is no scatter.
        return {name: jnp.sum(jnp.where(chosen, g[:, :, None], 0), axis=3) for name, g in gates.items()}

    def run(self, streams: Streams, gates: Streams, segments: Segments, run_ids, state) -> tuple[jax.Array, jax.Array]:
        """The op over slots; normalised streams and gates are [B, N, ...]. Returns outputs [B, N, H, V] and final state."""
        return api.gated_delta_rule(
            streams["q"], streams["k"], streams["v"], gates["log_decay"], gates["beta"],
            segments=segments, run_ids=run_ids, initial_state=state, implementation=self.config.implementation,
        )  # fmt: skip

    def step(self, streams: Streams, gates: Streams, states: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
        """One token a row, [B, R, ...], into its states of a pool. Returns outputs [B, R, H, V] and the pool after it."""
        return api.gated_delta_rule_step(
            streams["q"], streams["k"], streams["v"], gates["log_decay"], gates["beta"], states, place,
            implementation=self.config.step_implementation,
        )  # fmt: skip

    def init_state(self, *leading: int) -> jax.Array:
        """The empty state, float32 [*leading, H, K, V]."""
        config = self.config
        return jnp.zeros((*leading, config.num_heads, config.head_dim, config.value_head_dim), jnp.float32)
