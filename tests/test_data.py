"""Token files, tokenizers and the Grain pipelines: each token once, the same on all processes, resumable anywhere."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_jax.config import DataConfig
from mom_jax.data import NO_TARGET, MQARConfig, make_dataset, make_mqar_dataset
from mom_jax.token_files import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    TokenFile,
    TokenFileWriter,
    load_tokenizer,
    new_prepared_directory,
)

EOS = ByteTokenizer.eos_id


def write_token_file(directory, documents, tokenizer=None):
    """A prepared split of documents given as lists of ids, each of which gets the end-of-document id."""
    writer = TokenFileWriter(directory / "train.tokens", tokenizer or ByteTokenizer())
    for document in documents:
        writer.add(np.array(document, np.int32), num_bytes=len(document))
    writer.finish([{"name": "a.txt", "bytes": 1}])
    return TokenFile(directory / "train.tokens")


@pytest.fixture
def token_file(tmp_path, rng):
    return write_token_file(tmp_path, [rng.integers(0, 256, length) for length in (1, 40, 3, 100, 7, 7, 64, 31, 200)])


@pytest.fixture
def bpe():
    """A tokenizer with a token that ends documents, a gap in its ids, and truncation and padding left switched on."""
    vocabulary = {character: index for index, character in enumerate("abcdefghijklmnopqrstuvwxyz</>_|")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {"zz": 70_000}, [("z", "z")]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    return tokenizer


def rows(batches, name):
    return np.concatenate([batch[name] for batch in batches])


# Tokenizers


@given(st.text())
def test_byte_tokenizer_round_trips_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text.encode())
    assert tokenizer.decode([*ids, EOS]) == text


def test_hugging_face_tokenizer_takes_text_as_it_is(bpe):
    eos_id = bpe.token_to_id("</s>")
    tokenizer = HuggingFaceTokenizer(bpe, eos_id)
    assert tokenizer.vocab_size == 70_001  # the largest id counts, not the number of entries
    for text in ("abczz", "a</s>b"):
        ids = tokenizer.encode(text)
        assert eos_id not in ids and len(ids) > 2
        assert tokenizer.decode(ids).replace(" ", "") == text
    np.testing.assert_array_equal(tokenizer.encode_batch(["abc", "zz"])[1], [70_000])


def test_load_tokenizer(tmp_path, bpe):
    bpe.save(str(tmp_path / "tokenizer.json"))
    token_file = write_token_file(tmp_path, [[1, 2]], HuggingFaceTokenizer(bpe, eos_id=3, bos_id=4))
    assert token_file.tokens.dtype == np.uint32 and token_file.tokens.tolist() == [4, 1, 2, 3]
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (3, 4, 70_001)

    bpe.add_tokens(["more"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json: sha256"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.json that"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        load_tokenizer(tmp_path)


# Token files


def test_token_file_holds_what_was_written(tmp_path):
    writer = TokenFileWriter(tmp_path / "train.tokens", ByteTokenizer())
    writer.add(np.array([5, 6]), 2, ends_document=False)
    writer.add(np.array([7]), 1)
    writer.add(np.array([8]), 1)
    description = writer.finish([{"name": "a.txt", "bytes": 4}])
    token_file = TokenFile(tmp_path / "train.tokens")
    token_file.verify()
    assert token_file.tokens.dtype == np.uint16 and token_file.tokens.tolist() == [5, 6, 7, EOS, 8, EOS]
    assert token_file.document_offsets.tolist() == [0, 4, 6]
    assert token_file.description == description
    assert (description.num_tokens, description.num_documents, description.num_bytes) == (6, 2, 4)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def edit_description(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "no description": (lambda d: (d / "train.json").unlink(), "train.json does not exist"),
    "no JSON": (lambda d: (d / "train.json").write_text("{"), "train.json is not JSON"),
    "version": (lambda d: edit_description(d / "train.json", format_version=2), "format_version = 2 .* reads 1"),
    "dtype": (lambda d: edit_description(d / "train.json", dtype="int8"), "dtype = 'int8' .*'uint16', 'uint32'"),
    "extra field": (lambda d: edit_description(d / "train.json", more=1), "fields = .*'more'.* they must be"),
    "no tokens": (lambda d: edit_description(d / "train.json", num_tokens=0), "num_tokens = 0 .* positive integer"),
    "no token file": (lambda d: (d / "train.tokens").unlink(), "train.tokens does not exist"),
    "short tokens": (lambda d: (d / "train.tokens").write_bytes(b"123"), "train.tokens: size = 3 .* says 8 bytes"),
    "short documents": (lambda d: (d / "train.documents").write_bytes(b"1"), "train.documents: size = 1 .* 8 bytes"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_directories_are_refused_on_opening(tmp_path, damage, message):
    write_token_file(tmp_path, [[1, 2, 3]])
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TokenFile(tmp_path / "train.tokens")


def test_a_directory_is_no_token_file(tmp_path):
    with pytest.raises(ValueError, match="token file = .* must be a path ending in .tokens"):
        TokenFile(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.tokens", np.array([1, 2, 4, EOS], "<u2"), "train.tokens: sha256"),
        ("train.tokens", np.array([1, 300, 3, EOS], "<u2"), r"train.tokens: token 1 \(byte 2\) is 300, .* = 257"),
        ("train.documents", np.array([1], "<i8"), "train.documents: sha256"),
    ],
)
def test_verify_finds_changed_files(tmp_path, file, content, message):
    write_token_file(tmp_path, [[1, 2, 3]]).verify()
    content.tofile(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        TokenFile(tmp_path / "train.tokens").verify()


def test_verify_wants_ascending_documents(tmp_path):
    token_file = write_token_file(tmp_path, [[1], [2]])
    token_file.document_offsets[1] = 0
    with pytest.raises(ValueError, match="document offsets must ascend"):
        token_file.verify()


def test_a_failed_preparation_leaves_what_was_there(tmp_path):
    output = tmp_path / "data"
    with new_prepared_directory(output) as directory:
        write_token_file(directory, [[1]])
    with pytest.raises(RuntimeError), new_prepared_directory(output, overwrite=True) as directory:
        write_token_file(directory, [[2]])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [output]
    assert TokenFile(output / "train.tokens").tokens.tolist() == [1, EOS]

    with pytest.raises(FileExistsError, match="already prepared"), new_prepared_directory(output):
        pass
    with new_prepared_directory(output, overwrite=True) as directory:
        write_token_file(directory, [[2]])
    assert list(tmp_path.iterdir()) == [output]
    assert TokenFile(output / "train.tokens").tokens.tolist() == [2, EOS]


def test_other_peoples_directories_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="not a prepared directory"):
            with new_prepared_directory(path, overwrite=True):
                pass


# Pipelines over token files


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(2, 200), length=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_evaluation_windows_hold_each_target_once_in_order(tmp_path_factory, num_tokens, length, batch_size):
    token_file = write_token_file(tmp_path_factory.mktemp("tokens"), [np.arange(num_tokens - 1) % 256])
    config = DataConfig(sequence_length=length, batch_size=batch_size)
    batches = list(make_dataset(token_file, config, train=False))
    assert all(batch["tokens"].shape == (batch_size, length) for batch in batches)
    assert all(array.dtype == np.int32 for batch in batches for array in batch.values())
    tokens, targets = rows(batches, "tokens"), rows(batches, "targets")
    real = targets != NO_TARGET
    np.testing.assert_array_equal(tokens[real], token_file.tokens[:-1])
    np.testing.assert_array_equal(targets[real], token_file.tokens[1:])
    assert not tokens[~real].any()


def test_training_windows_visit_every_window_once_an_epoch_in_new_orders(token_file):
    config = DataConfig(sequence_length=8, batch_size=3)
    num_windows = (len(token_file.tokens) - 1) // 8
    batches = list(islice(make_dataset(token_file, config, train=True), num_windows))  # three epochs
    epochs = rows(batches, "tokens").reshape(3, num_windows, 8)
    windows = np.array(token_file.tokens[: num_windows * 8]).reshape(num_windows, 8)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(windows.tolist())
        assert (epoch != windows).any()
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    np.testing.assert_array_equal(rows(batches, "tokens")[:, 1:], rows(batches, "targets")[:, :-1])

    again = islice(make_dataset(token_file, config, train=True), num_windows)
    np.testing.assert_array_equal(rows(again, "tokens"), rows(batches, "tokens"))
    ones = islice(make_dataset(token_file, dataclasses.replace(config, batch_size=1), train=True), 3 * num_windows)
    np.testing.assert_array_equal(rows(list(ones), "tokens"), rows(batches, "tokens"))
    other_seed = islice(make_dataset(token_file, dataclasses.replace(config, seed=1), train=True), num_windows)
    assert (rows(other_seed, "tokens") != rows(batches, "tokens")).any()


def packed_pieces(batches):
    """The (tokens, targets) of every document piece in packed batches, after checking the rows' structure."""
    names = ("tokens", "targets", "document_ids", "attention_mask")
    for tokens, targets, ids, mask in zip(*(rows(batches, name) for name in names), strict=True):
        num_real = (ids > 0).sum()
        np.testing.assert_array_equal(mask, np.arange(len(ids)) < num_real)
        np.testing.assert_array_equal(mask, ids > 0)
        assert not tokens[num_real:].any() and (targets[num_real:] == NO_TARGET).all()
        steps = np.diff(ids[:num_real], prepend=0)
        assert np.isin(steps, (0, 1)).all()
        for document in range(1, ids.max() + 1):
            yield tokens[ids == document].tolist(), targets[ids == document].tolist()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1), length=st.integers(2, 32), batch_size=st.integers(1, 5))
