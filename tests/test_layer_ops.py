"""Norms, and above all the short convolution over ragged segments, against numpy written from the definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, relative_l2

from pallas_kernels.api import Segments, convolution_history, l2_norm, rms_norm, short_convolution

LENGTHS = ((70, 0, 2, 64, 1), (1, 66, 3, 0, 5))
SLOTS, HEADS, WIDTH = 384, 2, 3


def silu(x):
    return x / (1 + np.exp(-x))


def test_norms():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 5, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    assert relative_l2(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-3), expected) < 1e-6
    assert relative_l2(l2_norm(jnp.asarray(x)), x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)) < 1e-6
    assert rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale), 1e-3).dtype == jnp.bfloat16
    # In bfloat16 the sum of 4,096 squares would stop growing at 256.
    assert relative_l2(rms_norm(jnp.full((4096,), 2.0, jnp.bfloat16), jnp.ones(4096), 0.0), np.ones(4096)) < 1e-6


def test_norms_of_zero_are_zero_with_finite_gradients():
    for norm in (l2_norm, lambda x: rms_norm(x, jnp.ones(4), 1e-6)):
        value, gradient = jax.value_and_grad(lambda x, norm=norm: norm(x).sum())(jnp.zeros(4))
        assert value == 0 and np.isfinite(gradient).all()


class Convolution:
    """Arrays of one random convolution, its segments and, by tokens in plain lists, what is to come out."""

    def __init__(self, seed, width, bias, runs, history):
        rng = np.random.default_rng(seed)
        self.segments = Segments.from_lengths(jnp.array(LENGTHS))
        batch, count = len(LENGTHS), len(LENGTHS[0])
        self.x = rng.normal(size=(batch, SLOTS, HEADS, WIDTH)).astype(np.float32)
        self.weight = rng.normal(size=(width, HEADS, WIDTH)).astype(np.float32)
        self.bias = rng.normal(size=(HEADS, WIDTH)).astype(np.float32) if bias else None
        self.runs = np.cumsum(rng.uniform(size=(batch, SLOTS)) < 0.2, axis=1).astype(np.int32) if runs else None
        self.history = rng.normal(size=(batch, count, width - 1, HEADS, WIDTH)).astype(np.float32) if history else None

    def expected(self):
        width = len(self.weight)
        y = np.full(self.x.shape, np.nan)
        history = np.zeros((*self.segments.lengths.shape, width - 1, HEADS, WIDTH))
        for b, row in enumerate(LENGTHS):
            for s, length in enumerate(row):
                start = int(self.segments.offsets[b, s])
                before = np.zeros((width - 1, HEADS, WIDTH)) if self.history is None else self.history[b, s]
                past, run = list(before), None if self.runs is None else self.runs[b, start]
                for n in range(start, start + length):
                    if self.runs is not None and self.runs[b, n] != run:
                        past, run = [np.zeros((HEADS, WIDTH))] * (width - 1), self.runs[b, n]
                    past.append(self.x[b, n].astype(np.float64))
                    window = past[len(past) - width :]
                    taps = sum(w * x for w, x in zip(self.weight, window, strict=True))
                    y[b, n] = silu(taps + (0 if self.bias is None else self.bias))
                history[b, s] = past[len(past) - width + 1 :] if width > 1 else past[:0] or history[b, s]
        return y, history


@partial(jax.jit, static_argnums=0)
def convolve(lengths, x, weight, bias, runs, history):
    segments = Segments.from_lengths(jnp.array(lengths))
    zeros = jnp.zeros((*segments.lengths.shape, weight.shape[0] - 1, *x.shape[2:])) if history is None else history
    return (
        short_convolution(x, weight, bias, segments, runs, history),
        convolution_history(x, segments, runs, zeros),
    )


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(("width", "bias"), [(4, True), (3, False), (1, True)])
def test_short_convolution_over_ragged_segments(width, bias, runs, history):
    """Taps end at segments and runs; history stands before a segment's first run only; histories after the piece."""
    case = Convolution(0, width, bias, runs, history)
    y, after = convolve(LENGTHS, case.x, case.weight, case.bias, case.runs, case.history)
    expected_y, expected_after = case.expected()
    real = ~np.isnan(expected_y)
    assert relative_l2(np.asarray(y)[real], expected_y[real]) < 1e-6
    np.testing.assert_array_equal(after, expected_after.astype(np.float32))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_short_convolution_with_random_runs_and_histories(seed):
    case = Convolution(seed, 4, True, True, True)
    y, after = convolve(LENGTHS, case.x, case.weight, case.bias, case.runs, case.history)
    expected_y, expected_after = case.expected()
    real = ~np.isnan(expected_y)
    assert relative_l2(np.asarray(y)[real], expected_y[real]) < 1e-6
    np.testing.assert_array_equal(after, expected_after.astype(np.float32))


def test_nothing_flows_from_one_segment_into_another():
    """By gradient: outputs of a segment depend on its own inputs and history alone."""
    case = Convolution(2, 4, False, False, True)
    real = np.asarray(case.segments.is_real(SLOTS))[0]
    owner = np.where(real, np.asarray(case.segments.segment_of(SLOTS))[0], -1)

    @jax.jit
    def gradient(segment, x, history):
        def total(x, history):
            y = short_convolution(x, jnp.asarray(case.weight), None, case.segments, None, history)
            return jnp.sum(jnp.where((owner == segment)[:, None, None], y[0], 0))

        return jax.grad(total, argnums=(0, 1))(x, history)

    for segment, length in enumerate(LENGTHS[0]):
        in_x, in_history = (np.abs(np.asarray(g[0])).sum(axis=(-1, -2)) for g in gradient(segment, case.x, case.history))
        np.testing.assert_array_equal(in_x > 0, owner == segment)
        np.testing.assert_array_equal((in_history > 0).any(axis=1), (np.arange(5) == segment) & (length > 0))


def test_bfloat16_convolution_computes_in_float32():
    case = Convolution(3, 4, True, False, False)
    x = jnp.asarray(case.x, jnp.bfloat16)
    y, _ = convolve(LENGTHS, x, case.weight, case.bias, None, None)
    exact, _ = convolve(LENGTHS, x.astype(jnp.float32), case.weight, case.bias, None, None)
    assert y.dtype == jnp.bfloat16
    assert_close(y, exact.astype(jnp.bfloat16), 0.0)
