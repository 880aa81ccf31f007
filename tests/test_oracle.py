"""The oracle against the golden cases of the official code, and against what the design says of it."""

import numpy as np
import pytest
from oracle import load_golden, oracle_forward, random_tensors, rotate

GOLDEN_CASES = ["default", "left_padded", "no_shared_top1", "single_kv"]

# Everything that the golden cases do not have: attention in a window, odd widths, biases, an untied head.
HYBRID = dict(
    hidden_size=24, num_hidden_layers=3, vocab_size=31, num_heads=2, head_dim=8, expand_v=2, intermediate_size=20,
    num_memories=3, topk=2, conv_size=3, conv_bias=True, use_output_gate=False,
    attn=dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=5),
)  # fmt: skip
PLAIN = HYBRID | dict(num_hidden_layers=2, use_output_gate=True, conv_bias=False, conv_size=4, attn=None)
CONFIGS = {"plain": PLAIN, "hybrid": HYBRID, "single_kv": PLAIN | dict(single_kv_proj=True, shared_mem=False)}


@pytest.fixture(params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    return random_tensors(config, seed=1), config


def random_tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, HYBRID["vocab_size"], (rows, length))


def assert_states_equal(actual, expected):
    for actual_layer, expected_layer in zip(actual, expected, strict=True):
        assert (actual_layer is None) == (expected_layer is None)
        if actual_layer is not None:
            np.testing.assert_allclose(actual_layer, expected_layer, atol=1e-12)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_matches_the_official_code(name):
    tensors, config, case = load_golden(name)
    mask = case.get("attention_mask")
    output = oracle_forward(tensors, config, case["input_ids"], mask)
    real = np.ones(case["input_ids"].shape, bool) if mask is None else mask != 0
    assert (mask is not None) == (name == "left_padded") and real.sum() > 150

    golden_router_logits = case["router_logits"].reshape(output.router_logits.shape)
    np.testing.assert_allclose(output.logits[real], case["logits"][real], rtol=0, atol=3e-6)
    np.testing.assert_allclose(output.router_logits[:, real], golden_router_logits[:, real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(output.balance_loss_global, case["aux_loss"].item(), rtol=0, atol=1e-6)
    for layer in (0, 1):  # the golden's last one is taken after the final norm
        np.testing.assert_allclose(output.hidden[layer][real], case["hidden"][layer][real], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_random_tensors_have_the_official_names_and_shapes(name):
    tensors, config, _ = load_golden(name)
    made = random_tensors(config, seed=0)
    assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in tensors.items()}
    assert all(value.dtype == np.float32 for value in made.values())


def test_every_tensor_is_read(model):
    tensors, config = model
    tokens = random_tokens(1, 12)
    logits = oracle_forward(tensors, config, tokens).logits
    for name, value in tensors.items():
        changed = oracle_forward(tensors | {name: value * 1.1}, config, tokens).logits
        assert np.abs(changed - logits).max() > 1e-6, name


def test_shapes(model):
    tensors, config = model
    output = oracle_forward(tensors, config, random_tokens(2, 7))
    attention_layers = config["attn"]["layers"] if config["attn"] else []
    memories = config["num_memories"] + config.get("shared_mem", True)
    assert output.logits.shape == (2, 7, 31) and np.isfinite(output.logits).all()
    assert output.router_logits.shape == (config["num_hidden_layers"] - len(attention_layers), 2, 7, 3)
    for layer, state in enumerate(output.states):
        assert state is None if layer in attention_layers else state.shape == (2, memories, 2, 8, 16)


def test_no_token_depends_on_a_later_one(model):
    tensors, config = model
    tokens = random_tokens(2, 20)
    before = oracle_forward(tensors, config, tokens)
    for t in (1, 11, 19):
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % config["vocab_size"]
        after = oracle_forward(tensors, config, changed)
        np.testing.assert_array_equal(after.logits[0, :t], before.logits[0, :t])
        np.testing.assert_array_equal(after.logits[1], before.logits[1])
        assert np.all(np.abs(after.logits[0, t:] - before.logits[0, t:]).max(-1) > 1e-9)


def test_padding_is_as_if_it_were_not_there(model):
    tensors, config = model
    tokens = random_tokens(2, 24)
    mask = np.random.default_rng(1).random((2, 24)) < 0.7
    mask[:, :2], mask[:, -1], mask[:, 10:14] = False, False, False
    garbage = np.where(mask, tokens, -1)
    padded = oracle_forward(tensors, config, garbage, mask)
    assert np.isnan(padded.logits[~mask]).all()
    for row in (0, 1):
        alone = oracle_forward(tensors, config, tokens[row, mask[row]][None])
        np.testing.assert_allclose(padded.logits[row, mask[row]], alone.logits[0], atol=1e-12)
        np.testing.assert_allclose(padded.router_logits[:, row, mask[row]], alone.router_logits[:, 0], atol=1e-12)
        assert_states_equal([s if s is None else s[row : row + 1] for s in padded.states], alone.states)

        single = oracle_forward(tensors, config, garbage[row : row + 1], mask[row : row + 1])
        assert single.balance_loss_global == pytest.approx(alone.balance_loss_global, abs=1e-12)
        assert single.balance_loss_per_layer == pytest.approx(alone.balance_loss_per_layer, abs=1e-12)


def test_packed_documents_are_separate_calls(model):
    tensors, config = model
    tokens = random_tokens(1, 22)
    # The last document is one token, so one of the three memories stays as an earlier document left it.
    documents = np.repeat([3, 5, 4], [9, 12, 1])[None]
    packed = oracle_forward(tensors, config, tokens, document_ids=documents)
    pieces = [oracle_forward(tensors, config, tokens[:, cut]) for cut in (slice(0, 9), slice(9, 21), slice(21, 22))]
    np.testing.assert_allclose(packed.logits, np.concatenate([p.logits for p in pieces], 1), atol=1e-12)
    router_logits = np.concatenate([p.router_logits for p in pieces], 2)
    np.testing.assert_allclose(packed.router_logits, router_logits, atol=1e-12)

    # A memory ends as the last document that reached it leaves it: one that reached it made its state non-zero.
    expected = []
    for layer in range(config["num_hidden_layers"]):
        state = pieces[0].states[layer]
        for piece in pieces[1:]:
            if state is not None:
                reached = np.any(piece.states[layer] != 0, axis=(2, 3, 4), keepdims=True)
                state = np.where(reached, piece.states[layer], state)
        expected.append(state)
    assert_states_equal(packed.states, expected)
    assert not np.allclose(packed.logits[:, 9:], oracle_forward(tensors, config, tokens).logits[:, 9:], atol=1e-3)


def test_a_document_taken_up_again_is_refused():
    tensors = random_tensors(PLAIN, seed=1)
    documents = np.array([[1, 1, 2, 1]])
    with pytest.raises(ValueError, match="contiguous"):
        oracle_forward(tensors, PLAIN, random_tokens(1, 4), document_ids=documents)
    oracle_forward(tensors, PLAIN, random_tokens(1, 4), np.array([[1, 1, 0, 1]]), documents)  # only padding between


def test_a_token_outside_the_vocabulary_is_refused():
    tensors = random_tensors(PLAIN, seed=1)
    for token in (-1, PLAIN["vocab_size"]):
        with pytest.raises(ValueError, match="token ids"):
            oracle_forward(tensors, PLAIN, np.array([[0, token]]))


def test_equal_router_logits_choose_the_lowest_memories():
    config = PLAIN | dict(num_hidden_layers=1)
    tensors = random_tensors(config, seed=1)
    tensors["model.layers.0.attn.gate.weight"] *= 0
    output = oracle_forward(tensors, config, random_tokens(2, 6))
    touched = np.any(output.states[0] != 0, axis=(2, 3, 4))
    np.testing.assert_array_equal(touched, [[True, True, False, True]] * 2)
    # Every k-th choice falls on one memory, the probabilities are 1/M: M * R * 1 * 1/M.
    assert output.balance_loss_global == pytest.approx(config["topk"])


def test_one_token_writes_one_outer_product():
    config = PLAIN | dict(num_hidden_layers=1, topk=1, shared_mem=False)
    output = oracle_forward(random_tensors(config, seed=1), config, random_tokens(1, 1))
    chosen = output.router_logits[0, 0, 0].argmax()
    for m, state_HKV in enumerate(output.states[0][0]):
        ranks = [np.linalg.matrix_rank(state_KV) for state_KV in state_HKV]
        assert ranks == ([1, 1] if m == chosen else [0, 0])


def test_balance_losses_of_two_layers():
    config = PLAIN | dict(topk=1)
    tensors = random_tensors(config, seed=1)
    tensors["model.layers.0.attn.gate.weight"] *= 0
    output = oracle_forward(tensors, config, random_tokens(2, 30))
    p = np.exp(output.router_logits[1]).reshape(-1, 3)
    p /= p.sum(-1, keepdims=True)
    chosen = np.eye(3)[p.argmax(-1)]
    second = 3 * chosen.mean(0) @ p.mean(0)
    both = 3 * (chosen.mean(0) / 2 + [0.5, 0, 0]) @ (p.mean(0) / 2 + 1 / 6)
    assert output.balance_loss_per_layer == pytest.approx((1 + second) / 2)
    assert output.balance_loss_global == pytest.approx(both)
    assert abs(both - (1 + second) / 2) > 1e-3


@pytest.mark.parametrize("window", [1, 5, None])
def test_attention_sees_exactly_its_window(window):
    config = HYBRID | dict(num_hidden_layers=1, attn=dict(layers=[0], num_heads=2, window_size=window))
    tensors, tokens, t = random_tensors(config, seed=1), random_tokens(1, 9), 2
    changed = tokens.copy()
    changed[0, t] = (changed[0, t] + 1) % config["vocab_size"]
    before, after = (oracle_forward(tensors, config, x) for x in (tokens, changed))
    seen = np.any(before.logits != after.logits, axis=-1)[0]
    np.testing.assert_array_equal(seen, [t <= s < t + (window or 9) for s in range(9)])
    assert before.router_logits.shape == (0, 1, 9, 3) and before.balance_loss_global == 0


def test_attention_is_the_textbook_formula():
    """Without a window, all at once in matrices, from keys and queries as complex numbers (the half-split pairing)."""
    D, H, G, T = 24, 4, 2, 10
    config = HYBRID | dict(num_hidden_layers=1, attn=dict(layers=[0], num_heads=H, num_kv_heads=G))
    tensors, tokens = random_tensors(config, seed=1), random_tokens(1, T)
    W = {name.removeprefix("model.layers.0."): np.float64(value) for name, value in tensors.items()}
    before = np.float64(tensors["model.embeddings.weight"])[tokens[0]]
    x = before / np.sqrt((before**2).mean(-1, keepdims=True) + 1e-6) * W["attn_norm.weight"]
    q, k, v = ((x @ W[f"attn.{name}_proj.weight"].T).reshape(T, -1, D // H) for name in "qkv")
    turn = np.exp(1j * np.arange(T)[:, None, None] * 10000.0 ** -(np.arange(3) / 3))
    q, k = ((y[..., :3] + 1j * y[..., 3:]) * turn for y in (q, k))
    scores = np.einsum("thd,shd->hts", q, np.repeat(k, H // G, 1).conj()).real / np.sqrt(D // H)
    p = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
    p /= p.sum(-1, keepdims=True)
    x = before + np.einsum("hts,shd->thd", p, np.repeat(v, H // G, 1)).reshape(T, D) @ W["attn.o_proj.weight"].T
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * W["mlp_norm.weight"]
    gate, up = (normed @ W[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    expected = x + (gate / (1 + np.exp(-gate)) * up) @ W["mlp.down_proj.weight"].T
    np.testing.assert_allclose(oracle_forward(tensors, config, tokens).hidden[1][0], expected, atol=1e-12)


def test_rotary_pairs_the_halves():
    np.testing.assert_allclose(rotate(np.eye(4)[0], 3, 10000.0), [np.cos(3), 0, np.sin(3), 0])
    np.testing.assert_allclose(rotate(np.eye(4)[3], 3, 10000.0), [0, -np.sin(0.03), 0, np.cos(0.03)])