def test_packing_loses_no_token_and_no_target_crosses_documents(tmp_path_factory, lengths, length, batch_size):
    documents = [(np.arange(n) + 7 * i) % 256 for i, n in enumerate(lengths)]
    token_file = write_token_file(tmp_path_factory.mktemp("tokens"), documents)
    config = DataConfig(sequence_length=length, batch_size=batch_size, packing=True)
    batches = list(make_dataset(token_file, config, train=False))
    assert all(batch["tokens"].shape == (batch_size, length) for batch in batches)
    assert all(array.dtype == np.int32 for batch in batches for array in batch.values())
    expected = []
    for document in ([*document.tolist(), EOS] for document in documents):
        following = [*document[1:], NO_TARGET]
        expected += [(document[i : i + length], following[i : i + length]) for i in range(0, len(document), length)]
    assert sorted(packed_pieces(batches)) == sorted(expected)


def test_packed_evaluation_keeps_the_order_of_full_rows(tmp_path, rng):
    token_file = write_token_file(tmp_path, rng.integers(0, 256, (20, 7)))
    config = DataConfig(sequence_length=8, batch_size=4, packing=True)
    found = rows(make_dataset(token_file, config, train=False), "tokens")
    np.testing.assert_array_equal(found, token_file.tokens.reshape(20, 8))


