"""Routing, dispatch and balance losses against counting in plain Python, over random and worst-case routings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxprs import equations
from models import small, to_tokens

from mom_jax.routing import Dispatch, Router, balance_loss, slot_bound
from pallas_kernels.api import SEGMENT_ALIGNMENT

BATCH, TOKENS = 2, 70
# (M, R, shared): R = M, one memory, with and without the shared one.
SHAPES = [(4, 2, True), (4, 2, False), (3, 3, True), (1, 1, False), (1, 1, True)]
dispatch_of = jax.jit(Dispatch.of, static_argnums=(2, 3))


def random_routing(shape, weights, seed, padded=0.0):
    """Memories [B, T, R'] drawn with the given odds (0: never, unless too few are left), and a mask."""
    num_memories, top_k, has_shared = shape
    rng = np.random.default_rng(seed)
    odds = np.array(weights[:num_memories], float) + 1e-9
    scores = rng.gumbel(size=(BATCH, TOKENS, num_memories)) + np.log(odds)
    memories = np.argsort(-scores, axis=-1)[..., :top_k]
    if has_shared:
        memories = np.concatenate([memories, np.full((BATCH, TOKENS, 1), num_memories)], axis=-1)
    return memories.astype(np.int32), rng.uniform(size=(BATCH, TOKENS)) >= padded


ROUTINGS = dict(
    shape=st.sampled_from(SHAPES),
    weights=st.lists(st.sampled_from([0.0, 0.01, 1.0]), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    padded=st.sampled_from([0.0, 0.3, 1.0]),
)


@settings(deadline=None, max_examples=80)
@example(shape=(4, 2, True), weights=[1.0, 1.0, 0.0, 0.0], seed=0, padded=0.0)  # all tokens in the same memories
@given(**ROUTINGS)
def test_every_token_is_in_its_memories_in_order(shape, weights, seed, padded):
    """Each memory's segment holds just its tokens, in order; slots are unique; padded tokens are nowhere."""
    memories, mask = random_routing(shape, weights, seed, padded)
    count, choices = shape[0] + shape[2], memories.shape[2]
    dispatch = jax.device_get(dispatch_of(memories, mask, count, shape[2]))
    num_slots = slot_bound(TOKENS, choices, count, shape[2])
    assert dispatch.token_of.shape == (BATCH, num_slots)

    for b in range(BATCH):
        offsets, lengths = dispatch.segments.offsets[b], dispatch.segments.lengths[b]
        assert offsets[-1] <= num_slots
        expected_token = np.full(num_slots, TOKENS)
        expected_choice = np.full(num_slots, TOKENS * choices)
        expected_slot = np.full((TOKENS, choices), num_slots)
        for m in range(count):
            members = [t for t in range(TOKENS) if mask[b, t] and m in memories[b, t]]
            assert lengths[m] == len(members)
            assert offsets[m + 1] - offsets[m] == -(-len(members) // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
            for slot, t in enumerate(members, start=offsets[m]):
                choice = list(memories[b, t]).index(m)
                expected_token[slot], expected_choice[slot] = t, t * choices + choice
                expected_slot[t, choice] = slot
        np.testing.assert_array_equal(dispatch.token_of[b], expected_token)
        np.testing.assert_array_equal(dispatch.choice_of[b], expected_choice)
        np.testing.assert_array_equal(dispatch.slot_of[b], expected_slot)
        used = dispatch.slot_of[b][mask[b]].ravel()
        assert len(set(used.tolist())) == used.size


def test_no_mask_is_all_real():
    memories, _ = random_routing((4, 2, True), [1.0] * 4, 0)
    for a, b in zip(
        jax.tree.leaves(dispatch_of(memories, None, 5, True)),
        jax.tree.leaves(dispatch_of(memories, np.ones((BATCH, TOKENS), bool), 5, True)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 16), st.integers(1, 16), st.booleans(), st.randoms())
def test_slot_bound_suffices_for_any_loads(num_tokens, num_memories, top_k, has_shared, random):
    """For loads that leave one token in a last alignment as often as they can, and for random ones."""
    top_k = min(top_k, num_memories)
    greedy, fair, left = [], [], num_tokens * top_k
    for m in range(num_memories):
        most, least = min(num_tokens, left), max(0, left - num_tokens * (num_memories - m - 1))
        one_over = (most - 1) // SEGMENT_ALIGNMENT * SEGMENT_ALIGNMENT + 1
        greedy.append(one_over if least <= one_over <= most else most)
        left -= greedy[-1]
    left = num_tokens * top_k
    for m in range(num_memories):
        most, least = min(num_tokens, left), max(0, left - num_tokens * (num_memories - m - 1))
        fair.append(random.randint(least, most))
        left -= fair[-1]
    bound = slot_bound(num_tokens, top_k + has_shared, num_memories + has_shared, has_shared)
    for loads in (greedy, fair):
        loads = loads + [num_tokens] * has_shared
        assert sum(-(-load // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT for load in loads) <= bound
    assert bound % SEGMENT_ALIGNMENT == 0


def there_and_back(dispatch, x, weights):
    """Dispatch, weigh every slot, combine."""
    slots = dispatch.to_slots(x) * dispatch.choices_to_slots(weights)[..., None]
    return to_tokens(dispatch, slots)


@partial(jax.jit, static_argnums=(0, 1))
def there_and_back_with_gradients(count, has_shared, memories, mask, x, weights, dy):
    dispatch = Dispatch.of(memories, mask, count, has_shared)
    y, pull = jax.vjp(lambda x, w: there_and_back(dispatch, x, w), x, weights)
    return y, pull(dy)


@settings(deadline=None, max_examples=40)
@given(**ROUTINGS)
def test_dispatch_then_combine_is_the_identity(shape, weights, seed, padded):
    """With weights that add up to 1; so is its gradient, and the weights' gradient is what it should be."""
    memories, mask = random_routing(shape, weights, seed, padded)
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, BATCH, TOKENS, 8)).astype(np.float32)
    w = rng.uniform(0.1, 1, size=memories.shape)
    w = (w / w.sum(axis=-1, keepdims=True)).astype(np.float32)
    y, (dx, dw) = there_and_back_with_gradients(shape[0] + shape[2], shape[2], memories, mask, x, w, dy)
    real = mask[..., None]
    np.testing.assert_allclose(y, x * real, atol=2e-6)
    np.testing.assert_allclose(dx, dy * real, atol=2e-6)
    np.testing.assert_allclose(dw, np.broadcast_to((x * dy).sum(-1, keepdims=True) * real, w.shape), atol=2e-5)


def test_dispatch_and_combine_scatter_no_floats():
    """Forward and backward are gathers; the one scatter is of integers, once for every slot at most."""
    memories, mask = random_routing((4, 2, True), [1.0] * 4, 0)
    x, weights = jnp.ones((BATCH, TOKENS, 8)), jnp.ones(memories.shape)
    operands = [
        equation.invars[0].aval.dtype
        for equation in equations(partial(there_and_back_with_gradients, 5, True), memories, mask, x, weights, x)
        if "scatter" in equation.primitive.name
    ]
    assert operands and all(jnp.issubdtype(dtype, jnp.integer) for dtype in operands)


def test_combine_of_bfloat16_adds_in_float32():
    memories = jnp.tile(jnp.arange(3, dtype=jnp.int32), (1, 64, 1))
    dispatch = dispatch_of(memories, None, 3, False)
    values = np.where(np.arange(dispatch.token_of.shape[1]) < 64, 256.0, 1.0)  # 256 + 1 + 1: each 1 alone is lost in bf16
    y = to_tokens(dispatch, jnp.asarray(values, jnp.bfloat16)[None, :, None])
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((1, 64, 1), 258.0))


# The router.


def route(config, weight, x, mask=None, bias=None):
    graph, values = nnx.split(nnx.eval_shape(lambda: Router(config, rngs=nnx.Rngs(0))))
    named = {"router": jnp.asarray(weight, jnp.float32)}
    if bias is not None:
        named["router_bias"] = jnp.asarray(bias, jnp.float32)
    nnx.replace_by_pure_dict(values, named)
    mask = None if mask is None else jnp.asarray(mask)
    return jax.device_get(nnx.merge(graph, values)(jnp.asarray(x), mask))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, TOKENS, 32)).astype(np.float32)
    return x, rng.normal(0, 0.3, (32, 4)).astype(np.float32), rng.uniform(size=(BATCH, TOKENS)) < 0.7


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("top_k", "has_shared"), [(1, True), (2, True), (2, False), (4, True)])
def test_router_takes_the_largest_and_renormalises(top_k, has_shared):
    x, weight, _ = inputs()
    routing = route(small(top_k=top_k, shared_memory=has_shared), weight, x)
    logits = x.astype(np.float64) @ weight
    p = softmax(logits)
    chosen = np.argsort(-p, axis=-1, kind="stable")[..., :top_k]
    expected = np.take_along_axis(p, chosen, axis=-1)
    np.testing.assert_allclose(routing.logits, logits, atol=1e-5)
    np.testing.assert_array_equal(routing.memories[..., :top_k], chosen)
    np.testing.assert_allclose(routing.weights[..., :top_k], expected / expected.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(routing.weights[..., :top_k].sum(axis=-1), 1, atol=1e-6)
    if has_shared:
        assert (routing.memories[..., top_k] == 4).all() and (routing.weights[..., top_k] == 1).all()
    assert routing.memories.shape[-1] == top_k + has_shared


def test_ties_go_to_the_lowest_index():
    x, weight, _ = inputs()
    routing = route(small(), np.zeros_like(weight), x)
    assert (routing.memories == [0, 1, 4]).all()
    tied = np.stack([weight[:, 0], weight[:, 1], weight[:, 1], weight[:, 1]], axis=-1)
    memories = route(small(), tied, x).memories[..., :2]
    first = x @ weight[:, 0] > x @ weight[:, 1]
    np.testing.assert_array_equal(memories, np.where(first[..., None], [0, 1], [1, 2]))


def test_router_is_float32_whatever_comes_in():
    """Two logits that bfloat16 products would tie."""
    x = np.zeros((1, 1, 32), np.float32)
    x[..., :2] = 1
    weight = np.zeros((32, 4), np.float32)
    weight[:2, 0], weight[:2, 1] = (1.0, 0.0), (1.0, 2.0**-12)
    routing = route(small(dtype="bfloat16"), weight, jnp.asarray(x, jnp.bfloat16))
    assert routing.memories[0, 0, 0] == 1
    assert all(a.dtype == np.float32 for a in (routing.weights, routing.logits, routing.load, routing.importance))


@pytest.mark.parametrize("masked", [False, True])
def test_load_importance_and_losses(masked):
    """Both forms of the balance loss and the z-loss over two layers, from plain counting over real tokens."""
    layers, statistics = [], []
    for seed in range(2):
        x, weight, mask = inputs(seed)
        mask = inputs(0)[2] if masked else np.ones((BATCH, TOKENS), bool)
        x[~mask] = 1e3  # what padded tokens hold does not count
        routing = route(small(), weight, x, mask if masked else None)
        logits = (x.astype(np.float64) @ weight)[mask]
        p = softmax(logits)
        chosen = np.argsort(-p, axis=-1)[:, :2]
        f = np.array([[np.mean(chosen[:, r] == m) for m in range(4)] for r in range(2)])
        z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
        np.testing.assert_allclose(routing.load, f.sum(axis=0), atol=1e-6)
        np.testing.assert_allclose(routing.importance, p.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(routing.z_loss, z, rtol=1e-5)
        layers.append((f, p.mean(axis=0)))
        statistics.append((routing.load, routing.importance))

    load, importance = (jnp.stack(x) for x in zip(*statistics, strict=True))
    per_layer = np.mean([4 * (f * p).sum() for f, p in layers])
    together = [np.mean([layer[i] for layer in layers], axis=0) for i in range(2)]
    np.testing.assert_allclose(balance_loss(load, importance, "per_layer"), per_layer, rtol=1e-5)
    np.testing.assert_allclose(balance_loss(load, importance, "global"), 4 * (together[0] * together[1]).sum(), rtol=1e-5)


def test_nothing_real_gives_finite_statistics():
    x, weight, _ = inputs()
    routing = route(small(), weight, x, np.zeros((BATCH, TOKENS), bool))
    assert not routing.load.any() and not routing.importance.any() and routing.z_loss == 0


def test_balance_loss_pulls_towards_balance():
    """Its gradient flows through the probabilities only and favours the memory that few tokens chose."""
    load = jnp.array([[1.5, 0.5]])
    gradient = jax.grad(lambda p: balance_loss(load, p, "per_layer"))(jnp.array([[0.7, 0.3]]))
    np.testing.assert_allclose(gradient, 2 * load)


def test_loss_free_bias_moves_the_selection_but_not_the_weights():
    x, weight, _ = inputs()
    config = small(router_bias_rate=0.1)
    plain = route(config, weight, x, bias=np.zeros(4))
    np.testing.assert_array_equal(plain.memories, route(small(), weight, x).memories)
    biased = route(config, weight, x, bias=[0, 0, 0, 2.0])
    assert (biased.memories[..., 0] == 3).all() and not (plain.memories[..., 0] == 3).all()
    p = np.take_along_axis(softmax(x.astype(np.float64) @ weight), biased.memories[..., :2], axis=-1)
    np.testing.assert_allclose(biased.weights[..., :2], p / p.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(biased.logits, plain.logits)
    np.testing.assert_array_equal(biased.importance, plain.importance)


def test_weights_are_finite_where_all_chosen_probabilities_underflow():
    """The loss-free bias may choose memories whose probabilities are 0 in float32."""
    config = small("not_shared", num_memories=2, top_k=1)
    router = Router(config, rngs=nnx.Rngs(0))
    router.router[...] = jnp.zeros_like(router.router[...]).at[0].set(jnp.array([60.0, -60.0]))
    router.router_bias[...] = jnp.array([-2.0, 2.0])
    routing = router(jnp.zeros((1, 3, config.hidden_size)).at[..., 0].set(1.0), None)
    assert np.asarray(routing.memories).min() == 1
    np.testing.assert_array_equal(routing.weights, 1.0)
