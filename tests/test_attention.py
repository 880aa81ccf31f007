"""Softmax attention against numpy, and its cache: windows that wrap around, pieces, padding, documents, overflow."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import mixer_of, run_pieces, small
from numerics import relative_l2

from mom_jax.attention import rotate
from mom_jax.config import AttentionConfig

B, T = 2, 40
LIMIT = 1e-5


def config_of(window=None, kv_heads=None):
    attention = AttentionConfig(layers=(0, 1), num_heads=4, num_kv_heads=kv_heads, window_size=window, rope_theta=100.0)
    return small("attention_only", attention=attention)


def inputs(seed=0, num_tokens=T):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, num_tokens, 32)).astype(np.float32)


def everything_real(x):
    return np.ones(x.shape[:2], bool), np.zeros(x.shape[:2], np.int32)


def call_of(config):
    call, _ = mixer_of(config, "attention")

    def run(x, mask, documents, state):
        y, _, state = call(x, mask, documents, state)
        return y, state

    return run


def empty_cache(config, max_length=T):
    return mixer_of(config, "attention")[1].init_state(B, max_length)


def plain_attention(config, x, mask, documents):
    """Token by token, head by head, in float64; padded tokens do not exist."""
    _, module = mixer_of(config, "attention")
    w_q, w_k, w_v, w_o = (np.asarray(getattr(module, f"attention_{n}")[...], np.float64) for n in "qkvo")
    window = config.attention.window_size or np.inf
    width, group = w_q.shape[2], w_q.shape[1] // w_k.shape[1]

    def rotated(vector, position):
        pairs = vector[: width // 2] + 1j * vector[width // 2 :]
        pairs = pairs * np.exp(1j * position * config.attention.rope_theta ** (-np.arange(width // 2) / (width // 2)))
        return np.concatenate([pairs.real, pairs.imag])

    y = np.full(x.shape, np.nan)
    for b in range(len(x)):
        keys, values, owners = [], [], []
        for t in np.flatnonzero(mask[b]):
            q, k, v = (np.einsum("d,dhk->hk", x[b, t], w) for w in (w_q, w_k, w_v))
            position = len(keys)
            keys.append([rotated(head, position) for head in k])
            values.append(v)
            owners.append(documents[b, t])
            seen = [s for s in range(position + 1) if position - s < window and owners[s] == owners[-1]]
            heads = []
            for h, head in enumerate(q):
                scores = np.array([rotated(head, position) @ keys[s][h // group] for s in seen]) / np.sqrt(width)
                p = np.exp(scores - scores.max())
                heads.append(sum(p_s * values[s][h // group] for p_s, s in zip(p / p.sum(), seen, strict=True)))
            y[b, t] = np.einsum("hk,hkd->d", np.array(heads), w_o)
    return y


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("window", "kv_heads"), [(None, None), (7, 2), (None, 1)])
def test_matches_plain_attention(window, kv_heads, cached):
    """Grouped heads and windows; without a mask by the fused call, with a cache through the cache."""
    config, x = config_of(window, kv_heads), inputs()
    mask, documents = everything_real(x)
    expected = plain_attention(config, x, mask, documents)
    y = call_of(config)(x, *((mask, documents, empty_cache(config)) if cached else (None, None, None)))[0]
    assert relative_l2(y, expected) < LIMIT


@pytest.mark.parametrize("window", [None, 7])
def test_padding_and_documents(window):
    """Padding left, right and inside, and three documents: real tokens see what they would without padding."""
    config, x = config_of(window, 2), inputs()
    mask, documents = everything_real(x)
    mask[0, :9], mask[0, 20:23], mask[1, 31:], mask[1, 3] = False, False, False, False
    documents[:, 15:], documents[:, 30:] = 1, 4
    documents[~mask] = 7  # ids at padding do not matter
    x[~mask] = 100.0
    expected = plain_attention(config, x, mask, documents)
    for state in (None, empty_cache(config)):
        y, _ = call_of(config)(x, mask, documents, state)
        assert np.isfinite(y).all()
        assert relative_l2(np.asarray(y)[mask], expected[mask]) < LIMIT


@pytest.mark.parametrize("window", [None, 1, 7, 24])
@pytest.mark.parametrize("sizes", [(10,) * 4, (1,) * 20 + (10, 10), (10, 1, 1, 10, 1, 1, 1, 10, 1, 1, 1, 1, 1)])
def test_pieces_equal_the_whole_while_the_ring_wraps(window, sizes):
    """Padding and documents as well; the cache counts real tokens only."""
    config, x = config_of(window, 2), inputs(1)
    mask, documents = everything_real(x)
    mask[0, 8:12], mask[1, :3] = False, False
    documents[:, 26:] = 3
    expected = plain_attention(config, x, mask, documents)
    y, state = run_pieces(call_of(config), sizes, empty_cache(config), x, mask, documents)
    assert relative_l2(y[mask], expected[mask]) < LIMIT
    np.testing.assert_array_equal(state.count, mask.sum(axis=1))
    assert state.k.shape[1] == (window or T)


def test_rotary_depends_on_differences_of_positions_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [rotate(x, jnp.full((1, 1), position, jnp.int32), 100.0) for x, position in ((q, i), (k, j))]
        return np.einsum("bthk,bthk->h", *map(np.asarray, at))

    np.testing.assert_allclose(score(0, 0), np.einsum("bthk,bthk->h", q, k), rtol=1e-5)
    np.testing.assert_allclose(score(13, 4), score(9, 0), rtol=1e-4)
    np.testing.assert_allclose(score(1013, 1004), score(9, 0), rtol=1e-3)
    assert np.abs(score(13, 4) - score(13, 5)).max() > 0.01
    np.testing.assert_array_equal(rotate(q, jnp.zeros((1, 1), jnp.int32), 100.0), q)


def test_tokens_beyond_the_cache_are_nan():
    """Under jit nothing can be raised: what has no room poisons its own outputs, and leaves the tokens before it right."""
    config, x = config_of(None, 2), inputs()
    mask, documents = everything_real(x)
    mask[1, :10] = False
    expected = plain_attention(config, x, mask, documents)
    y, state = run_pieces(call_of(config), (10,) * 4, empty_cache(config, 36), x, mask, documents)
    assert np.isnan(y[0, 36:]).all()
    assert relative_l2(y[0, :36], expected[0, :36]) < LIMIT
    assert relative_l2(y[1, 10:], expected[1, 10:]) < LIMIT  # 30 real tokens fit
    np.testing.assert_array_equal(state.count, [40, 30])


def test_a_window_never_overflows():
    config, x = config_of(7), inputs()
    mask, documents = everything_real(x)
    state = empty_cache(config)
    for _ in range(3):
        y, state = run_pieces(call_of(config), (10,) * 4, state, x, mask, documents)
    assert np.isfinite(y).all() and state.count[0] == 3 * T