def test_packed_training_shows_every_piece_once_an_epoch(token_file):
    config = DataConfig(sequence_length=16, batch_size=4, packing=True)
    expected = sorted(packed_pieces(make_dataset(token_file, config, train=False)))
    batches = list(islice(make_dataset(token_file, config, train=True), 64))  # four groups of PACKING_ROWS
    shown = list(packed_pieces(batches))
    counts = [shown.count(piece) for piece in expected]
    assert max(counts) - min(counts) <= 1 + max(expected.count(piece) for piece in expected)
    assert {tuple(piece[0]) for piece in shown} == {tuple(piece[0]) for piece in expected}
    assert rows(batches, "attention_mask").mean() > 0.9
    again = list(islice(make_dataset(token_file, config, train=True), 64))
    for name, array in batches[-1].items():
        np.testing.assert_array_equal(again[-1][name], array)


def make(kind, token_file, process_index=0, process_count=1, train=True):
    """A pipeline of each kind with 6 rows a batch over all processes."""
    processes = dict(process_index=process_index, process_count=process_count)
    if kind == "mqar":
        config = MQARConfig(sequence_length=16, num_pairs=2, vocab_size=64, num_examples=20)
        return make_mqar_dataset(config, 6, train=train, **processes)
    config = DataConfig(sequence_length=16, batch_size=6, packing=kind == "packing", seed=3)
    return make_dataset(token_file, config, train=train, **processes)


KINDS = ["windows", "packing", "mqar"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_processes_share_the_batches_of_one(kind, train, token_file):
    whole = list(islice(make(kind, token_file, train=train), 25))
    parts = [list(islice(make(kind, token_file, process, 3, train), 25)) for process in range(3)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == len(parts[2]) > 1
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_resume_is_exact(kind, train, token_file):
    iterator = iter(make(kind, token_file, train=train))
    states, batches = [json.dumps(iterator.get_state())], []
    for batch in islice(iterator, 25):  # several epochs of windows and several groups of packed rows
        batches.append(batch)
        states.append(json.dumps(iterator.get_state()))
    for step in range(0, len(states), 5):
        # On another number of processes: their state is the same, and together they go on with the same rows.
        for process_count in (1, 2):
            parts = []
            for process in range(process_count):
                resumed = iter(make(kind, token_file, process, process_count, train))
                resumed.set_state(json.loads(states[step]))
                parts.append(list(islice(resumed, len(batches) - step)))
            assert [len(part) for part in parts] == [len(batches) - step] * process_count
            for index, batch in enumerate(batches[step:]):
                for name, array in batch.items():
                    np.testing.assert_array_equal(np.concatenate([part[index][name] for part in parts]), array)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"process_count": 3}, "DataConfig.batch_size = 4 .* process_count = 3 must divide it"),
        ({}, {"process_count": 0}, "process_count = 0 .* at least 1"),
        ({}, {"process_count": 2, "process_index": 2}, r"process_index = 2 .* in \[0, 2\)"),
        ({"seed": 2**32}, {}, "DataConfig.seed = 4294967296 .* below"),
        ({"sequence_length": 200}, {}, r"train.tokens: tokens = \d+ .* 4 rows of 200 tokens takes at least 801"),
        ({"sequence_length": 200, "packing": True}, {}, "takes at least 801"),
    ],
)
def test_pipelines_refuse(token_file, config, options, message):
    config = DataConfig(**{"sequence_length": 8, "batch_size": 4} | config)
    with pytest.raises(ValueError, match=message):
        make_dataset(token_file, config, train=True, **options)


