"""The mixture of memories: untouched memories, padding, documents, pieces, and both of its paths.

A piece of fewer than 64 tokens is stepped through, a longer one is dispatched. Most tests hold one against the other, or
the whole against its pieces, with the states; the last ones hold both against the float64 oracle.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import mixer_of, run_pieces, small
from numerics import LIMITS, assert_close
from oracle import mom_row

from mom_jax.layers import LayerState
from pallas_kernels import api
from pallas_kernels.api import Segments

LIMIT = LIMITS["float32"]
M = 4
SHARED = M  # the shared memory's number


@cache
def steered(**overrides):
    """A layer whose routing is decided by the first M numbers of a token: ``call(x, mask, documents, state)``."""
    config = small(**overrides)
    call, module = mixer_of(config)
    graph, values = nnx.split(module)
    router = np.zeros((config.hidden_size, M), np.float32)
    router[:M] = 4 * np.eye(M)
    nnx.replace_by_pure_dict(values, {"router": {"router": jnp.asarray(router)}})
    compiled = call.func

    def run(x, mask, documents, state):
        y, _, state = compiled(values, x, mask, documents, state)
        return y, state

    return run, nnx.merge(graph, values)


def tokens_to(choices, seed=0, batch=2):
    """Inputs [B, T, D] of tokens that go to the given memories, one pair a token."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, len(choices), 32)).astype(np.float32)
    x[..., :M] = -1 + 0.1 * x[..., :M]
    for t, chosen in enumerate(choices):
        for rank, m in enumerate(chosen):
            x[:, t, m] += 2 - rank * 0.5
    return x


def random_tokens(num_tokens, seed=0):
    """Inputs whose tokens go anywhere."""
    rng = np.random.default_rng(seed)
    return tokens_to([rng.choice(M, 2, replace=False) for _ in range(num_tokens)], seed)


def whole(x, document=0):
    """All tokens real and of one document."""
    return np.ones(x.shape[:2], bool), np.full(x.shape[:2], document, np.int32)


def memories_of(state, memories):
    """The states of some memories."""
    return jax.tree.map(lambda s: np.asarray(s)[:, memories], state)


