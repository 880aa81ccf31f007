"""Sampling: the settings against a plain numpy sampler, sorts only where they are needed, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

from mom_jax.sampling import GREEDY, Sampling, next_token

DRAWS, VOCABULARY = 20_000, 13
LOGITS = np.random.default_rng(1).normal(0, 2, VOCABULARY).astype(np.float32)
SEEN = np.arange(VOCABULARY) % 3 == 1  # the most probable one among them
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 4},
    "top_k_of_all": {"top_k": VOCABULARY},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "everything": {"temperature": 1.5, "top_k": 9, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
}


def probabilities(logits, seen, sampling: Sampling) -> np.ndarray:
    """What the documentation of each setting says, in float64 and without a thought for speed."""
    logits, rate = logits.astype(np.float64), sampling.repetition_penalty
    logits = np.where(seen, np.where(logits < 0, logits * rate, logits / rate), logits) / sampling.temperature
    order = np.argsort(-logits)
    p = np.exp(logits)
    if sampling.top_k is not None:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        p[order[1 + np.searchsorted(np.cumsum(p[order]), sampling.top_p) :]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


compiled = jax.jit(next_token)


def draw(sampling: Sampling, logits=LOGITS) -> np.ndarray:
    """Tokens drawn from the same logits, each row with a key of its own."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(compiled(np.tile(logits, (DRAWS, 1)), sampling.options(), keys, np.tile(SEEN, (DRAWS, 1))))


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_distribution_of_a_plain_sampler(name):
    sampling = Sampling(**SETTINGS[name])
    expected = probabilities(LOGITS, SEEN, sampling)
    drawn = draw(sampling)
    assert drawn.dtype == np.int32
    counts = np.bincount(drawn, minlength=VOCABULARY)
    kept = expected > 0
    assert not counts[~kept].any()
    chi_squared = np.sum((counts - DRAWS * expected)[kept] ** 2 / (DRAWS * expected[kept]))
    assert chi_squared < 40  # with 12 degrees of freedom: one time in 14,000


def test_settings_that_leave_one_token_are_greedy():
    best = np.argmax(np.where(SEEN, np.where(LOGITS < 0, LOGITS * 3, LOGITS / 3), LOGITS))
    assert best != np.argmax(LOGITS)
    one = ({"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0})
    for settings in one:
        assert set(draw(Sampling(**settings))) == {np.argmax(LOGITS)}
        assert set(draw(Sampling(**settings, repetition_penalty=3.0))) == {best}


def test_equally_probable_tokens_are_kept_or_dropped_together():
    logits = np.array([0.0, 1.0, 1.0, -1.0] + [-9.0] * (VOCABULARY - 4), np.float32)
    for settings in ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 0.9}):
        assert set(draw(Sampling(**settings), logits)) == {1, 2}


@pytest.mark.parametrize("name", [*SETTINGS, "greedy"])
def test_the_vocabulary_is_sorted_at_most_once(name):
    sampling = GREEDY if name == "greedy" else Sampling(**SETTINGS[name])
    inputs = jnp.zeros((2, 5)), sampling.options(), jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 5), bool)
    names = [equation.primitive.name for equation in equations(next_token, *inputs)]
    needs_it = sampling.top_k is not None or sampling.top_p < 1
    assert names.count("sort") == needs_it and not {"top_k", "scatter"} & set(names)
    assert any("random" in name for name in names) == (name != "greedy")


def test_another_value_of_a_setting_compiles_nothing():
    compiled = jax.jit(lambda *inputs: next_token(*inputs))
    inputs = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 5), bool)
    for shift in (0.1, 0.2):
        sampling = Sampling(1 + shift, int(shift * 10), 0.7 + shift, 0.1 + shift, 1.5 + shift)
        compiled(jnp.zeros((2, 5)), sampling.options(), *inputs)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "Sampling.temperature = -0.1 is not allowed: it must be >= 0 and finite"),
        ({"temperature": float("nan")}, "Sampling.temperature = nan is not allowed"),
        ({"top_k": 0}, "Sampling.top_k = 0 is not allowed: None, or a positive integer"),
        ({"top_k": 2.5}, "Sampling.top_k = 2.5 is not allowed"),
        ({"top_k": True}, "Sampling.top_k = True is not allowed"),
        ({"top_p": 0.0}, "Sampling.top_p = 0.0 is not allowed: it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "Sampling.top_p = 1.1 is not allowed"),
        ({"min_p": -0.1}, "Sampling.min_p = -0.1 is not allowed: it must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "Sampling.repetition_penalty = 0.0 is not allowed: it must be > 0 and finite"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(unchecked_shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
