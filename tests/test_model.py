"""The whole language model: shapes, strict causality, padding, packing, pieces, refusals, compilations, sizes."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations
from models import KINDS, draw_params, model_of, run_pieces, small
from numerics import LIMITS, assert_close, relative_l2

from mom_jax import model as model_module
from mom_jax.attention import Attention
from mom_jax.config import PRESETS, AttentionConfig
from mom_jax.model import bind, init_params, model_structure, split_params

LIMIT = LIMITS["float32"]
B, T = 2, 70


def random_tokens(num_tokens=T, seed=0, vocab_size=61):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, (B, num_tokens)), jnp.int32)


def in_pieces(model, sizes, tokens, mask=None, documents=None):
    """Logits of all pieces, and the last state."""
    given_ones = [x for x in (tokens, mask, documents) if x is not None]

    def call(*args):
        *arrays, state = args
        arrays = iter(arrays)
        inputs = [None if x is None else jnp.asarray(next(arrays)) for x in (tokens, mask, documents)]
        out = model(*inputs, state)
        return out.logits, out.state

    return run_pieces(call, sizes, model.init_state(B), *given_ones)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_kind_and_pieces_equal_the_whole(kind):
    config = small(kind)
    model, tokens = model_of(config), random_tokens()
    out = model(tokens)
    mom_layers = config.num_layers - len(config.attention.layers)
    assert out.logits.shape == (B, T, 61) and out.logits.dtype == jnp.float32
    assert out.router_logits.shape == (mom_layers, B, T, config.num_memories)
    assert out.balance_loss.shape == () and np.isfinite(out.balance_loss)
    assert (out.balance_loss > 0) == (mom_layers > 0)
    assert np.isfinite(out.logits).all()
    assert_close(in_pieces(model, (35, 35), tokens), (out.logits, out.state), LIMIT)


@pytest.mark.parametrize("form", ["per_layer", "global"])
def test_balance_loss_of_the_model(form):
    """From the router logits that the model returns, counted in numpy, real tokens only."""
    model, mask = model_of(small(balance_loss_form=form)), np.ones((B, T), int)
    mask[0, :20] = 0
    out = model(random_tokens(), jnp.asarray(mask))
    logits = np.asarray(out.router_logits, np.float64)[:, mask == 1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[..., :2]
    load = np.stack([(chosen == m).sum(axis=-1).mean(axis=-1) for m in range(4)], axis=-1)  # [L, M]
    importance = p.mean(axis=1)
    if form == "global":
        load, importance = load.mean(axis=0), importance.mean(axis=0)
    np.testing.assert_allclose(out.balance_loss, np.mean(4 * (load * importance).sum(axis=-1)), rtol=1e-5)


# Causality at training settings: bfloat16, everything rematerialised, dispatched, chunked; a MoM run and attention.
CAUSAL_TOKENS = 130
TRAINING = dict(num_layers=3, dtype="bfloat16", remat="full", vocab_size=CAUSAL_TOKENS, implementation="chunked")
CAUSAL = small("hybrid", **TRAINING, attention=AttentionConfig(layers=(2,), num_heads=4))
PERTURBED = (0, 1, 17, 63, 64, 65, 100, 128, 129)


@cache
def causal_function():
    """tokens, cotangent -> logits, and the cotangent's gradient in every row of the embedding table."""
    params, variables = draw_params(CAUSAL)

    @jax.jit
    def run(params, tokens, cotangent):
        def logits(params):
            model = bind(CAUSAL, params, variables)
            return model.logits(model.hidden(tokens).hidden)

        logits, pull = jax.vjp(logits, params)
        return logits, pull(cotangent)[0]["embedding"]

    return partial(run, params)


def causal_tokens():
    """Every token once, so that a row of the embedding table belongs to one place."""
    return np.random.default_rng(0).permutation(CAUSAL_TOKENS)[None].astype(np.int32)


def test_changing_a_token_changes_nothing_before_it_bit_for_bit():
    run, tokens, zero = causal_function(), causal_tokens(), np.zeros((1, CAUSAL_TOKENS, CAUSAL_TOKENS), np.float32)
    logits = np.asarray(run(tokens, zero)[0])
    for t in PERTURBED:
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % CAUSAL_TOKENS
        perturbed = np.asarray(run(changed, zero)[0])
        np.testing.assert_array_equal(perturbed[:, :t], logits[:, :t], f"token {t}")
        assert (perturbed[:, t] != logits[:, t]).any()
        assert t == CAUSAL_TOKENS - 1 or (perturbed[:, t + 1 :] != logits[:, t + 1 :]).any()


