"""The router, the balance losses, and the dispatch of tokens to the slots of their memories.

Everything is a pure function on static shapes. No token is dropped, no order is lost: a memory's slots hold its tokens in
their order in the row, found by counting, without a sort; rows never mix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mom_jax.config import ModelConfig
from mom_jax.layers import Deferred, einsum, normal_param, stack_of
from mom_jax.sharding import constrain_tokens
from pallas_kernels.api import SEGMENT_ALIGNMENT, Segments, combine, gather_sum, route, router_step


class RouterBias(nnx.Variable):
    """The loss-free balancing bias: state of training, not a parameter."""


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      memories: int32 [B, T, R'], the memories of each token; the shared memory, if any, is the last, number M.
      weights: float32 [B, T, R'], adding up to 1 over the routed memories; 1 for the shared one.
      logits: float32 [B, T, M].
      load: float32 [M], part of the real tokens that chose each memory (adding up to R).
      importance: float32 [M], mean router probability over the real tokens.
      z_loss: float32 scalar, mean of logsumexp(logits)^2 over the real tokens (arXiv 2202.08906, eq. 5).
    """

    memories: Int[Array, "B T R"]
    weights: Float[Array, "B T R"]
    logits: Float[Array, "B T M"]
    load: Float[Array, "M"]
    importance: Float[Array, "M"]
    z_loss: Float[Array, ""]