def assert_identical(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("num_tokens", [1, 5, 70])
@pytest.mark.parametrize("document", [0, 3])
def test_unchosen_memories_stay_bit_identical(num_tokens, document):
    """Recurrent state, convolution history and document, short or dispatched, in the same document or a later one."""
    run, layer = steered()
    x = random_tokens(70)
    _, before = run(x, *whole(x), layer.init_state(2))
    piece = tokens_to([(0, 2)] * num_tokens, seed=1)
    _, after = run(piece, *whole(piece, document), before)
    assert_identical(memories_of(after, [1, 3]), memories_of(before, [1, 3]))
    for m in (0, 2, SHARED):
        for new, old in zip(*(jax.tree.leaves(memories_of(s, m)[:2]) for s in (after, before)), strict=True):
            assert (new != old).any()


@pytest.mark.parametrize("implementation", ["reference", "chunked", pytest.param("triton", marks=pytest.mark.gpu)])
def test_dead_slots_after_the_convolution_touch_no_state(implementation):
    """The convolution reaches into dead slots and gates are not an identity there (sigmoid(0) = 1/2): the op masks them.

    Every segment ends as it does alone and without dead slots.
    """
    config = small(conv_bias=True, implementation=implementation)
    _, layer = mixer_of(config)
    segments = Segments.from_lengths(jnp.array([[3, 70, 1]]))
    num_slots = int(segments.offsets[0, -1])
    rng = np.random.default_rng(0)
    real = np.asarray(segments.is_real(num_slots))[0]

    def convolved(name, width):
        x = np.where(real[:, None, None], rng.normal(size=(num_slots, 2, width)), 0).astype(np.float32)[None]
        weight, bias = layer._convolution(name)
        # The plain one for every rule: the kernel leaves zeros in dead slots, which would prove nothing.
        options = {"normalize": name != "v", "implementation": "chunked"}
        return api.short_convolution(jnp.asarray(x), weight, bias, segments, **options)

    streams = {name: convolved(name, width) for name, width in (("q", 16), ("k", 16), ("v", 32))}
    assert np.abs(np.asarray(streams["v"])[0, 3:6]).mean() > 0.01  # the convolution's tail
    gates = {
        "log_decay": jnp.asarray(-rng.uniform(0, 1, (1, num_slots, 2)), jnp.float32),
        "beta": jnp.full((1, num_slots, 2), 0.5),
    }
    o, final = jax.jit(lambda *inputs: layer.rule.run(*inputs, segments, None, None))(streams, gates)
    assert not np.asarray(o)[0, ~real].any()
    step = jax.jit(layer.rule.step)
    states = layer.rule.init_state(1, 1, 3)
    for s, (start, length) in enumerate(zip((0, 64, 192), (3, 70, 1), strict=True)):
        place = api.Place(jnp.int32(0), jnp.array([[s]]), jnp.array([[True]]), jnp.array([True]))
        for n in range(start, start + length):
            token = ({name: x[:, n, None] for name, x in part.items()} for part in (streams, gates))
            _, states = step(*token, states, place)
    assert_close(final, states[0], LIMIT)


SPLITS = [(63, 37), (70, 30), (30, 70), (1,) * 100, (5,) * 6 + (70,)]


@pytest.mark.parametrize("sizes", SPLITS, ids=lambda sizes: f"{len(sizes)}_pieces_from_{sizes[0]}")
def test_pieces_equal_the_whole(sizes):
    """The short path equals the dispatched one, outputs and states: recurrent, histories and documents."""
    run, layer = steered()
    x = random_tokens(100)
    expected = run(x, *whole(x), layer.init_state(2))
    mask, documents = whole(x)
    assert_close(run_pieces(run, sizes, layer.init_state(2), x, mask, documents), expected, LIMIT)


@pytest.mark.parametrize("num_tokens", [5, 70])
def test_convolution_history_crosses_pieces(num_tokens):
    """A piece's first tokens see the last ones of each memory before the piece, however long ago those were."""
    run, layer = steered()
    first = tokens_to([(0, 1)] * 5 + [(2, 3)] * 65)
    _, state = run(first, *whole(first), layer.init_state(2))
    forgetful = state._replace(history=jax.tree.map(jnp.zeros_like, state.history))
    piece = tokens_to([(0, 1)] * num_tokens, seed=1)
    actual, _ = run(piece, *whole(piece), state)
    without, _ = run(piece, *whole(piece), forgetful)
    assert (np.abs(actual - without)[:, :3].max(axis=(0, 2)) > 1e-3).all()

    # The last three inputs of memory 0 are those of the tokens 2, 3 and 4.
    q = np.einsum("btd,dhk->bthk", first[:, 2:5], layer.rule.w_q[...])
    assert_close(state.history["q"][:, 0], q, LIMIT)
    v = np.einsum("btd,dhk->bthk", first[:, 2:5], layer.rule.w_v[0])
    assert_close(state.history["v"][:, 0], v, LIMIT)


def state_of_older_documents(run, layer, later):
    """Document 1 writes memories 2 and 3; after it, if ``later``, document 2 writes memories 0 and 1."""
    state = layer.init_state(2)
    first = tokens_to([(2, 3)] * 70)
    _, written = run(first, *whole(first, 1), state)
    if later:
        second = tokens_to([(0, 1)] * 70, seed=1)
        _, written = run(second, *whole(second, 2), written)
        _, state = run(second, *whole(second, 2), state)
    return written, state


@pytest.mark.parametrize("num_tokens", [5, 70])
@pytest.mark.parametrize("document", [2, 3])
def test_a_memory_of_an_older_document_is_entered_afresh(document, num_tokens):
    """Document 1 wrote memory 2, document 2 never touched it; a later token of document 2, or 3, must not hear of 1."""
    run, layer = steered()
    written, clean = state_of_older_documents(run, layer, later=True)
    piece = tokens_to([(2, 3)] * num_tokens, seed=2)
    actual_y, actual = run(piece, *whole(piece, document), written)
    expected_y, expected = run(piece, *whole(piece, document), clean)
    assert_close(actual_y, expected_y, LIMIT)
    reached = [2, 3, SHARED]
    assert_close(memories_of(actual, reached), memories_of(expected, reached), LIMIT)
    assert (np.asarray(actual.document)[:, reached] == document).all()
    assert_identical(memories_of(actual, [0, 1]), memories_of(written, [0, 1]))


@pytest.mark.parametrize("num_tokens", [37, 70])
def test_a_memory_is_entered_afresh_inside_a_piece(num_tokens):
    """The piece begins in document 2, which the state goes on with; its document 3 reaches the memories of document 1."""
    run, layer = steered()
    written, clean = state_of_older_documents(run, layer, later=True)
    piece = tokens_to([(0, 1)] * 20 + [(2, 3)] * (num_tokens - 20), seed=2)
    mask, documents = whole(piece, 2)
    documents[:, 20:] = 3
    assert_close(run(piece, mask, documents, written)[0], run(piece, mask, documents, clean)[0], LIMIT)


@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_the_next_document_begins_afresh(num_tokens):
    """Nothing of an ended document is left in any memory that the next one reaches, the shared one included."""
    run, layer = steered()
    written, _ = state_of_older_documents(run, layer, later=False)
    piece = tokens_to([(2, 3)] * num_tokens, seed=2)
    actual_y, actual = run(piece, *whole(piece, 2), written)
    expected_y, expected = run(piece, *whole(piece, 2), layer.init_state(2))
    assert_close(actual_y, expected_y, LIMIT)
    assert_close(memories_of(actual, [2, 3, SHARED]), memories_of(expected, [2, 3, SHARED]), LIMIT)


def where_memories(chosen, new, old):
    """``new`` [B, M, ...] for the chosen memories [B, M], ``old`` for the others."""
    return np.where(chosen.reshape(chosen.shape + (1,) * (new.ndim - 2)), new, old)


PADDINGS = {
    "left": lambda n, total: np.arange(total) >= total - n,
    "right": lambda n, total: np.arange(total) < n,
    "inside": lambda n, total: np.isin(np.arange(total), np.random.default_rng(0).permutation(total)[:n]),
}


@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize(("real", "total"), [(30, 37), (37, 70), (70, 100)])
def test_padding_changes_nothing(side, real, total):
    """Outputs at real tokens, and the state, as of the row without padding; from a state of an earlier piece."""
    run, layer = steered()
    x = random_tokens(real, seed=1)
    first = random_tokens(70)
    _, before = run(first, *whole(first), layer.init_state(2))
    expected = run(x, *whole(x), before)

    mask = np.broadcast_to(PADDINGS[side](real, total), (2, total))
    padded = np.full((2, total, 32), 50.0, np.float32)
    padded[mask] = x.reshape(-1, 32)
    documents = np.where(mask, 0, 9).astype(np.int32)
    y, state = run(padded, mask, documents, before)
    assert_close((np.asarray(y)[mask].reshape(x.shape), state), expected, LIMIT)


@pytest.mark.parametrize("num_tokens", [5, 70])
def test_a_piece_of_padding_leaves_the_state_bit_identical(num_tokens):
    run, layer = steered()
    first = random_tokens(70)
    _, before = run(first, *whole(first), layer.init_state(2))
    x = random_tokens(num_tokens, seed=1)
    _, after = run(x, np.zeros(x.shape[:2], bool), whole(x, 5)[1], before)
    assert_identical(after, before)


def test_rows_are_padded_each_on_its_own():
    """One row full, the other nearly empty: both as they are alone."""
    run, layer = steered()
    x = random_tokens(70)
    mask, documents = whole(x)
    mask[1, 5:] = False
    y, state = run(x, mask, documents, layer.init_state(2))
    full_y, full_state = run(x, *whole(x), layer.init_state(2))
    short_y, short_state = run(x[:, :5], *whole(x[:, :5]), layer.init_state(2))
    assert_close(y[0], full_y[0], LIMIT)
    assert_close(y[1, :5], short_y[1], LIMIT)
    for row, expected in ((0, full_state), (1, short_state)):
        assert_close(*(jax.tree.map(lambda s, row=row: s[row], part) for part in (state, expected)), LIMIT)


@pytest.mark.parametrize("lengths", [(30, 7), (37, 30, 3), (5, 1, 64), (70, 30)], ids=str)
def test_packed_documents_equal_separate_calls(lengths):
    run, layer = steered()
    x = random_tokens(sum(lengths), seed=3)
    mask, documents = whole(x)
    documents += np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    y, state = run(x, mask, documents, layer.init_state(2))

    last = layer.init_state(2)
    for document, (start, length) in enumerate(zip(np.cumsum((0, *lengths)), lengths, strict=False)):
        part = x[:, start : start + length]
        sizes = [size for size in (70, 37, 30, 5) if size == length] or [1] * length
        expected, after = run_pieces(run, sizes, layer.init_state(2), part, *whole(part, document))
        assert_close(y[:, start : start + length], expected, LIMIT, f"document {document}")
        last = jax.tree.map(partial(where_memories, np.asarray(after.document) == document), after, last)
    assert_close(state, last, LIMIT)


def test_none_is_the_plain_case():
    """Without a mask all tokens are real; without documents there is one; without a state memories are empty."""
    run, layer = steered()
    for num_tokens in (5, 70):
        x = random_tokens(num_tokens)
        expected, _ = run(x, *whole(x), layer.init_state(2))
        y, state = run(x, None, None, None)
        assert state is None
        assert_close(y, expected, LIMIT)
        y, _ = run(x, None, None, layer.init_state(2))
        assert_close(y, expected, LIMIT)


VARIANTS = {
    "all_memories": dict(num_memories=3, top_k=3, conv_bias=True, conv_size=3),
    "one_memory": dict(num_memories=1, top_k=1, shared_memory=False, conv_bias=True),
    "single_kv": dict(single_kv_proj=True, use_output_gate=False),
    "single_kv_not_shared": dict(single_kv_proj=True, shared_memory=False, conv_size=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_paths_agree_in_every_variant(variant):
    config = small(**VARIANTS[variant])
    call, layer = mixer_of(config)

    def run(*inputs):
        y, _, state = call(*inputs)
        return y, state

    x = np.random.default_rng(0).normal(size=(2, 70, 32)).astype(np.float32)
    mask, documents = whole(x)
    mask[0, 10:13] = False
    documents[:, 50:] = 1
    y, state = run(x, mask, documents, layer.init_state(2))
    pieces, after = run_pieces(run, (35, 35), layer.init_state(2), x, mask, documents)
    assert_close((np.asarray(y)[mask], state), (pieces[mask], after), LIMIT)


# Gradients.


@cache
def gradient_of(num_tokens):
    """A compiled function: values, x, mask, state, cotangents -> outputs and the gradients of values, x and state."""
    _, layer = steered()
    graph, _ = nnx.split(layer)

    @jax.jit
    def run(values, x, mask, state, dy, d_recurrent):
        def function(values, x, recurrent, history):
            given = state._replace(recurrent=recurrent, history=history)
            own = LayerState(jax.tree.map(lambda s: s[None], given), jnp.int32(0))
            y, _, after = nnx.merge(graph, values)(x, mask, jnp.zeros(mask.shape, jnp.int32), own)
            return y, after.recurrent[0]

        outputs, pull = jax.vjp(function, values, x, state.recurrent, state.history)
        return outputs, pull((dy, d_recurrent))

    return run


def gradient_inputs():
    run, layer = steered()
    _, values = nnx.split(layer)
    first = random_tokens(70, seed=5)
    _, state = run(first, *whole(first), layer.init_state(2))
    state = state._replace(document=jnp.zeros_like(state.document))
    x = random_tokens(63, seed=6)
    rng = np.random.default_rng(7)
    dy = rng.normal(size=x.shape).astype(np.float32)
    return values, x, state, dy, rng.normal(size=state.recurrent.shape).astype(np.float32)


def test_gradients_of_both_paths_agree():
    """T = 63 token by token, and the same row padded to 70 by dispatch: of parameters, inputs, states and histories."""
    values, x, state, dy, d_recurrent = gradient_inputs()
    stepped = gradient_of(63)(values, x, np.ones((2, 63), bool), state, dy, d_recurrent)
    padding = [(0, 0), (0, 7)]
    mask = np.pad(np.ones((2, 63), bool), padding)
    x70, dy70 = (np.pad(a, [*padding, (0, 0)], constant_values=3.0) for a in (x, dy))
    (y, after), (in_values, in_x, *in_state) = gradient_of(70)(values, x70, mask, state, dy70 * mask[..., None], d_recurrent)
    dispatched = (y[:, :63], after), (in_values, in_x[:, :63], *in_state)
    assert_close(dispatched, stepped, LIMIT)
    assert not np.asarray(in_x)[:, 63:].any()


def official_weights(values):
    """The layer's parameters as the oracle wants them, float64."""
    tree = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(values))
    rule, width = tree["rule"], tree["out_norm"].shape[0]

    def linear(w):
        return w.reshape(w.shape[0], -1).T

    weights = {
        "attn.gate.weight": tree["router"]["router"].T,
        "attn.q_proj.weight": linear(rule["w_q"]),
        "attn.A_log": rule["a_log"],
        "attn.dt_bias": rule["dt_bias"],
        "attn.o_norm.weight": tree["out_norm"],
        "attn.g_proj.weight": linear(tree["w_g"]),
        "attn.o_proj.weight": tree["w_o"].reshape(-1, tree["w_o"].shape[-1]).T,
    }
    assert tree["w_o"].shape[1] == width
    for name in "kvab":
        weights[f"attn.shared_{name}.weight"] = linear(rule[f"shared_{name}"])
        weights |= {f"attn.{name}_proj.{m}.weight": linear(w) for m, w in enumerate(rule[f"w_{name}"])}
    for name in "qkv":
        weights[f"attn.{name}_conv1d.weight"] = linear(tree[f"conv_{name}"])[:, None]
    return weights


def test_gradients_match_finite_differences_of_the_oracle():
    """Dispatched, with padding: derivatives along a random direction of every leaf, against float64 differences."""
    run, layer = steered()
    _, values = nnx.split(layer)
    config = small()
    official = dict(
        num_heads=2, head_dim=16, num_memories=M, topk=2, shared_mem=True, single_kv_proj=False, conv_bias=False,
        norm_eps=config.norm_eps, use_output_gate=True, conv_size=4,
    )  # fmt: skip
    x = random_tokens(70, seed=8)
    mask = whole(x)[0]
    mask[0, 30:34], mask[1, :20] = False, False
    rng = np.random.default_rng(9)
    dy = rng.normal(size=x.shape).astype(np.float32) * mask[..., None]
    state = layer.init_state(2)
    d_recurrent = rng.normal(size=state.recurrent.shape).astype(np.float32)
    outputs, (in_values, in_x, *_) = gradient_of(70)(values, x, mask, state, dy, d_recurrent)

    def oracle(values, x):
        rows = [mom_row(official_weights(values), official, x[b], mask[b], np.zeros(70, int)) for b in range(2)]
        return np.nan_to_num(np.stack([row[0] for row in rows])), np.stack([row[2] for row in rows])

    def loss(values, x):
        y, states = oracle(values, x)
        return np.sum(y * dy) + np.sum(states * d_recurrent)

    exact = jax.tree.map(lambda v: np.asarray(v, np.float64), values)
    x64 = x.astype(np.float64)
    y, states = oracle(exact, x64)
    assert_close((np.asarray(outputs[0]) * mask[..., None], outputs[1]), (y, states), LIMIT)

    leaves, tree = jax.tree.flatten((exact, x64))
    for i, gradient in enumerate(jax.tree.leaves((in_values, in_x))):
        direction = rng.normal(size=gradient.shape)
        step = 1e-5

        def moved(by, i=i, direction=direction):
            return loss(*jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + by * direction, *leaves[i + 1 :]]))

        expected = (moved(step) - moved(-step)) / (2 * step)
        gradient = np.asarray(gradient, np.float64)
        error = abs(np.sum(gradient * direction) - expected) / np.linalg.norm(gradient)
        assert error < 1e-3, f"leaf {i} of shape {gradient.shape}: {error}"