def test_no_gradient_flows_back_to_later_tokens():
    """The gradient of all logits before t is exactly zero in every token from t on, and nowhere else."""
    run, tokens = causal_function(), causal_tokens()
    cotangent = np.random.default_rng(1).normal(size=(1, CAUSAL_TOKENS, CAUSAL_TOKENS)).astype(np.float32)
    for t in (*PERTURBED[1:], CAUSAL_TOKENS):
        before = np.arange(CAUSAL_TOKENS)[None, :, None] < t
        in_table = np.asarray(run(tokens, np.where(before, cotangent, 0))[1])
        in_tokens = np.abs(in_table[tokens[0]]).sum(axis=-1)
        assert not in_tokens[t:].any() and (in_tokens[:t] > 0).all(), f"token {t}"


# Padding, packing, pieces: a model with both kinds of layers.
MIXED = small("hybrid", num_layers=2)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("real", [65, 40])
def test_padding_changes_no_logits_and_no_state(side, real):
    """Also in what follows: the state goes on as if there had been no padding."""
    model = model_of(MIXED)
    tokens, after = random_tokens(real), random_tokens(5, seed=1)
    place = np.arange(T)
    where = {
        "left": place >= T - real,
        "right": place < real,
        "inside": np.isin(place, np.random.default_rng(0).permutation(T)[:real]),
    }[side]
    mask = np.broadcast_to(where, (B, T))
    padded = np.full((B, T), 60, np.int32)
    padded[mask] = np.asarray(tokens).ravel()

    expected = model(tokens)
    out = model(jnp.asarray(padded), jnp.asarray(mask, jnp.int32))
    assert_close(np.asarray(out.logits)[mask].reshape(expected.logits.shape), expected.logits, LIMIT)
    assert_close(out.balance_loss, expected.balance_loss, LIMIT)
    follows, expected_follows = (model(after, state=x.state) for x in (out, expected))
    assert_close(follows.logits, expected_follows.logits, LIMIT)


def test_packed_documents_equal_separate_calls():
    """And the next piece goes on with the last document of a real token."""
    model, lengths = model_of(MIXED), (40, 25)
    tokens, after = random_tokens(), random_tokens(5, seed=1)
    documents = np.repeat([0, 3, 9], (*lengths, 5)).astype(np.int32)[None].repeat(B, axis=0)
    mask = np.ones((B, T), np.int32)
    mask[:, 65:] = 0
    out = model(tokens, jnp.asarray(mask), jnp.asarray(documents))
    np.testing.assert_array_equal(out.state.document, [3, 3])
    first, second = model(tokens[:, :40]), model(tokens[:, 40:65])
    assert_close(out.logits[:, :40], first.logits, LIMIT)
    assert_close(out.logits[:, 40:65], second.logits, LIMIT)
    assert_close(model(after, state=out.state).logits, model(after, state=second.state).logits, LIMIT)


@cache
def whole_of_100():
    model = model_of(MIXED)
    tokens = random_tokens(100, seed=3)
    documents = np.repeat([0, 1, 5], (33, 47, 20)).astype(np.int32)[None].repeat(B, axis=0)
    mask = np.ones((B, 100), np.int32)
    mask[0, 20:26], mask[1, 80:85] = 0, 0
    out = model(tokens, jnp.asarray(mask), jnp.asarray(documents))
    return model, tokens, mask, documents, out


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from([1, 5, 30, 65]), min_size=100, max_size=100))
def test_pieces_equal_the_whole_for_any_split(choices):
    """With documents and padding; the sizes of pieces are few, since each is a compilation."""
    sizes = []
    for size in choices:
        if sum(sizes) < 100:
            sizes.append(size if sum(sizes) + size <= 100 else 1)
    model, tokens, mask, documents, whole = whole_of_100()
    logits, state = in_pieces(model, sizes, np.asarray(tokens), mask, documents)
    real = mask == 1
    assert_close(logits[real], np.asarray(whole.logits)[real], LIMIT, f"{sizes}")
    assert_close(state.layers[0], whole.state.layers[0], LIMIT, f"{sizes}")
    np.testing.assert_array_equal(state.document, whole.state.document)


# Refusals.

TOKENS = np.zeros((B, 6), np.int32)
FULL_ATTENTION = small("attention_only")


def bad(**changes):
    return {"tokens": TOKENS} | changes


