"""The ops of decoding: every implementation against the ops that they are one token of, and in place.

Interpreted or native, in a pool of several layers and rows: what a token does not touch stays to the bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import LIMITS, assert_close

from pallas_kernels import api
from pallas_kernels.api import Place, Segments

LAYERS, BATCH, STATES, HEADS, KEY, TAPS = 2, 3, 5, 2, 16, 4
IMPLEMENTATIONS = {
    "plain": {"implementation": "chunked"},
    "interpreted": {"implementation": "triton", "interpret": True},
    "triton": {"implementation": "triton"},
}
PARAMS = ["plain", "interpreted", pytest.param("triton", marks=pytest.mark.gpu)]
PLACE = Place(
    layer=jnp.int32(1),
    index=jnp.array([[3, 0, 4], [0, 1, 4], [2, 1, 4]], jnp.int32),
    continues=jnp.array([[True, False, True], [True, True, True], [False, True, True]]),
    active=jnp.array([True, False, True]),
)
TOUCHED = np.zeros((LAYERS, BATCH, STATES), bool)
TOUCHED[1, [[0], [2]], PLACE.index[np.array([0, 2])]] = True


def draw(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def of_states(chosen):
    """[B, R, ...] in the places [B, S, ...] of PLACE's states, the others filled with NaN: nothing may look at them."""
    rows = jnp.arange(BATCH)[:, None]
    return jnp.full((BATCH, STATES, *chosen.shape[2:]), jnp.nan, chosen.dtype).at[rows, PLACE.index].set(chosen)


def recurrence_inputs(rng, width, dtype):
    q, k, v = (draw(rng, BATCH, 3, HEADS, size, dtype=dtype) for size in (KEY, KEY, width))
    log_decay, beta = -jnp.exp(draw(rng, BATCH, 3, HEADS)), jax.nn.sigmoid(draw(rng, BATCH, 3, HEADS))
    return q, api.l2_norm(k), v, log_decay, beta, draw(rng, LAYERS, BATCH, STATES, HEADS, KEY, width)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize("implementation", PARAMS)
def test_recurrence_step_is_one_token_of_the_op(rng, implementation, width, dtype):
    *inputs, states = recurrence_inputs(rng, width, dtype)
    step = jax.jit(partial(api.gated_delta_rule_step, **IMPLEMENTATIONS[implementation]))
    o, after = step(*inputs, states, PLACE)
    # The same token as a segment of one token for every (row, chosen state).
    tokens = [x.reshape(1, -1, *x.shape[2:]) for x in inputs]
    slots = [jnp.zeros((1, 64 * BATCH * 3, *x.shape[2:]), x.dtype).at[:, ::64].set(x) for x in tokens]
    segments = Segments.from_lengths(jnp.ones((1, BATCH * 3), jnp.int32))
    entered = PLACE.read(states).reshape(1, -1, *states.shape[3:])
    expected, final = api.gated_delta_rule(*slots, segments=segments, initial_state=entered, implementation="reference")
    assert o.dtype == dtype
    assert_close(o.reshape(-1, HEADS, width), expected[0, ::64], LIMITS[dtype])
    final = final.reshape(BATCH, 3, *states.shape[3:])
    np.testing.assert_array_equal(np.asarray(after)[~TOUCHED], np.asarray(states)[~TOUCHED])
    for row in (0, 2):
        assert_close(after[1, row, PLACE.index[row]], final[row], LIMITS["float32"])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("implementation", PARAMS)
