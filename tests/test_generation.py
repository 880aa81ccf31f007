"""Sampling: the compiled loop of prefill and single tokens draws what the full forward pass says."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import model_of, small

from mom_jax.generation import sample

NEW = 5  # tokens drawn
# So wide a prompt is dispatched to slots; pieces below 64 tokens, and the drawn ones, go token by token.
CONFIGS = {
    "mom": small(),
    "hybrid_with_window": small("hybrid", num_layers=2),
    "attention": small("attention_only"),  # without a window, so that the cache must hold everything
}
LENGTHS = (70, 66, 1)


@cache
def prompts() -> tuple[jax.Array, jax.Array]:
    """Ragged prompts, padded on the left with an id that is a real one elsewhere, and their mask."""
    tokens = np.random.default_rng(0).integers(61, size=(len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    mask = np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]
    return jnp.asarray(tokens), jnp.asarray(mask.astype(np.int32))


def draw(kind: str, seed: int = 0, **settings) -> np.ndarray:
    tokens, mask = prompts()
    return np.asarray(
        sample(model_of(CONFIGS[kind]), tokens, NEW, key=jax.random.key(seed), attention_mask=mask, **settings)
    )


def next_logits(kind: str, drawn: np.ndarray) -> np.ndarray:
    """What the full forward pass over prompt and drawn tokens gives for each drawn token: [B, NEW, O]."""
    tokens, mask = prompts()
    tokens = jnp.concatenate([tokens, drawn[:, :-1]], axis=1)
    mask = jnp.pad(mask, [(0, 0), (0, NEW - 1)], constant_values=1)
    return np.asarray(model_of(CONFIGS[kind])(tokens, mask).logits)[:, -NEW:]


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass(kind):
    drawn = draw(kind, temperature=0.0)
    assert drawn.shape == (len(LENGTHS), NEW) and drawn.dtype == np.int32
    logits = next_logits(kind, drawn)
    two_largest = np.sort(logits, axis=-1)[..., -2:]
    assert np.diff(two_largest, axis=-1).min() > 1e-3  # so that rounding decides nothing
    np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))


def test_padding_on_the_left_changes_nothing():
    """The last prompt, of one token, alone: it never sees the dispatch."""
    model, tokens = model_of(CONFIGS["mom"]), prompts()[0][2:, -1:]
    alone = sample(model, tokens, NEW, key=jax.random.key(0), temperature=0.0)
    np.testing.assert_array_equal(alone[0], draw("mom", temperature=0.0)[2])


def test_draws_depend_on_the_key_only():
    first = draw("mom", seed=3)
    np.testing.assert_array_equal(first, draw("mom", seed=3))
    assert (first != draw("mom", seed=4)).any()


def test_top_k_keeps_to_the_most_probable_tokens():
    np.testing.assert_array_equal(draw("attention", temperature=5.0, top_k=1), draw("attention", temperature=0.0))
    drawn = draw("attention", temperature=100.0, top_k=3)
    logits = next_logits("attention", drawn)
    rank = np.sum(logits > np.take_along_axis(logits, drawn[..., None], axis=-1), axis=-1)
    assert set(rank.ravel()) == {0, 1, 2}


def test_draws_follow_the_softmax_of_the_logits():
    """The first token after one prompt, drawn 4,000 times in one batch."""
    model = model_of(small("attention_only"))
    tokens = jnp.tile(jnp.array([[3, 1, 4]]), (4000, 1))
    drawn = sample(model, tokens, 1, key=jax.random.key(0), temperature=2.0)
    expected = jax.nn.softmax(model(tokens[:1]).logits[0, -1] / 2.0)
    found = np.bincount(np.asarray(drawn)[:, 0], minlength=61) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))


PADDED_RIGHT = jnp.array([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_tokens": 0}, "num_tokens = 0 is not allowed: it must be positive"),
        ({"temperature": -0.1}, "temperature = -0.1 is not allowed: it must be >= 0"),
        ({"top_k": 0}, "top_k = 0 is not allowed: None, or from 1 to vocab_size = 61"),
        ({"top_k": 62}, "top_k = 62 is not allowed"),
        ({"tokens": jnp.full((2, 3), 61)}, r"a token id = \[61\] is not allowed: ids run from 0 to .* = 60"),
        ({"tokens": jnp.zeros((2, 0), jnp.int32)}, r"the shape of tokens = \(2, 0\) is not allowed"),
        ({"attention_mask": jnp.ones((2, 4))}, r"the shape of attention_mask = \(2, 4\) is not allowed"),
        ({"attention_mask": PADDED_RIGHT}, r"the last column of attention_mask = \[1, 0\] is .* pad on the left"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(unchecked_shapes, settings, message):
    settings = {"tokens": jnp.zeros((2, 3), jnp.int32), "num_tokens": 1} | settings
    with pytest.raises(ValueError, match=message):
        sample(model_of(CONFIGS["mom"]), **settings, key=jax.random.key(0))