REFUSED = [
    (bad(tokens=TOKENS[0]), r"the shape of tokens = \(6,\) .*\[B, T\]"),
    (bad(tokens=TOKENS[:, :0]), r"the shape of tokens = \(2, 0\)"),
    (bad(tokens=TOKENS.astype(np.float32)), "the dtype of tokens = dtype.'float32'.* an integer type"),
    (bad(attention_mask=TOKENS[:, :5] + 1), r"the shape of attention_mask = \(2, 5\) is not allowed: \(2, 6\)"),
    (bad(document_ids=TOKENS[:1]), r"the shape of document_ids = \(1, 6\) is not allowed: \(2, 6\)"),
    (bad(tokens=TOKENS + 61), r"a token id = \[61\] .* vocab_size - 1 = 60"),
    (bad(tokens=TOKENS - 1), r"a token id = \[-1\]"),
    (bad(attention_mask=TOKENS + 2), r"attention_mask = \[2\] is not allowed: 0 or 1"),
    (bad(document_ids=TOKENS - 1), r"document_ids = \[-1, .*from the last document on, 0,"),
    (bad(document_ids=TOKENS + [0, 1, 2, 1, 2, 3]), r"document_ids = \[0, 1, 2, 1, 2, 3\] .*never fall"),
]


@pytest.mark.parametrize(("inputs", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refusals_name_the_input(unchecked_shapes, inputs, message):
    with pytest.raises(ValueError, match=message):
        model_of(FULL_ATTENTION)(**{name: jnp.asarray(x) for name, x in inputs.items()})


def test_padded_tokens_may_be_anything():
    mask = jnp.array([[0, 1, 1, 1, 1, 1]] * B)
    documents = jnp.array([[9, 1, 1, 2, 2, 2]] * B)
    logits = model_of(FULL_ATTENTION)(jnp.asarray(TOKENS).at[:, 0].set(1000), mask, documents).logits
    assert np.isfinite(logits[:, 1:]).all()


def test_a_state_of_another_batch_size_is_refused():
    model = model_of(FULL_ATTENTION)
    with pytest.raises(ValueError, match="the batch size of state = 3 is not allowed: it must be that of tokens, 2"):
        model(jnp.asarray(TOKENS), state=model.init_state(3))


def test_documents_that_fall_behind_the_state_are_refused():
    model = model_of(FULL_ATTENTION)
    state = model(jnp.asarray(TOKENS), document_ids=jnp.asarray(TOKENS) + 4).state
    with pytest.raises(ValueError, match=r"document_ids = \[3, .*from the last document on, 4,"):
        model(jnp.asarray(TOKENS), document_ids=jnp.asarray(TOKENS) + 3, state=state)


def test_a_full_attention_cache_that_is_too_short_is_refused():
    """Outside jit by name; inside, where values are not known, by NaN. Padding takes no room."""
    model, tokens = model_of(FULL_ATTENTION), jnp.asarray(TOKENS)
    state = model(tokens, state=model.init_state(B, max_length=8)).state
    message = r"the number of tokens of a row = 12 .*cache holds 8; make a larger one with init_state"
    with pytest.raises(ValueError, match=message):
        model(tokens, state=state)
    assert np.isfinite(model(tokens, jnp.array([[0, 1, 0, 0, 1, 0]] * B), state=state).logits).all()
    logits = jax.jit(lambda tokens, state: model(tokens, state=state).logits)(tokens, state)
    assert np.isnan(logits[:, 2:]).all() and np.isfinite(logits[:, :2]).all()


def test_one_compilation_for_every_shape():
    """New values, another model of the same configuration, and a state handed on compile nothing new."""
    config = small("attention_only", norm_eps=2e-6)
    models = [bind(config, *draw_params(config, seed)) for seed in range(2)]
    before = model_module._call._cache_size()
    for model in models:
        for seed in range(2):
            out = model(random_tokens(6, seed))
    assert model_module._call._cache_size() == before + 1
    for _ in range(3):
        out = models[0](random_tokens(1), state=out.state)
    assert model_module._call._cache_size() == before + 2


# Parameters.


def size_of(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("preset", "overrides", "size"),
    [
        ("mom_340m", {}, 545_119_424),
        ("mom_340m", {"tie_embeddings": True}, 545_119_424 - 32000 * 1024),
        ("mom_1_3b", {}, None),
        ("gated_deltanet_340m", {}, None),
        ("transformer_340m", {}, 543_736_832),
        ("tiny", {}, None),
    ],
)
def test_parameter_counts(preset, overrides, size):
    """Without allocating; against counting by hand."""
    config = PRESETS[preset](**overrides)
    params, _ = split_params(nnx.merge(*model_structure(config)))
    d, h, k, v, f = config.hidden_size, config.num_heads, config.head_dim, config.value_head_dim, config.mlp_size
    key_values = (config.num_memories + config.shared_memory) * d * h * (k + v + 2)
    mixer = d * config.num_memories + key_values + d * h * k + 2 * d * h * v + 4 * h * (2 * k + v) + 2 * h + v
    mixer = 4 * d * d if config.attention.layers else mixer
    counted = config.num_layers * (mixer + 3 * d * f + 2 * d) + d + config.vocab_size * d * (2 - config.tie_embeddings)
    assert size_of(params) == counted
    assert size is None or counted == size


def test_initialisation():
    """As in the official layer; the layers of a run differ, and the same key gives the same parameters."""
    config = small(num_heads=8, initializer_range=0.03, router_bias_rate=0.1)
    params, variables = init_params(config, jax.random.key(1))
    run = params["runs"]["run_0"]
    rule = run["mixer"]["rule"]
    assert jax.tree.map(np.shape, variables) == {"runs": {"run_0": {"mixer": {"router": {"router_bias": (2, 4)}}}}}
    assert abs(np.std(params["embedding"]) - 0.03) < 0.003 and abs(np.std(rule["w_k"]) - 0.03) < 0.001
    assert (np.exp(rule["a_log"]) < 16).all() and (np.exp(rule["a_log"]) > 0).all()
    dt = np.log1p(np.exp(rule["dt_bias"]))
    assert (dt > 0.00099).all() and (dt < 0.101).all()
    for leaf in jax.tree.leaves(run):
        assert leaf.dtype == jnp.float32
    assert (run["mixer_norm"] == 1).all() and (run["mixer"]["out_norm"] == 1).all()
    assert (np.asarray(rule["w_k"])[0] != np.asarray(rule["w_k"])[1]).all()
    assert_close(init_params(config, jax.random.key(1))[0], params, 0.0)


@cache
def loss_and_gradient(**overrides):
    config = small("hybrid", num_layers=3, attention=AttentionConfig(layers=(2,), num_heads=4), **overrides)
    params, variables = draw_params(config)
    tokens = random_tokens()

    @jax.jit
    def run(params):
        model = bind(config, params, variables)
        out = model.hidden(tokens)
        log_p = jax.nn.log_softmax(model.logits(out.hidden))[:, :-1]
        loss = -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
        return loss + model.balance_loss(out.router) + jnp.mean(out.router.z_loss)

    return jax.device_get(jax.value_and_grad(run)(params))


@pytest.mark.parametrize(
    "overrides",
    [{"remat": "dots"}, {"remat": "full"}, {"remat": "dots", "unroll": True}, {"implementation": "reference"}],
    ids=str,
)
def test_remat_unrolling_and_implementation_change_no_gradient(overrides):
    assert_close(loss_and_gradient(**overrides), loss_and_gradient(remat="none"), LIMIT)


def test_embedding_dropout():
    """Only with a key, and as the key says."""
    config = small("attention_only", embedding_dropout=0.5)
    model, tokens = model_of(config), random_tokens(8)
    plain = model.hidden(tokens).hidden
    keys = [jax.random.key(seed) for seed in range(2)]
    dropped = [model.hidden(tokens, dropout_key=key).hidden for key in (*keys, keys[0])]
    assert relative_l2(dropped[0], plain) > 0.1 and relative_l2(dropped[0], dropped[1]) > 0.1
    assert_close(dropped[2], dropped[0], 0.0)


def test_more_than_ten_runs_keep_their_order():
    """nnx.Dict goes through its keys by name: run_10 before run_2."""
    config = small("attention_only", num_layers=12, attention=AttentionConfig(layers=(1, 3, 5, 7, 9), num_heads=4))
    model = nnx.merge(*model_structure(config))
    kinds = ["attention" if isinstance(run.mixer, Attention) else "mom" for run in model.ordered_runs()]
    assert kinds == [kind for kind, _ in config.layer_runs] and len(kinds) == 11


def test_no_product_of_a_bfloat16_model_is_a_plain_float32_one():
    """Not in the gradient either, where float32 cotangents meet bfloat16 operands: it would run at a lower rate."""
    config = small(dtype="bfloat16")

    def loss(params):
        model = bind(config, params, {})
        return model.logits(model.hidden(random_tokens()).hidden).mean()

    products = [e for e in equations(jax.grad(loss), draw_params(config)[0]) if e.primitive.name == "dot_general"]
    plain = [e for e in products if e.params["precision"] is None and e.invars[0].aval.dtype == jnp.float32]
    assert len(products) > 30 and not plain
