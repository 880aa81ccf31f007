"""The stages of the chunked implementation where their numbers could go wrong, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import results
from numerics import LIMITS, assert_close, relative_l2

from pallas_kernels import api, chunked
from pallas_kernels.api import Segments

CHUNK = chunked.CHUNK


def correlated_system(correlation, seed=0):
    """The strictly lower triangular b_i k_i k_j of two chunks whose keys are alike, with beta near 1, in float64."""
    rng = np.random.default_rng(seed)
    k = np.sqrt(correlation) * rng.normal(size=(2, 1, 64)) + np.sqrt(1 - correlation) * rng.normal(size=(2, CHUNK, 64))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0.9, 1.0, size=(2, CHUNK, 1))
    return np.tril(beta * (k @ k.swapaxes(-1, -2)), -1).astype(np.float32)


@jax.jit
def inverse_and_gradient(a, cotangent):
    inverse, pull = jax.vjp(chunked.unit_lower_inverse, a)
    return inverse, pull(cotangent)[0]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
def test_unit_lower_inverse_is_exact_for_repeated_keys(correlation):
    """Doubling, or TF32 products, err by 0.1 and more at correlation 1."""
    a = correlated_system(correlation)
    cotangent = np.random.default_rng(1).normal(size=a.shape).astype(np.float32)
    inverse, gradient = inverse_and_gradient(a, cotangent)

    expected = np.linalg.inv(np.eye(CHUNK) + a.astype(np.float64))
    transposed = expected.swapaxes(-1, -2)
    assert relative_l2(inverse, expected) < 1e-5
    assert np.abs(inverse - expected).max() < 1e-5
    assert relative_l2(gradient, np.tril(-transposed @ cotangent @ transposed, -1)) < 1e-5


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("per", ["key", "head"])
@pytest.mark.parametrize("kind", ["mild", "strong", "extreme", "first_token_forgets_all"])
def test_decayed_scores_of_any_decay(kind, per, strict):
    """Values and gradients: finite and right where exp(g_i) or exp(-g_j) alone would be 0 or infinite."""
    rng = np.random.default_rng(0)
    width = 16
    a, b, cotangent = rng.normal(size=(CHUNK, width)), rng.normal(size=(CHUNK, width)), rng.normal(size=(CHUNK, CHUNK))
    uniform = rng.uniform(size=(CHUNK, width))
    log_decay = {
        "mild": -0.1 * uniform,
        "strong": -100 * uniform**4,
        "extreme": np.where(uniform < 0.5, -1e4, 0.0),
        "first_token_forgets_all": np.where(np.arange(CHUNK)[:, None] == 0, -1e5, -1e-3 * uniform),
    }[kind]
    g = np.cumsum(log_decay if per == "key" else log_decay[:, :1], axis=0).astype(np.float32)
    mask = np.tri(CHUNK, k=-1 if strict else 0, dtype=bool)

    @jax.jit
    def run(a, b, g, cotangent):
        def scores(a, b, g):
            chunk = (x[None, None, None] for x in (a, b, g))
            return chunked.decayed_scores(*chunk, jnp.asarray(mask), jnp.float32)[0, 0, 0]

        p, pull = jax.vjp(scores, a, b, g)
        return p, pull(cotangent)

    p, gradients = run(*(x.astype(np.float32) for x in (a, b, g, cotangent)))
    g = g.astype(np.float64)
    decay = np.exp(np.minimum(g[:, None] - g[None], 0)) * mask[..., None]  # [i, j, key]
    weighted = cotangent[..., None] * decay
    terms = weighted * a[:, None] * b[None]
    expected = (decay * a[:, None] * b[None]).sum(axis=-1)
    in_a, in_b = (weighted * b[None]).sum(axis=1), (weighted * a[:, None]).sum(axis=0)
    in_g = terms.sum(axis=1) - terms.sum(axis=0)
    in_g = in_g if per == "key" else in_g.sum(axis=1, keepdims=True)
    # The cumulative decay itself is float32: differences of numbers near 1e5 are good to 1e-2.
    limit = LIMITS["float32"] if kind in ("mild", "strong") else 1e-2
    assert_close((p, gradients), (expected, (in_a, in_b, in_g)), limit, kind)


@pytest.mark.parametrize("op", ["gated_delta_rule", "linear_attention"])
@pytest.mark.parametrize("decay", ["none", "head", "key"])
def test_memory_is_linear_in_the_number_of_tokens(op, decay):
    """Neither forward nor backward makes anything that grows faster than T."""

    def largest(num_tokens):
        def array(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((1, num_tokens, *shape), dtype)

        log_decay = {"none": None, "head": array(2), "key": array(2, 16)}[decay]
        arrays = [array(2, 16), array(2, 16), array(2, 32), log_decay] + [array(2)] * (op == "gated_delta_rule")
        segments = Segments(jnp.array([[0, 64, num_tokens]]), jnp.array([[40, num_tokens - 64]]))
        run_ids = array(dtype=jnp.int32)

        def loss(arrays, run_ids):
            o, state = getattr(api, op)(*arrays, segments=segments, run_ids=run_ids, implementation="chunked")
            return o.sum() + state.sum()

        return max(x.size for x in results(jax.grad(loss), arrays, run_ids))

    sizes = {num_tokens: largest(num_tokens) for num_tokens in (1024, 2048, 4096)}
    assert sizes[2048] <= 2 * sizes[1024] and sizes[4096] <= 2 * sizes[2048], sizes


def test_memory_of_the_grouped_matmul_is_linear():
    def largest(num_tokens):
        segments = Segments(jnp.array([[0, 64, num_tokens]]), jnp.array([[40, num_tokens - 64]]))
        x, w = jax.ShapeDtypeStruct((1, num_tokens, 16), jnp.float32), jax.ShapeDtypeStruct((2, 16, 24), jnp.float32)
        gradient = jax.grad(lambda x, w: api.grouped_matmul(x, w, segments, implementation="chunked").sum(), (0, 1))
        return max(x.size for x in results(gradient, x, w))

    assert largest(2048) <= 2 * largest(1024)
    assert largest(1024) <= 1024 * 24