def test_convolution_steps_are_the_convolution(rng, implementation, with_bias):
    """Ten tokens, the streams at once; histories are entered as zeros, whatever is there; an inactive row keeps its own."""
    widths = {"k": KEY, "v": 48}
    weights = {name: draw(rng, TAPS, HEADS, width) for name, width in widths.items()}
    biases = {name: draw(rng, HEADS, width) if with_bias else None for name, width in widths.items()}
    before = {name: draw(rng, LAYERS, BATCH, STATES, TAPS - 1, HEADS, width) for name, width in widths.items()}
    x = {name: draw(rng, BATCH, 3, 10, HEADS, width) for name, width in widths.items()}
    x["v"] = x["v"][:, :1]  # alike for all states
    step = jax.jit(partial(api.short_convolution_step, normalized=("k",), **IMPLEMENTATIONS[implementation]))
    of_layers = {name: jnp.stack([jnp.full_like(w, jnp.nan), w]) for name, w in weights.items()}
    biases_of_layers = {name: None if b is None else jnp.stack([jnp.full_like(b, jnp.nan), b]) for name, b in biases.items()}
    histories, outputs = before, []
    for n in range(10):
        place = PLACE._replace(continues=jnp.full((BATCH, 3), n > 0))
        streams = {name: s[:, :, n] for name, s in x.items()}
        streams["k"] = of_states(streams["k"])
        y, histories = step(streams, of_layers, biases_of_layers, histories, place)
        outputs.append(y)
    segments = Segments.from_lengths(jnp.full((BATCH * 3, 1), 10, jnp.int32))
    for name, width in widths.items():
        tokens = jnp.broadcast_to(x[name], (BATCH, 3, 10, HEADS, width))
        rows = jnp.zeros((BATCH * 3, 64, HEADS, width)).at[:, :10].set(tokens.reshape(-1, 10, HEADS, width))
        expected = api.short_convolution(
            rows, weights[name], biases[name], segments, normalize=name == "k", implementation="reference"
        )  # fmt: skip
        expected = expected[:, :10].reshape(BATCH, 3, 10, HEADS, width)
        found = jnp.stack([y[name] for y in outputs], axis=2)
        for row in (0, 2):
            assert_close(found[row], expected[row], LIMITS["float32"])
            last = tokens[row, :, -3:]
            np.testing.assert_array_equal(histories[name][1, row, PLACE.index[row]], last)
        untouched = ~TOUCHED
        np.testing.assert_array_equal(np.asarray(histories[name])[untouched], np.asarray(before[name])[untouched])


@pytest.mark.parametrize("implementation", ["interpreted", pytest.param("triton", marks=pytest.mark.gpu)])
def test_gradients_of_kernels_are_those_of_plain_jax(rng, implementation):
    inputs = recurrence_inputs(rng, 32, "float32")
    weight, history = draw(rng, LAYERS, TAPS, HEADS, KEY), draw(rng, LAYERS, BATCH, STATES, TAPS - 1, HEADS, KEY)

    def run(options):
        def f(q, *rest):
            streams, pools = {"q": of_states(q)}, {"q": history}
            y, after = api.short_convolution_step(streams, {"q": weight}, {"q": None}, pools, PLACE, **options)
            return api.gated_delta_rule_step(y["q"], *rest, PLACE, **options), after

        results, pull = jax.vjp(jax.jit(f), *inputs)
        return results, pull(jax.tree.map(jnp.cos, results))

    assert_close(run(IMPLEMENTATIONS[implementation]), run(IMPLEMENTATIONS["plain"]), LIMITS["float32"])


