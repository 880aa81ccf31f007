"""Generation: prompts in pieces and one compiled loop draw what the oracle says, whatever the lengths."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import draw_params, model_of, small
from oracle import oracle_forward, softmax
from safetensors.numpy import load_file

from mom_jax import generation, save_pretrained
from mom_jax.config import ModelConfig
from mom_jax.generation import Continuation, generate, inference_model, new_text, piece_sizes, prefill
from mom_jax.model import bind
from mom_jax.sampling import GREEDY, Sampling
from mom_jax.token_files import ByteTokenizer

NEW = 5  # tokens drawn
LENGTHS = (150, 66, 1)  # three pieces of 64, of which a row may see only padding
SHORT = (40, 21, 1)  # so short that nothing is dispatched to slots, in pieces of 32 neither: quickly compiled
# All of tests/models.py in which the state differs, and the parameters: all_memories here is single_kv too.
KINDS = ("mom", "hybrid", "full_attention_hybrid", "attention_only", "single_memory", "not_shared", "all_memories")
DISPATCHED = ("mom", "hybrid")
LOOSE = Sampling(temperature=3.0)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(generation, "PIECES", (64,))


def config_of(kind: str = "mom") -> ModelConfig:
    """Of two layers, and with the ops that compile most quickly: tests/test_model.py has the others in pieces."""
    more = dict(single_kv_proj=True, use_output_gate=False) if kind == "all_memories" else {}
    return small(kind, num_layers=2, implementation="reference", **more)


def prompts(lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(61, size=length).tolist() for length in lengths]


def next_logits(model, prompts, drawn, directory) -> np.ndarray:
    """What the oracle makes of prompt and drawn tokens, for each drawn token: [B, number of drawn tokens, O]."""
    rows = [[*prompt, *row[:-1]] for prompt, row in zip(prompts, drawn, strict=True)]
    length = max(map(len, rows))
    tokens = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    if model.config.router_bias_rate:  # which the oracle does not know
        return np.asarray(model(jnp.array(tokens), jnp.array(mask)).logits)[:, -len(drawn[0]) :]
    save_pretrained(model, directory)
    config = json.loads((directory / "config.json").read_text())
    return oracle_forward(load_file(directory / "model.safetensors"), config, tokens, mask).logits[:, -len(drawn[0]) :]


def ids(rows: list[Continuation]) -> list[list[int]]:
    return [row.ids for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_argmax_of_the_oracle(kind, monkeypatch, tmp_path):
    """That all kinds are the same function with and without dispatch: tests/test_memory.py."""
    lengths, piece = (LENGTHS, 64) if kind in DISPATCHED else (SHORT, 32)
    monkeypatch.setattr(generation, "PIECES", (piece,))
    texts = prompts(lengths)
    drawn = generate(model_of(config_of(kind)), texts, max_new_tokens=NEW, sampling=GREEDY)
    assert [(len(row.ids), row.ended, row.text) for row in drawn] == [(NEW, "length", None)] * len(texts)
    logits = next_logits(model_of(config_of(kind)), texts, ids(drawn), tmp_path)
    assert np.diff(np.sort(logits, axis=-1)[..., -2:], axis=-1).min() > 1e-4  # so that rounding decides nothing
    np.testing.assert_array_equal(ids(drawn), np.argmax(logits, axis=-1))


def test_any_pieces_of_the_prompt_give_the_same_state(monkeypatch):
    model = model_of(config_of("hybrid"))
    rows = [np.array(prompt) for prompt in prompts()]
    found = []
    for pieces in ((64,), (128, 64)):
        monkeypatch.setattr(generation, "PIECES", pieces)
        found.append(prefill(model.config, nnx.to_pure_dict(nnx.state(model)), rows, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *found)


def test_the_pieces_of_a_prompt_are_the_largest_and_then_binary_digits():
    assert piece_sizes(64) == [64]
    assert piece_sizes(3 * 2048 + 1024 + 192) == [2048, 2048, 2048, 1024, 128, 64]
    for total in range(64, 6000, 64):
        sizes = piece_sizes(total)
        assert sum(sizes) == total and len(sizes) <= total // 2048 + 5


def test_no_length_is_compiled_in(small_pieces, caplog):
    """Longer prompts, other numbers of new tokens, values of settings, seeds, stop tokens and a callback: one program."""
    model = inference_model(model_of(config_of()))

    def call(length, new, temperature, **settings):
        rows = [[1] * length, [2] * (length // 2), [3]]
        return generate(model, rows, max_new_tokens=new, sampling=Sampling(temperature), **settings)

    call(64, 1, 1.0)
    programs = generation.decode._cache_size(), generation._prefill_piece._cache_size()
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        for length, new, temperature in ((2, 64, 0.5), (300, 33, 2.0), (129, 2, 1.0)):
            call(length, new, temperature, seed=new, stop_ids=[new // 2])
        call(65, 20, 1.0, callback=lambda new: None, block=3, max_length=999)
    assert [record.message for record in caplog.records if "ompil" in record.message] == []
    assert programs == (generation.decode._cache_size(), generation._prefill_piece._cache_size())
    call(64, 65, 1.0)  # beyond the buffer: one more program
    assert generation.decode._cache_size() == programs[0] + 1


def test_the_size_of_the_state_depends_on_no_length(small_pieces):
    model = model_of(config_of())
    params = nnx.to_pure_dict(nnx.state(model))
    states = [prefill(model.config, params, [np.ones(length, np.int32)] * 3, None)[0] for length in (3, 150)]
    assert jax.tree.map(np.shape, states[0]) == jax.tree.map(np.shape, states[1])


def test_a_row_ends_at_its_stop_token_and_the_loop_with_the_last_row(small_pieces, monkeypatch):
    model, counts, decode = model_of(config_of()), [], generation.decode

    def counting(*args):
        decoding = decode(*args)
        counts.append(int(decoding.count))
        return decoding

    monkeypatch.setattr(generation, "decode", counting)
    full = ids(generate(model, prompts(), max_new_tokens=20, sampling=LOOSE))
    stops = [row[place] for row, place in zip(full, (2, 5, 3), strict=True)]
    places = [min(row.index(stop) for stop in stops if stop in row) for row in full]
    found = generate(model, prompts(), max_new_tokens=20, sampling=LOOSE, stop_ids=stops)
    assert found == [Continuation(row[:place], "stop", None) for row, place in zip(full, places, strict=True)]
    assert counts == [20, max(places) + 1]
    one = generate(model, prompts(), max_new_tokens=20, sampling=LOOSE, stop_ids=[full[0][0]])
    assert one[0] == Continuation([], "stop", None)


def test_a_seed_gives_a_prompt_the_same_tokens_wherever_it_stands(small_pieces):
    model = model_of(config_of())
    seeds = [7, 8, 9]
    first = ids(generate(model, prompts(), max_new_tokens=NEW, sampling=LOOSE, seed=7))
    assert first == ids(generate(model, prompts(), max_new_tokens=NEW, sampling=LOOSE, seed=seeds))
    turned = generate(model, prompts()[::-1], max_new_tokens=NEW, sampling=LOOSE, seed=seeds[::-1])
    assert first == ids(turned)[::-1]
    other = ids(generate(model, prompts(), max_new_tokens=NEW, sampling=LOOSE, seed=10))
    assert all(a != b for a, b in zip(first, other, strict=True))
    same = ids(generate(model, [prompts()[1]] * 3, max_new_tokens=NEW, sampling=LOOSE, seed=[7, 7, 8]))
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_what_the_callback_gets_adds_up_to_the_result(block, small_pieces):
    model, blocks = model_of(config_of()), []
    stops = ids(generate(model, prompts(), max_new_tokens=20, sampling=LOOSE))[1][8:9]
    settings = dict(max_new_tokens=20, sampling=LOOSE, stop_ids=stops)
    rows = generate(model, prompts(), **settings, callback=blocks.append, block=block)
    assert rows == generate(model, prompts(), **settings)
    assert [sum(parts, []) for parts in zip(*blocks, strict=True)] == ids(rows)
    assert len(blocks) == -(-20 // block) and all(len(row) <= block for new in blocks for row in new)


def test_draws_follow_the_softmax_of_the_logits(monkeypatch, tmp_path):
    """The first token after one prompt, drawn 4,000 times in one batch."""
    monkeypatch.setattr(generation, "PIECES", (4,))
    model = model_of(small("attention_only"))
    drawn = generate(model, [[3, 1, 4]] * 4000, max_new_tokens=1, sampling=Sampling(2.0), max_length=4)
    expected = softmax(next_logits(model, [[3, 1, 4]], [[0]], tmp_path)[0, 0] / 2.0)
    found = np.bincount(np.ravel(ids(drawn)), minlength=61) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_the_repetition_penalty_is_for_prompt_and_new_tokens(small_pieces, tmp_path):
    sampling = Sampling(0.0, repetition_penalty=5.0)
    rows = ids(generate(model_of(config_of()), prompts(SHORT), max_new_tokens=NEW, sampling=sampling))
    seen = np.zeros((len(SHORT), NEW, 61), bool)
    for row, (prompt, new) in enumerate(zip(prompts(SHORT), rows, strict=True)):
        for n in range(NEW):
            seen[row, n, prompt + new[:n]] = True
    logits = next_logits(model_of(config_of()), prompts(SHORT), rows, tmp_path)
    penalized = np.argmax(np.where(seen, np.where(logits < 0, logits * 5, logits / 5), logits), axis=-1)
    np.testing.assert_array_equal(rows, penalized)
    assert (penalized != np.argmax(logits, axis=-1)).any()


def test_weights_of_products_are_in_the_compute_type():
    """That this changes nothing in the layers: tests/test_training.py."""
    model = model_of(small("hybrid", dtype="bfloat16"))
    cast = inference_model(model)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(nnx.state(m))) for m in (model, cast)]
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 32)), jnp.bfloat16)
    np.testing.assert_array_equal(model.logits(hidden), cast.logits(hidden))
    assert cast.embedding.dtype == cast.head.dtype == jnp.bfloat16
    assert inference_model(cast).embedding[...] is cast.embedding[...]


# Text


class LetterTokenizer(ByteTokenizer):
    """Ids that the small models have: 0 to 58 for the bytes from @ to z."""

    eos_id = 60

    def encode(self, text):
        return super().encode(text) - 64

    def decode(self, ids):
        return bytes(token + 64 for token in ids if token < self.eos_id).decode(errors="replace")


class LetterTokenizerWithBos(LetterTokenizer):
    bos_id = 0


class PrefixTokenizer(ByteTokenizer):
    """Drops a space that begins a text, as tokenizers of whole words do, and id 0."""

    def decode(self, ids):
        return super().decode([token for token in ids if token]).removeprefix(" ")


def test_text_goes_in_and_comes_out(small_pieces):
    texts, settings = ["To_be", "", "a"], dict(max_new_tokens=NEW, sampling=LOOSE)
    first, _, last = (LetterTokenizer().encode(text).tolist() for text in texts)
    for tokenizer, tokens in (
        (LetterTokenizer(), [first, [60], last]), (LetterTokenizerWithBos(), [[0, *first], [0], [0, *last]]),
    ):  # fmt: skip
        by_text = generate(model_of(config_of()), texts, tokenizer=tokenizer, **settings)
        assert ids(by_text) == ids(generate(model_of(config_of()), tokens, **settings))
        assert [row.text for row in by_text] == [tokenizer.decode(row.ids) for row in by_text]


def test_ids_that_the_tokenizer_does_not_have_are_drawn_only_to_stop(small_pieces):
    class Smaller(LetterTokenizer):
        vocab_size, eos_id = 8, 60

    def call(sampling, **settings):
        return generate(model_of(config_of()), [[1, 2]] * 9, max_new_tokens=20, sampling=sampling, **settings)

    hot, penalized = Sampling(1e6), Sampling(1e6, top_k=61, repetition_penalty=2.0)
    assert max(map(max, ids(call(hot)))) > 8
    for sampling in (hot, penalized, GREEDY):
        assert max(map(max, ids(call(sampling, tokenizer=Smaller())))) < 8
    stopped = call(hot, tokenizer=Smaller(), stop_ids=[60])
    assert {row.ended for row in stopped} == {"stop", "length"} and max(max(row.ids, default=0) for row in stopped) < 8
    programs = generation.decode._cache_size()
    Smaller.vocab_size = 5
    assert max(map(max, ids(call(hot, tokenizer=Smaller())))) < 5
    assert generation.decode._cache_size() == programs


def test_new_text_is_what_the_new_tokens_add():
    assert new_text(PrefixTokenizer(), b"the end", b" of") == " of"
    assert new_text(PrefixTokenizer(), [0], b" of") == "of"
    assert new_text(ByteTokenizer(), "aé".encode()[:-1], "é".encode()[1:] + b"b") == "éb"
    assert new_text(ByteTokenizer(), "é".encode() * 40, b"b") == "b"
    assert new_text(ByteTokenizer(), b"a", [98, 256, 257, 99]) == "bc"  # a model's vocabulary may be larger


# Refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is not allowed: it must be a positive integer"),
        ({"max_new_tokens": 2.0}, "max_new_tokens = 2.0 is not allowed"),
        ({"block": 0}, "block = 0 is not allowed: it must be a positive integer"),
        ({"max_length": 0}, "max_length = 0 is not allowed: None or positive"),
        ({"prompts": []}, r"prompts = \[\] is not allowed: it must be a list of at least one prompt"),
        ({"prompts": "text"}, "prompts = 'text' is not allowed: it must be a list of"),
        ({"prompts": [[1], "text"]}, r"prompts\[1\] = 'text' is not allowed: text needs a tokenizer"),
        ({"prompts": [[1], []]}, r"prompts\[1\] = \[\] is not allowed: it must have at least one token"),
        ({"prompts": [[61]]}, r"a token id in prompts\[0\] = \[61\] is not allowed: token ids run from 0 to .* = 60"),
        ({"prompts": [[1], [-1]]}, r"a token id in prompts\[1\] = \[-1\] is not allowed"),
        ({"prompts": [[1.0]]}, r"prompts\[0\] = 'float64\[1\]' is not allowed: it must be a list of integers"),
        ({"prompts": [[[1]]]}, r"prompts\[0\] = 'int64\[1, 1\]' is not allowed: it must be a list of integers"),
        ({"prompts": [1, 2]}, r"prompts\[0\] = 'int64\[\]' is not allowed: it must be a list of integers"),
        ({"stop_ids": [61]}, r"a token id in stop_ids = \[61\] is not allowed: token ids run from 0 to .* = 60"),
        ({"stop_ids": ["."]}, r"stop_ids = '<U1\[1\]' is not allowed: it must be a list of integers"),
        ({"seed": -1}, r"seed = -1 is not allowed: integers from 0 to 2\^32 - 1"),
        ({"seed": 1.5}, r"seed = 1.5 is not allowed: integers from 0"),
        ({"seed": [1, 2]}, "the number of seeds = 2 is not allowed: one for each of the 1 prompts, or one integer"),
        ({"sampling": Sampling(top_k=62)}, "Sampling.top_k = 62 is not allowed: None, or from 1 to vocab_size = 61"),
        (
            {"prompts": [[1], [1] * 100], "max_new_tokens": 61},
            r"^max_length = 160 is not allowed: it must be at least 161, the tokens of the longest prompt \(100\) and",
        ),
        ({"max_length": 3, "max_new_tokens": 3}, "^max_length = 3 is not allowed: it must be at least 4"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name_before_any_compute(unchecked_shapes, monkeypatch, settings, message):
    monkeypatch.setattr(generation, "prefill", None)
    settings = {"prompts": [[1]], "max_new_tokens": 1} | settings
    with pytest.raises(ValueError, match=message):
        generate(model_of(config_of("full_attention_hybrid")), settings.pop("prompts"), **settings)


def test_layers_with_a_bounded_state_have_no_limit(small_pieces):
    for kind in ("mom", "hybrid"):
        assert len(generate(model_of(config_of(kind)), prompts(), max_new_tokens=20, sampling=GREEDY)[0].ids) == 20


def test_a_model_all_of_bfloat16_generates():
    """As exports and downloads in bfloat16 are, the router too."""
    params, variables = draw_params(small(dtype="bfloat16"))
    model = bind(small(dtype="bfloat16"), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), variables)
    (row,) = generate(model, [[1, 2, 3]], max_new_tokens=3, sampling=Sampling(temperature=0.0))
    assert len(row.ids) == 3
