"""Token files: text that is encoded once and memory-mapped ever after, and the tokenizers that encode it.

A prepared directory, as experiments/prepare_text.py writes it, holds for each of the splits ``train`` and ``valid``

    train.tokens      token ids of all documents, one after the other: raw little-endian uint16 or uint32
    train.documents   index of each document's first token: raw little-endian int64
    train.json        the Description: sizes, vocabulary, checksums, tokenizer, sources
    tokenizer.json    the Hugging Face tokenizer, unless the tokens are bytes
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers

from mom_jax.config import require
from mom_jax.files import replacing

FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_OFFSET_DTYPE = np.dtype("<i8")
_BLOCK = 1 << 22  # tokens checked at a time


@runtime_checkable
class Tokenizer(Protocol):
    """What the data path and generation ask of a tokenizer. Text goes in as it is: nothing is added or interpreted."""

    kind: str
    vocab_size: int
    """Ids run from 0 to vocab_size - 1."""
    bos_id: int | None
    """Id that begins a document, if any."""
    eos_id: int
    """Id that ends a document."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids int32 [number of tokens] of a text, without the ids that begin and end a document."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of several texts, in parallel where the tokenizer can."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; ids that begin or end a document or that it does not have give nothing."""


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255, and 256 that ends a document."""

    kind = "bytes"
    vocab_size = 257
    bos_id = None
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids if token < self.eos_id).decode(errors="replace")


class HuggingFaceTokenizer:
    """A ``tokenizers.Tokenizer``, which this class takes over (it switches off truncation, padding and special tokens).

    A special token's name inside a text is encoded as the ordinary text it is, so no text can end a document.
    """

    kind = "huggingface"

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_id: int, bos_id: int | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        # Not the number of entries: ids may have gaps.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = eos_id
        self.bos_id = bos_id

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids])


def read_tokenizer_file(path: str | Path) -> tokenizers.Tokenizer:
    """Read a Hugging Face ``tokenizer.json``; ``FileNotFoundError`` or ``ValueError`` naming it if it cannot be."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: a Hugging Face tokenizer.json is wanted")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a prepared directory; ``ValueError`` if its file is not the one that encoded the tokens."""
    description = Description.read(Path(directory) / "train.json")
    if description.tokenizer == ByteTokenizer.kind:
        return ByteTokenizer()
    path = Path(directory) / TOKENIZER_FILE
    tokenizer = read_tokenizer_file(path)
    _check_sha256(path, hashlib.sha256(path.read_bytes()).hexdigest(), description.tokenizer_sha256)
    return HuggingFaceTokenizer(tokenizer, description.eos_id, description.bos_id)


def require_same_tokenizer(path: Path, of_run: Path) -> None:
    """``ValueError`` if the description at ``path`` and the one that a run keeps, ``of_run``, name different tokenizers."""
    ours, theirs = Description.read(path), Description.read(of_run)
    right = of_run.with_name(TOKENIZER_FILE) if theirs.tokenizer == HuggingFaceTokenizer.kind else theirs.tokenizer
    for name in ("tokenizer", "tokenizer_sha256", "bos_id", "eos_id"):
        value, needed = getattr(ours, name), getattr(theirs, name)
        allowed = f"the run's tokens have {needed!r}; prepare the text with --tokenizer {right}"
        require(value == needed, f"{path}: {name}", value, allowed)


@dataclass(frozen=True)
class Description:
    """What the JSON file beside a token file says."""

    format_version: int
    dtype: str
    """Type of a stored token id: uint16 or uint32."""
    vocab_size: int
    """Token ids are below it."""
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text, for bits per byte."""
    tokens_sha256: str
    documents_sha256: str
    tokenizer: str
    """"bytes" or "huggingface"; the latter is the file tokenizer.json in the same directory."""
    tokenizer_sha256: str | None
    bos_id: int | None
    eos_id: int
    sources: list[dict[str, Any]]
    """Name and size in bytes of each file that the text came from."""

    @classmethod
    def read(cls, path: Path) -> "Description":
        """Read and check a description; ``FileNotFoundError`` or ``ValueError`` naming the file and the field."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {path.parent} is no directory that experiments/prepare_text.py prepared"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        names = {field.name for field in dataclasses.fields(cls)}
        version = values.get("format_version") if isinstance(values, dict) else None
        require(version == FORMAT_VERSION, f"{path}: format_version", version, f"this version reads {FORMAT_VERSION}")
        require(values.keys() == names, f"{path}: fields", sorted(values), f"they must be {sorted(names)}")
        description = cls(**values)
        require(description.dtype in _DTYPES, f"{path}: dtype", description.dtype, f"choose one of {list(_DTYPES)}")
        for name in ("num_tokens", "num_documents", "vocab_size"):
            value = values[name]
            require(isinstance(value, int) and value > 0, f"{path}: {name}", value, "it must be a positive integer")
        return description


class TokenFile:
    """A split of a prepared directory, opened by the path of its ``.tokens`` file and memory-mapped.

    Attributes: ``tokens`` uint16 or uint32 [num_tokens]; ``document_offsets`` int64 [num_documents + 1]: document d is
    tokens[document_offsets[d] : document_offsets[d + 1]]; ``description``; ``path``.

    Raises ``FileNotFoundError`` if a file is missing and ``ValueError`` if the files are not as described.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        require(self.path.suffix == ".tokens", "token file", str(path), "it must be a path ending in .tokens")
        self.description = Description.read(self.path.with_suffix(".json"))
        dtype = _DTYPES[self.description.dtype]
        self._documents_path = self.path.with_suffix(".documents")
        _check_size(self.path, self.description.num_tokens * dtype.itemsize)
        _check_size(self._documents_path, self.description.num_documents * _OFFSET_DTYPE.itemsize)
        self.tokens = np.memmap(self.path, dtype, mode="r")
        starts = np.fromfile(self._documents_path, _OFFSET_DTYPE)
        self.document_offsets = np.append(starts, self.description.num_tokens)

    def verify(self) -> None:
        """Read everything once; ``ValueError`` at the first id outside the vocabulary or a checksum that differs."""
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), _BLOCK):
            block = self.tokens[start : start + _BLOCK]
            digest.update(block)
            outside = block >= self.description.vocab_size
            if outside.any():
                place = int(outside.argmax())
                raise ValueError(
                    f"{self.path}: token {start + place} (byte {(start + place) * block.itemsize}) is {block[place]}, "
                    f"but ids must be below vocab_size = {self.description.vocab_size}"
                )
        _check_sha256(self.path, digest.hexdigest(), self.description.tokens_sha256)
        documents = hashlib.sha256(self._documents_path.read_bytes()).hexdigest()
        _check_sha256(self._documents_path, documents, self.description.documents_sha256)
        if self.document_offsets[0] != 0 or (np.diff(self.document_offsets) <= 0).any():
            raise ValueError(f"{self._documents_path}: document offsets must ascend from 0 to below num_tokens")


