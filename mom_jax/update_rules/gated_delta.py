"""Gated DeltaNet (arXiv 2412.06464), the update rule of the official MoM layer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mom_jax.config import ModelConfig
from mom_jax.layers import Product, einsum, einsum_float32, normal_param
from mom_jax.routing import Dispatch
from pallas_kernels import api
from pallas_kernels.api import Handover, Place, Segments

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

    def _of_all(self, name: str, out_dtype=None) -> Product:
        """The product with the weights of every memory, the shared one last, for short inputs.

        Not with one stack of them all, which would be a copy of them for every token.
        """
        axes = "hk" if name in "kv" else "h"
        weights = () if self.config.single_kv_proj else (getattr(self, f"w_{name}")[...],)
        if self.config.shared_memory or self.config.single_kv_proj:
            weights += (getattr(self, f"shared_{name}")[...],)
        return Product(f"btd,md{axes}->btm{axes}", weights, out_dtype)

    def products(self) -> dict[str, Product]:
        """The products of a short input, as ``einsums`` takes them, of which its streams and gates are made."""
        products = {name: self._of_all(name) for name in "kv"} | {name: self._of_all(name, jnp.float32) for name in "ab"}
        return products | {"q": Product("btd,dhk->bthk", (self.w_q[...],))}

    def streams(self, products: dict[str, jax.Array]) -> Streams:
        """Of a short input: [B, T, M', H, ...] of every memory, or [B, T, 1, H, ...] alike for all."""
        return {"q": products["q"][:, :, None], "k": products["k"], "v": products["v"]}

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
        """The gates of each token in each of its memories, [B, T, R, H], of a dense matmul for all memories."""
        w = jnp.stack([self._stacked("a"), self._stacked("b")])  # [2, M', D, H]
        raw = einsum_float32("btd,gmdh->btgmh", x, w, dtype=self.config.dtype)
        return self.chosen_gates({"a": raw[:, :, 0], "b": raw[:, :, 1]}, memories)

    def chosen_gates(self, products: dict[str, jax.Array], memories: Int[Array, "B T R"]) -> Streams:
        """The gates of each token in each of its memories, [B, T, R, H], of the products with the gates' weights."""
        log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(products["a"] + self.dt_bias[...])
        gates = {"log_decay": log_decay, "beta": jax.nn.sigmoid(products["b"])}
        if self.config.single_kv_proj:
            return {name: jnp.broadcast_to(g, memories.shape + g.shape[3:]) for name, g in gates.items()}
        chosen = (memories[..., None] == jnp.arange(log_decay.shape[2]))[..., None]  # [B, T, R, M', 1]
        # A masked sum instead of a gather: its gradient is no scatter.
        return {name: jnp.sum(jnp.where(chosen, g[:, :, None], 0), axis=3) for name, g in gates.items()}

    def run(
        self, streams: Streams, gates: Streams, segments: Segments, run_ids, state, handover: Handover | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The op over slots; normalised streams and gates are [B, N, ...]. Returns outputs [B, N, H, V] and final state."""
        return api.gated_delta_rule(
            streams["q"], streams["k"], streams["v"], gates["log_decay"], gates["beta"],
            segments=segments, run_ids=run_ids, initial_state=state, handover=handover,
            implementation=self.config.implementation,
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
