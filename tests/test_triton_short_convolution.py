"""The short convolution's kernels against plain JAX: values and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from numerics import LIMITS, assert_close

from mom_jax.routing import Dispatch
from pallas_kernels import api
from pallas_kernels.layer_ops import l2_norm
from pallas_kernels.layer_ops import short_convolution as plain_short_convolution
from pallas_kernels.segments import Segments, where_real
from pallas_kernels.triton.launch import KernelConfig
from pallas_kernels.triton.short_convolution import short_convolution

RAGGED = {case.id: case for case in CASES if not isinstance(case.lengths, int)}
# One slot at a time compiles fastest in the interpreter; tiles that do not divide the row have a ragged last block.
CONFIGS = {"config": KernelConfig(tile=32, num_stages=1), "grad_config": KernelConfig(tile=48, num_stages=1)}


def both(rng, segments, num_slots, head_shape, *, width=4, runs=None, history=None, bias=None, dtype=jnp.float32, **options):
    """Values and gradients of the kernels, with NaN in dead slots, and of plain JAX, with zeros there."""
    batch, count = segments.lengths.shape
    real = segments.is_real(num_slots)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def rubbish(a):
        return jnp.where(real[..., None, None], a, jnp.nan)

    x = normal(batch, num_slots, *head_shape).astype(dtype)
    arguments = {"x": where_real(real, x), "weight": normal(width, *head_shape)}
    if bias:
        arguments["bias"] = normal(*head_shape)
    if history:
        arguments["history"] = normal(batch, count, width - 1, *head_shape).astype(dtype)
    run_ids = jnp.asarray(np.cumsum(rng.uniform(size=(batch, num_slots)) < 0.1, axis=1), jnp.int32) if runs else None
    cotangent = normal(*x.shape).astype(dtype)

    def plain(a):
        y = plain_short_convolution(a["x"], a["weight"], a.get("bias"), segments, run_ids, a.get("history"))
        return where_real(real, l2_norm(y) if options.get("normalize") else y).astype(dtype)

    def kernels(a):
        return short_convolution(
            a["x"], a["weight"], a.get("bias"), segments, run_ids, a.get("history"), **CONFIGS, **options
        )

    def run(f):
        def values_and_gradients(a, cotangent):
            y, pull = jax.vjp(f, a)
            return y, pull(cotangent)[0]

        return jax.jit(values_and_gradients)

    actual = run(kernels)(arguments | {"x": rubbish(arguments["x"])}, rubbish(cotangent))
    expected = run(plain)(arguments, cotangent)
    dead = ~np.asarray(real)
    assert not np.asarray(actual[1]["x"])[dead].any()
    return (where_real(real, actual[0]), actual[1]), expected


@pytest.mark.parametrize(
    "name, options",
    [
        ("ragged", {"history": True, "bias": True}),
        ("empty_memory", {"normalize": True, "history": True}),
        ("ragged_runs", {"runs": True}),
        ("ragged_runs", {"runs": True, "history": True, "normalize": True}),
    ],
    ids=str,
)
def test_ragged_segments(interpret, rng, name, options):
    case = RAGGED[name]
    segments = Segments.from_lengths(jnp.array(case.lengths))
    num_slots = int(segments.offsets[:, -1].max()) + case.spare
    actual, expected = both(rng, segments, num_slots, (2, 16), interpret=interpret, **options)
    assert_close(actual, expected, LIMITS["float32"])


@pytest.mark.parametrize("width", [1, 2, 5])
def test_widths_of_the_window(interpret, rng, width):
    """Segments shorter than the window, at the end of a row that is not a multiple of the tile too."""
    segments = Segments.from_lengths(jnp.array([[1, 2, 3, 4], [3, 0, 5, 1]]))
    actual, expected = both(rng, segments, 200, (1, 16), width=width, history=width > 1, bias=True, interpret=interpret)
    assert_close(actual, expected, LIMITS["float32"])


@pytest.mark.parametrize("normalize, head_shape", [(True, (4, 64)), (False, (3, 48))])
def test_bfloat16_and_widths_of_heads(interpret, rng, normalize, head_shape):
    segments = Segments.from_lengths(jnp.array([[20, 44]]))
    options = {"normalize": normalize, "dtype": jnp.bfloat16, "interpret": interpret}
    actual, expected = both(rng, segments, 128, head_shape, **options)
    assert_close(actual, expected, LIMITS["bfloat16"])


def test_tokens_are_gathered_into_slots(interpret, rng):
    """One kernel for the dispatch and the convolution; the gradient of a token is the sum over its slots."""
    batch, num_tokens, memories = 2, 40, 3
    chosen = np.stack([rng.permutation(memories)[:2] for _ in range(batch * num_tokens)])
    chosen = jnp.asarray(chosen.reshape(batch, num_tokens, 2), jnp.int32)
    mask = jnp.asarray(rng.uniform(size=(batch, num_tokens)) < 0.9)
    dispatch = jax.jit(lambda: Dispatch.of(chosen, mask, memories, has_shared=False))()
    x = jnp.asarray(rng.normal(size=(batch, num_tokens, 2, 16)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(4, 2, 16)), jnp.float32)
    segments, num_slots = dispatch.segments, dispatch.token_of.shape[1]
    cotangent = where_real(segments.is_real(num_slots), jnp.asarray(rng.normal(size=(batch, num_slots, 2, 16)), jnp.float32))

    @jax.jit
    def gathered(x, weight, cotangent):
        def f(x, weight):
            return short_convolution(
                x, weight, None, segments, token_of=dispatch.token_of, slot_of=dispatch.slot_of, interpret=interpret,
                **CONFIGS,
            )  # fmt: skip

        y, pull = jax.vjp(f, x, weight)
        return where_real(segments.is_real(num_slots), y), pull(cotangent)

    @jax.jit
    def plain(x, weight, cotangent):
        def f(x, weight):
            y = plain_short_convolution(dispatch.to_slots(x), weight, None, segments, None, None)
            return where_real(segments.is_real(num_slots), y)

        y, pull = jax.vjp(f, x, weight)
        return y, pull(cotangent)

    assert_close(gathered(x, weight, cotangent), plain(x, weight, cotangent), LIMITS["float32"])


def test_tiles_that_are_not_written_reach_nothing(rng):
    """Most of a device's slots may be dead. The interpreter leaves NaN there, and the recurrence must not see it."""
    segments, shape = Segments.from_lengths(jnp.array([[20, 44]])), (1, 512, 1, 16)
    x, weight = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, (4, 1, 16)))
    half = jnp.full(shape[:3], 0.5)

    @partial(jax.jit, static_argnums=2)
    def values_and_gradients(x, weight, implementation):
        options = {"segments": segments, "implementation": implementation, "interpret": implementation == "triton"}

        def f(x, weight):
            k = api.short_convolution(x, weight, None, normalize=True, **options)
            return k, api.gated_delta_rule(k, k, k, -half, half, **options)

        (k, (o, state)), pull = jax.vjp(f, x, weight)
        return k, (o, state, pull((jnp.zeros_like(k), (jnp.ones_like(o), state))))

    k, found = values_and_gradients(x, weight, "triton")
    assert np.isnan(k[:, 128:]).all()
    assert_close(found, values_and_gradients(x, weight, "chunked")[1], LIMITS["float32"])


def test_errors(unchecked_shapes):
    x, weight, segments = jnp.zeros((1, 64, 1, 48)), jnp.zeros((4, 1, 48)), Segments.full(1, 64)
    with pytest.raises(NotImplementedError, match="K is 48; with normalize it must be a power of two"):
        api.short_convolution(x, weight, None, segments, normalize=True, implementation="triton", interpret=True)
    with pytest.raises(ValueError, match="give both or neither"):
        api.short_convolution(x, weight, None, segments, token_of=jnp.zeros((1, 64), jnp.int32))
    with pytest.raises(ValueError, match="shapes of x and weight"):
        api.short_convolution(x, weight[..., :40], None, segments)
