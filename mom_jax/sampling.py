"""From logits to the next token: a pure function, and the settings that choose what it does."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    allowed: np.ndarray | Bool[Array, "O"] | None = None  # no field of Sampling: the tokens that may be drawn at all


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
    if options.allowed is not None:
        logits = jnp.where(options.allowed, logits, -jnp.inf)
    if options.repetition_penalty is not None:
        penalty = options.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if options.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The maximum becomes 0, so that no temperature, however small, leads to infinity less infinity.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / options.temperature
    logits = jnp.where(logits < _least_kept(logits, options)[:, None], -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _least_kept(logits: Float[Array, "B O"], options: Options) -> Float[Array, "B"]:
    """The smallest logit that the filters keep, the largest logit being 0: one sort, and only where it is needed."""
    least = jnp.full(logits.shape[0], -jnp.inf)
    if options.top_k is not None or options.top_p is not None:
        # Thresholds found bit by bit, without a sort, took five times as long on an H200 (1 x 32,000).
        ordered = jnp.sort(logits, axis=-1, descending=True)
    if options.top_k is not None:
        least = jnp.take(ordered, options.top_k - 1, axis=-1)
        ordered = jnp.where(ordered < least[:, None], -jnp.inf, ordered)
    if options.top_p is not None:
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of all more probable tokens together
        least = jnp.maximum(least, jnp.min(jnp.where(before < options.top_p, ordered, jnp.inf), axis=-1))
    if options.min_p is not None:
        least = jnp.maximum(least, jnp.log(options.min_p))
    return least
