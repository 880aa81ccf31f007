"""Sampling text from the model, one compiled program for prompt and continuation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mom_jax.config import require
from mom_jax.model import MoMLanguageModel, check_inputs


def sample(
    model: MoMLanguageModel,
    tokens: Int[Array, "B T"],
    num_tokens: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    attention_mask: Array | None = None,
) -> Int[Array, "B num_tokens"]:
    """Continues every row of ``tokens`` by ``num_tokens`` tokens drawn from softmax(logits / temperature).

    Args:
      tokens: prompts, ragged ones padded on the left with ``attention_mask`` 0.
      key: random key of the draws.
      temperature: 0 takes the most probable token.
      top_k: draw from the k most probable tokens only; None: from all.

    Raises:
      ValueError: an argument is not allowed.
    """
    require(num_tokens > 0, "num_tokens", num_tokens, "it must be positive")
    require(temperature >= 0, "temperature", temperature, "it must be >= 0")
    vocab_size = model.config.vocab_size
    require(top_k is None or 0 < top_k <= vocab_size, "top_k", top_k, f"None, or from 1 to vocab_size = {vocab_size}")
    check_inputs(model, tokens, attention_mask, None, None)
    if attention_mask is not None and not isinstance(attention_mask, jax.core.Tracer):
        ends = np.asarray(attention_mask)[:, -1].tolist()
        require(all(ends), "the last column of attention_mask", ends, "every row ends with a real token: pad on the left")
    return _sample(*nnx.split(model), tokens, attention_mask, key, temperature, num_tokens, top_k)


@partial(jax.jit, static_argnums=(0, 6, 7))
def _sample(graph, values, tokens, attention_mask, key, temperature, num_tokens, top_k):
    model = nnx.merge(graph, values)
    batch, length = tokens.shape
    state = model.init_state(batch, length + num_tokens)
    out = model.hidden(tokens, attention_mask, state=state)
    logits = model.logits(out.hidden[:, -1:])[:, 0]

    def one(carry, key):
        logits, state = carry
        token = _draw(logits, key, temperature, top_k)
        out = model.hidden(token[:, None], state=state)
        return (model.logits(out.hidden)[:, 0], out.state), token

    _, drawn = jax.lax.scan(one, (logits, out.state), jax.random.split(key, num_tokens))
    return drawn.T


def _draw(logits: Float[Array, "B O"], key: jax.Array, temperature, top_k: int | None) -> Int[Array, "B"]:
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