def test_what_does_not_fit_is_refused_by_name(rng, unchecked_shapes):
    *inputs, states = recurrence_inputs(rng, 16, "float32")
    with pytest.raises(ValueError, match="gated_delta_rule_step: the shape of beta"):
        api.gated_delta_rule_step(*inputs[:4], inputs[4][:, :2], states, PLACE)
    with pytest.raises(ValueError, match="gated_delta_rule_step: states is .* float32"):
        api.gated_delta_rule_step(*inputs, states.astype(jnp.bfloat16), PLACE)
    with pytest.raises(ValueError, match="gated_delta_rule_step: the shape of place.index"):
        api.gated_delta_rule_step(*inputs, states, PLACE._replace(index=PLACE.index[:, :2]))
    with pytest.raises(ValueError, match="gated_delta_rule_step: K is 12"):
        api.gated_delta_rule_step(inputs[0][..., :12], inputs[1][..., :12], *inputs[2:], states, PLACE)
    with pytest.raises(ValueError, match="short_convolution_step: the shape of histories of q"):
        pools = {"q": jnp.zeros((LAYERS, BATCH, STATES, 2, HEADS, KEY))}
        streams, weights = {"q": of_states(inputs[0])}, {"q": draw(rng, LAYERS, TAPS, HEADS, KEY)}
        api.short_convolution_step(streams, weights, {"q": None}, pools, PLACE)
    with pytest.raises(NotImplementedError, match="W is 1"):
        weights = {"q": draw(rng, LAYERS, 1, HEADS, KEY)}
        empty = {"q": jnp.zeros((LAYERS, BATCH, STATES, 0, HEADS, KEY))}
        api.short_convolution_step(streams, weights, {"q": None}, empty, PLACE, **IMPLEMENTATIONS["interpreted"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, depth, widths", [(1, 96, (48, 64)), (3, 96, (48, 16)), (40, 256, (64,)), (3, 32, (4, 16))])
@pytest.mark.parametrize("implementation", PARAMS)
def test_stacked_matmul(rng, implementation, rows, depth, widths, dtype):
    """Several groups of stacks of different numbers of matrices in one call; the gradient reaches one layer only."""
    x = draw(rng, rows, depth, dtype=dtype)
    weights = tuple(
        tuple(draw(rng, 3, count, depth, width, dtype=dtype) for count in (1 + i, 2)) for i, width in enumerate(widths)
    )
    options = {"out_dtypes": (jnp.float32,) * len(widths), **IMPLEMENTATIONS[implementation]}
    ys, pull = jax.vjp(lambda x, weights: api.stacked_matmul(x, weights, jnp.int32(1), **options), x, weights)
    x64 = np.asarray(x, np.float64)
    w64 = [np.concatenate([np.asarray(w, np.float64)[1] for w in stacks]) for stacks in weights]
    assert all(y.dtype == jnp.float32 for y in ys)
    assert_close(ys, tuple(np.einsum("rd,mdn->rmn", x64, w) for w in w64), LIMITS[dtype])
    dx, dws = pull(jax.tree.map(jnp.ones_like, ys))
    expected = sum(np.einsum("rmn,mdn->rd", np.ones(y.shape), w) for y, w in zip(ys, w64, strict=True))
    assert_close(dx, expected, LIMITS[dtype])
    assert all(not np.asarray(dw)[[0, 2]].any() and np.asarray(dw)[1].any() for dw in jax.tree.leaves(dws))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("implementation", PARAMS)
def test_what_stands_around_a_product(rng, implementation, rows, dtype):
    """The norm and the gate before it, the residual after it; matrices that no row wants are not needed."""
    x, gate, scale = draw(rng, rows, 48, dtype=dtype), draw(rng, rows, 48, dtype=dtype), draw(rng, 2, 48)
    weights, residual = draw(rng, 2, 4, 48, 16, dtype=dtype), draw(rng, rows, 16, dtype=dtype)
    x64, gate64, w64, residual64 = (np.asarray(a, np.float64) for a in (x, gate, weights, residual))
    normed = x64 / np.sqrt(np.mean(x64**2, axis=1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)[1]
    gated = gate64 / (1 + np.exp(-gate64))

    def run(**options):
        call = partial(api.stacked_matmul, out_dtypes=(jnp.float32,), **options, **IMPLEMENTATIONS[implementation])
        return np.asarray(call(x, ((weights[:, :1], weights[:, 1:]),), jnp.int32(1))[0])

    assert_close(run(scale=scale, eps=1e-5), np.einsum("rd,mdn->rmn", normed, w64[1]), LIMITS[dtype])
    expected = np.einsum("rd,mdn->rmn", gated * x64, w64[1])
    assert_close(run(gate=gate), expected, LIMITS[dtype])
    assert_close(run(gate=gate, residual=residual), expected + residual64[:, None], LIMITS[dtype])
    both = np.einsum("rd,mdn->rmn", gated * normed, w64[1])
    assert_close(run(gate=gate, scale=scale, eps=1e-5), both, LIMITS[dtype])
    wanted = jnp.tile(jnp.array([[3, 1]], jnp.int32), (rows, 1)).at[0, 1].set(0 if rows > 1 else 1)
    places = sorted(set(np.asarray(wanted).flat))
    found = run(gate=gate, chosen=wanted)
    assert_close(found[:, places], expected[:, places], LIMITS[dtype])
    others = sorted({0, 1, 2, 3} - set(places))
    assert others and (implementation == "plain" or not found[:, others].any())


KERNELS = ["interpreted", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "memories, top_k, has_shared, with_bias, depth",
    [(4, 2, True, False, 80), (5, 3, False, True, 80), (1, 1, False, False, 32), (16, 4, True, True, 768)],
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_router_step(rng, implementation, memories, top_k, has_shared, with_bias, depth, dtype):
    """As plain JAX, equal logits (two alike columns, a row of zeros) included, of which the first are chosen."""
    x, scale, weight = draw(rng, 7, depth, dtype=dtype).at[3].set(0), draw(rng, 2, depth), draw(rng, 2, depth, memories)
    weight = 0.1 * weight.at[:, :, memories // 2].set(weight[:, :, 0])
    bias = draw(rng, 2, memories) if with_bias else None
    settings = {"eps": 1e-5, "top_k": top_k, "has_shared": has_shared}

    def run(name):
        options = settings | IMPLEMENTATIONS[name]
        call = partial(api.router_step, bias=bias, layer=jnp.int32(1), **options)
        found, pull = jax.vjp(lambda *arrays: call(*arrays)[1:], x, scale, weight)
        return call(x, scale, weight)[0], found, pull(jax.tree.map(jnp.cos, found))

    (memories, *found), (expected_memories, *expected) = run(implementation), run("plain")
    np.testing.assert_array_equal(memories, expected_memories)
    assert_close(found, expected, LIMITS[dtype])
    np.testing.assert_array_equal(memories[3, :top_k], np.argsort(-bias[1])[:top_k] if with_bias else np.arange(top_k))


@pytest.mark.parametrize("spoilt", ["weight", "bias"])
@pytest.mark.parametrize("implementation", PARAMS)
def test_a_router_gone_wrong_still_chooses_different_memories(rng, implementation, spoilt):
    """NaN weights, or biases of -inf: states are written in place, and no two programs may write one."""
    weight = jnp.full((1, 32, 4), jnp.nan) if spoilt == "weight" else draw(rng, 1, 32, 4)
    bias = jnp.full((1, 4), -jnp.inf) if spoilt == "bias" else None
    memories = api.router_step(
        draw(rng, 2, 32), jnp.ones((1, 32)), weight, bias, jnp.int32(0), eps=1e-5, top_k=3, has_shared=True,
        **IMPLEMENTATIONS[implementation],
    )[0]  # fmt: skip
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) == 4 for row in np.asarray(memories).tolist())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("implementation", KERNELS)
def test_combine_step(rng, implementation, with_gate, dtype):
    o, gate = draw(rng, 4, 3, 2, 48, dtype=dtype), draw(rng, 4, 2, 48, dtype=dtype) if with_gate else None
    arguments = o, jax.nn.softmax(draw(rng, 4, 3)), gate, draw(rng, 2, 48)

    def run(name):
        call = partial(api.combine_step, layer=jnp.int32(1), eps=1e-5, **IMPLEMENTATIONS[name])
        found, pull = jax.vjp(call, *arguments)
        return found, pull(jnp.cos(found))

    found, expected = run(implementation), run("plain")
    assert found[0].dtype == dtype
    assert_close(found, expected, LIMITS[dtype])


def test_products_that_do_not_fit_are_refused_by_name(rng, unchecked_shapes):
    x, w, layer = draw(rng, 1, 32), draw(rng, 2, 1, 32, 16), jnp.int32(0)
    with pytest.raises(ValueError, match="stacked_matmul: the shape of w .*N = 16"):
        api.stacked_matmul(x, ((w, draw(rng, 2, 1, 32, 48)),), layer)
    with pytest.raises(ValueError, match=r"stacked_matmul: the shape of w .*\[L = 2"):
        api.stacked_matmul(x, ((w,), (w[:1],)), layer)
    with pytest.raises(ValueError, match="stacked_matmul: the shape of scale"):
        api.stacked_matmul(x, ((w,),), layer, scale=jnp.ones((2, 16)))
    with pytest.raises(ValueError, match="router_step: the shape of bias"):
        arrays = x, jnp.ones((2, 32)), draw(rng, 2, 32, 4), jnp.ones((2, 3)), layer
        api.router_step(*arrays, eps=1e-5, top_k=2, has_shared=True)
    with pytest.raises(ValueError, match="combine_step: the shape of weights"):
        api.combine_step(draw(rng, 1, 3, 2, 16), jnp.ones((1, 2)), None, jnp.ones((2, 16)), layer, eps=1e-5)


def test_many_rows_are_left_to_xla(rng):
    ragged = ((draw(rng, 1, 1, 16, 90),),)
    with pytest.raises(NotImplementedError, match="N is 90"):
        api.stacked_matmul(draw(rng, 2, 16), ragged, jnp.int32(0), **IMPLEMENTATIONS["interpreted"])
    with pytest.raises(NotImplementedError, match="65 rows"):
        api.stacked_matmul(draw(rng, 65, 16), ((draw(rng, 1, 1, 16, 16),),), jnp.int32(0), **IMPLEMENTATIONS["interpreted"])