def test_evaluation_wants_one_target(tmp_path):
    with pytest.raises(ValueError, match="tokens = 1 .* one target takes at least 2"):
        make_dataset(write_token_file(tmp_path, [[]]), DataConfig(), train=False)


# MQAR


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 20), st.booleans(), st.booleans(), st.integers(0, 9))
def test_mqar_rows_are_zoologys(pairs, extra, odd, random, seed):
    length, vocabulary = 4 * pairs + 2 * extra, 64 + odd
    config = MQARConfig(vocabulary, length, pairs, random_non_queries=random, num_examples=5, seed=seed)
    batch = next(iter(make_mqar_dataset(config, 5, train=True)))
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < vocabulary // 2 <= values.min() and values.max() < vocabulary
        queries = np.flatnonzero(targets != NO_TARGET)
        assert (queries >= 2 * pairs).all() and (queries % 2 == 0).all()
        assert sorted(zip(tokens[queries], targets[queries], strict=True)) == sorted(zip(keys, values, strict=True))
        fillers = np.delete(tokens[2 * pairs :], queries - 2 * pairs)
        assert fillers.min(initial=0) >= 0 and fillers.max(initial=0) < (vocabulary if random else 1)


def test_mqar_gaps_follow_the_power_law():
    """Against numpy's weighted choice without replacement, which the definition uses."""
    config = MQARConfig(sequence_length=32, num_pairs=4, num_examples=4000)
    batch = next(iter(make_mqar_dataset(config, 4000, train=True)))
    found = (batch["targets"] != NO_TARGET).mean(axis=0)[8::2]
    weights = np.arange(1, 13) ** (config.power_a - 1)
    state = np.random.RandomState(0)
    draws = [state.choice(12, 4, replace=False, p=weights / weights.sum()) for _ in range(4000)]
    expected = np.bincount(np.concatenate(draws), minlength=12) / 4000
    assert np.abs(found - expected).max() < 0.04  # five standard deviations of the difference


def test_mqar_rows_depend_on_seed_and_index_only():
    config = MQARConfig(num_examples=10, sequence_length=16, num_pairs=2)
    by_four = rows(islice(make_mqar_dataset(config, 4, train=True), 5), "tokens")
    by_two = rows(islice(make_mqar_dataset(config, 2, train=True), 10), "tokens")
    np.testing.assert_array_equal(by_four, by_two)
    np.testing.assert_array_equal(by_four[:10], by_four[10:])
    other = rows(islice(make_mqar_dataset(dataclasses.replace(config, seed=1), 4, train=True), 5), "tokens")
    assert (by_four != other).any(axis=1).all()


def test_mqar_evaluation_counts_each_row_once():
    config = MQARConfig(num_examples=10, sequence_length=16, num_pairs=2)
    batches = list(make_mqar_dataset(config, 4, train=False))
    assert [(batch["targets"] != NO_TARGET).sum() for batch in batches] == [8, 8, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_examples": 0}, "MQARConfig.num_examples = 0 .* positive integer"),
        ({"num_pairs": 1.5}, "MQARConfig.num_pairs = 1.5 .* positive integer"),
        ({"sequence_length": 63}, "MQARConfig.sequence_length = 63 .* even"),
        ({"num_pairs": 17}, "MQARConfig.num_pairs = 17 .* sequence_length / 4 = 16"),
        ({"vocab_size": 9}, r"MQARConfig.vocab_size = 9 .* at least 2 \* \(num_pairs \+ 1\) = 10"),
        ({"power_a": 0.0}, "MQARConfig.power_a = 0.0 .* > 0"),
        ({"seed": -1}, "MQARConfig.seed = -1 .* >= 0"),
    ],
)
def test_mqar_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        MQARConfig(**fields)


def test_mqar_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size = 0 .* positive"):
        make_mqar_dataset(MQARConfig(), 0, train=True)
    with pytest.raises(ValueError, match="batch_size = 4 .* process_count = 3 must divide it"):
        make_mqar_dataset(MQARConfig(), 4, train=True, process_count=3)
