"""From logits to the next token: a pure function, and the settings that choose what it does."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mom_jax.config import require


class Options(NamedTuple):
    """A :class:`Sampling` as :func:`next_token` takes it: which fields are None is known while compiling, values are not.

    So another value compiles nothing, and what is not used is not computed. A temperature of None is greedy.
    """

    temperature: np.generic | Float[Array, ""] | None = None
    top_k: np.generic | Int[Array, ""] | None = None
    top_p: np.generic | Float[Array, ""] | None = None
    min_p: np.generic | Float[Array, ""] | None = None
    repetition_penalty: np.generic | Float[Array, ""] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The fields mean what they mean in Hugging Face transformers and apply in its order:
    repetition_penalty, temperature, top_k, top_p, min_p. Tokens as probable as the least probable one kept are kept too.

    Raises ``ValueError`` naming the field, the value and what is allowed.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that have this probability together; 1: from all (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw from tokens at least this times as probable as the most probable one; 0: from all (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or drawn before are divided by it, negative ones multiplied (arXiv 1909.05858)."""

    def __post_init__(self):
        is_integer = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        for name, is_allowed, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "it must be >= 0 and finite"),
            ("top_k", self.top_k is None or is_integer and self.top_k > 0, "None, or a positive integer"),
            ("top_p", 0 < self.top_p <= 1, "it must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "it must be from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "it must be > 0 and finite"),
        ):
            require(is_allowed, f"Sampling.{name}", getattr(self, name), allowed)

    def options(self) -> Options:
        """The fields that do something; the others None."""
        penalty = None if self.repetition_penalty == 1 else np.float32(self.repetition_penalty)
        if self.temperature == 0:
            return Options(repetition_penalty=penalty)
        return Options(
            temperature=np.float32(self.temperature),
            top_k=None if self.top_k is None else np.int32(self.top_k),
            top_p=None if self.top_p == 1 else np.float32(self.top_p),
            min_p=None if self.min_p == 0 else np.float32(self.min_p),
            repetition_penalty=penalty,
        )


GREEDY, PLAIN = Sampling(temperature=0.0), Sampling()


def next_token(
    logits: Float[Array, "B O"], options: Options, keys: Key[Array, "B"], seen: Bool[Array, "B O"] | None = None
) -> Int[Array, "B"]:
    """One token of every row, int32.

    Args:
      logits: float32.
      keys: each row's own, so that a draw does not depend on the row's place; not looked at without a temperature.
      seen: the tokens that the repetition penalty is for; looked at only with one.
    """
    if options.repetition_penalty is not None:
        penalty = options.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if options.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The maximum becomes 0, so that no temperature, however small, leads to infinity less infinity.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / options.temperature
    logits = jnp.where(is_kept(logits, options), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def is_kept(logits: Float[Array, "B O"], options: Options) -> Bool[Array, "B O"]:
    """Whether the filters keep a token; the largest logit of every row is 0."""
    kept = jnp.ones(logits.shape, bool)
    # The distance from 0 as its bits: integers in the same order.
    ranks = lax.bitcast_convert_type(jnp.abs(logits), jnp.int32)
    if options.top_k is not None:
        kept = ranks <= _rank_that_reaches(options.top_k, ranks, jnp.ones(ranks.shape, jnp.int32))
    if options.top_p is not None:
        probability = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
        kept &= ranks <= _rank_that_reaches(options.top_p, ranks, probability)
    if options.min_p is not None:
        kept &= logits >= jnp.log(options.min_p)
    return kept


def _rank_that_reaches(
    target: Any, ranks: Int[Array, "B O"], weights: Float[Array, "B O"] | Int[Array, "B O"]
) -> Int[Array, "B 1"]:
    """The least rank that, with all below it, has ``target`` of the weights; the largest int32 if all together have not.

    Found bit by bit from the highest, without a sort: 31 sums over the vocabulary.
    """

    def set_bit(n, rank):
        larger = rank | (1 << 30) >> n
        below = jnp.sum(jnp.where(ranks < larger, weights, 0), axis=-1, keepdims=True)
        return jnp.where(below < target, larger, rank)

    return lax.fori_loop(0, 31, set_bit, jnp.zeros((len(ranks), 1), jnp.int32))