class TokenFileWriter:
    """Writes one split: ``path`` ends in .tokens. The description comes last, with ``finish``."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer):
        self._path = Path(path)
        self._tokenizer = tokenizer
        self._dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._tokens = _HashedFile(self._path)
        self._documents = _HashedFile(self._path.with_suffix(".documents"))
        self._begins_document = True
        self.num_tokens = self.num_documents = self.num_bytes = 0

    def add(self, ids: np.ndarray, num_bytes: int, *, ends_document: bool = True) -> None:
        """Append a document, or a piece of one: its ids as ``Tokenizer.encode`` gives them, and its UTF-8 bytes."""
        begin = end = []
        if self._begins_document:
            self._documents.write(np.array([self.num_tokens], _OFFSET_DTYPE).tobytes())
            self.num_documents += 1
            begin = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        if ends_document:
            end = [self._tokenizer.eos_id]
        self._begins_document = ends_document
        tokens = np.concatenate([begin, ids, end]).astype(_DTYPES[self._dtype])
        self._tokens.write(tokens.tobytes())
        self.num_tokens += len(tokens)
        self.num_bytes += num_bytes

    def finish(self, sources: list[dict[str, Any]]) -> Description:
        """Close the files and write the description."""
        tokenizer_file = self._path.with_name(TOKENIZER_FILE)
        is_file = self._tokenizer.kind == HuggingFaceTokenizer.kind
        description = Description(
            format_version=FORMAT_VERSION,
            dtype=self._dtype,
            vocab_size=self._tokenizer.vocab_size,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            tokens_sha256=self._tokens.finish(),
            documents_sha256=self._documents.finish(),
            tokenizer=self._tokenizer.kind,
            tokenizer_sha256=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() if is_file else None,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
            sources=sources,
        )
        text = _HashedFile(self._path.with_suffix(".json"))
        text.write(json.dumps(dataclasses.asdict(description), indent=1).encode())
        text.finish()
        return description


@contextlib.contextmanager
def new_prepared_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes its place when the block ends, and vanishes if it raises.

    Raises ``FileExistsError`` if ``path`` exists and is not a prepared directory, or is one and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists():
        if not (path / "train.json").is_file() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not a prepared directory: choose another output")
        if (path / "train.json").is_file() and not overwrite:
            raise FileExistsError(f"{path} is already prepared: choose another output, or --overwrite it")
    with replacing(path) as partial:
        yield partial


class _HashedFile:
    """A new file that is hashed while it is written."""

    def __init__(self, path: Path):
        self._file = open(path, "xb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def finish(self) -> str:
        """Close the file and return its SHA-256."""
        self._file.close()
        return self._digest.hexdigest()


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though its description does")
    require(path.stat().st_size == size, f"{path}: size", path.stat().st_size, f"its description says {size} bytes")


def _check_sha256(path: Path, found: str, expected: str | None) -> None:
    require(found == expected, f"{path}: sha256", found, f"the description says {expected}; prepare the text again")