class Router(nnx.Module):
    """p = softmax(x W), the R largest renormalised to add up to 1, all in float32; ties go to the lowest index.

    With loss-free balancing (arXiv 2408.15664) a bias is added to p for the selection only.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.router = normal_param(rngs, config, config.hidden_size, config.num_memories)
        if config.router_bias_rate > 0:
            self.router_bias = RouterBias(jnp.zeros(config.num_memories, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"] | Deferred, mask: Bool[Array, "B T"] | None) -> Routing:
        config, router = self.config, self.router[...]
        bias = self.router_bias[...] if config.router_bias_rate > 0 else None
        if isinstance(x, Deferred):
            rows = x.x.reshape(-1, x.shape[-1])
            found = router_step(
                rows, stack_of(x.scale), stack_of(router), stack_of(bias), router.layer, eps=x.eps, top_k=config.top_k,
                has_shared=config.shared_memory, implementation=router.implementation,
            )  # fmt: skip
            memories, weights, logits = (a.reshape(*x.shape[:2], -1) for a in found)
            probabilities = jax.nn.softmax(logits, axis=-1)
        else:
            logits = constrain_tokens(einsum("btD,DM->btM", x, router, dtype="float32"))
            memories, weights, probabilities = route(logits, bias, config.top_k, config.shared_memory)

        is_chosen = memories[..., : config.top_k, None] == jnp.arange(config.num_memories)  # [B, T, R, M]
        real = jnp.ones(x.shape[:2], jnp.float32) if mask is None else mask.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(real), 1)
        load = jnp.sum(jnp.where(is_chosen, real[..., None, None], 0), axis=(0, 1, 2)) / count
        importance = jnp.sum(probabilities * real[..., None], axis=(0, 1)) / count
        z_loss = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real) / count
        return Routing(memories, weights, logits, load, importance, z_loss)


def balance_loss(load: Float[Array, "L M"], importance: Float[Array, "L M"], form: str) -> Float[Array, ""]:
    """The load-balance loss of the Switch Transformer (arXiv 2101.03961, eqs. 4-6) summed over the R choices::

        M sum_m load_m importance_m

    Args:
      load, importance: of each MoM layer, over the same tokens.
      form: "per_layer": the mean over layers of each layer's loss; "global": one loss of all layers' tokens together.
    """
    if form == "global":
        load, importance = jnp.mean(load, axis=0), jnp.mean(importance, axis=0)
    return load.shape[-1] * jnp.mean(jnp.sum(load * importance, axis=-1))


class Dispatch(NamedTuple):
    """Tokens <-> slots. Dead slots and padded tokens point at nothing (an index past the end).

    Where each token is its own slot, :meth:`in_place`, there are segments only.

    Attributes:
      segments: one segment a memory.
      slot_of: int32 [B, T, R'], the slot of each token in each of its memories; N for padded tokens.
      token_of: int32 [B, N], the token in each slot; T for dead slots.
      choice_of: int32 [B, N], token * R' + the place of the slot's memory among the token's choices; T R' if dead.
    """

    segments: Segments
    slot_of: Int[Array, "B T R"] | None = None
    token_of: Int[Array, "B N"] | None = None
    choice_of: Int[Array, "B N"] | None = None

    @classmethod
    def of(
        cls, memories: Int[Array, "B T R"], mask: Bool[Array, "B T"] | None, num_memories: int, has_shared: bool
    ) -> "Dispatch":
        """Lays out the slots: memory by memory, each memory's tokens in order, rounded up to the alignment.

        Args:
          memories: different memories of each token, the shared one last; those outside [0, num_memories) get no slot.
          mask: False for padded tokens, which get no slot; None: all are real.
          num_memories: memories, the shared one included.
          has_shared: whether the last memory is chosen by every token.
        """
        batch, num_tokens, choices = memories.shape
        real = jnp.ones((batch, num_tokens), bool) if mask is None else mask
        chosen = (memories[..., None] == jnp.arange(num_memories)) & real[..., None, None]  # [B, T, R', M']
        takes = jnp.any(chosen, axis=2).astype(jnp.int32)
        until = jnp.cumsum(takes, axis=1)
        segments = Segments.from_lengths(until[:, -1])
        slot = segments.offsets[:, None, :-1] + until - takes  # where each memory would put each token, [B, T, M']
        num_slots = slot_bound(num_tokens, min(choices, num_memories), num_memories, has_shared)
        slot_of = jnp.sum(jnp.where(chosen, slot[:, :, None], 0), axis=-1, dtype=jnp.int32)
        slot_of = jnp.where(jnp.any(chosen, axis=-1), slot_of, num_slots)

        def invert(slot_of):
            empty = jnp.full(num_slots, num_tokens * choices, jnp.int32)
            return empty.at[slot_of.reshape(-1)].set(jnp.arange(num_tokens * choices, dtype=jnp.int32), mode="drop")

        choice_of = jax.vmap(invert)(slot_of)
        return cls(segments, slot_of, choice_of // choices, choice_of)

    @classmethod
    def in_place(cls, batch: int, num_tokens: int) -> "Dispatch":
        """Of a single memory, whose weight is 1, and rows without padding of a multiple of the alignment."""
        return cls(Segments.full(batch, num_tokens))

    def to_slots(self, x: Float[Array, "B T *C"]) -> Float[Array, "B N *C"]:
        """Each token's row in each of its slots, zero in dead slots."""
        return gather_sum(x, self.token_of[..., None], self.slot_of)

    def choices_to_slots(self, x: Float[Array, "B T R *C"]) -> Float[Array, "B N *C"]:
        """What belongs to one token in one of its memories, in that slot; zero in dead slots."""
        if self.slot_of is None:
            return x[:, :, 0]
        batch, num_tokens, choices = self.slot_of.shape
        flat = x.reshape((batch, num_tokens * choices) + x.shape[3:])
        return gather_sum(flat, self.choice_of[..., None], self.slot_of.reshape(batch, -1, 1))

    def to_tokens(
        self, o: Float[Array, "B N H V"], weights: Float[Array, "B T R"], implementation: str | None
    ) -> Float[Array, "B T H V"]:
        """The weighted sum of each token's slots."""
        if self.slot_of is None:
            return o
        where = {"slot_of": self.slot_of, "token_of": self.token_of, "choice_of": self.choice_of}
        return combine(o, weights, **where, implementation=implementation)

    def integers_to_slots(self, x: Int[Array, "B T"]) -> Int[Array, "B N"]:
        """Integers of the tokens in their slots, 0 in dead slots."""
        if self.token_of is None:
            return x
        return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, self.token_of)


def slot_bound(num_tokens: int, choices: int, num_memories: int, has_shared: bool) -> int:
    """N: slots enough for any routing of ``num_tokens`` tokens to ``choices`` of ``num_memories`` memories."""

    def aligned(n):
        return -(-n // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT

    shared = aligned(num_tokens) if has_shared else 0
    routed_choices, routed = choices - has_shared, num_memories - has_shared
    return aligned(num_tokens * routed_choices) + SEGMENT_ALIGNMENT * routed + shared
