"""Documents out of files: plain text, JSON lines, Parquet, HTML and reStructuredText, compressed or not.

The format follows from the name: .gz and .dz (dictzip) are gzip, .zst is Zstandard; beneath them .jsonl, .parquet,
.html, .htm, .xhtml and .rst are what they say, and everything else is text. HTML and reStructuredText are reduced to
their text; what only Sphinx understands of the latter is lost.
"""

import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

Document = tuple[str, str]
"""Where a document comes from, for messages, and its text."""


def read_documents(path: Path, encoding: str, field: str, progress: Callable[[int], None]) -> Iterator[Document]:
    """Yield the documents of a file: one a line of JSON lines, one a row of Parquet, else the whole file.

    ``encoding`` is that of text; ``field`` is the JSON key or Parquet column that holds the text; ``progress`` is told
    how many bytes of the file have been read. Line ends become "\\n" and a byte-order mark goes.

    Raises ``ValueError`` naming the file and the byte, line or row that cannot be read, and ``ModuleNotFoundError``
    naming what to install for the format.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    compression = suffixes.pop() if suffixes[-1] in _DECOMPRESSORS else ""
    reader = _READERS.get(suffixes[-1] if suffixes else "", _read_text)
    with open(path, "rb") as raw:
        data = _DECOMPRESSORS[compression](raw) if compression else raw
        try:
            for document in reader(path, data, encoding, field):
                yield document
                progress(raw.tell())
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is broken or not what its name says: {error}") from error


def _optional(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{purpose} needs {module}: pip install 'mom_jax[text]'") from error


def _open_zstandard(raw: BinaryIO) -> BinaryIO:
    # Not the package zstandard, whose reader takes a truncated file for a whole one.
    return io.BufferedReader(_optional("pyarrow", "reading .zst").CompressedInputStream(raw, "zstd"))


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not {encoding} ({error.reason}); leave the file out or give its --encoding"
        ) from error
    except LookupError as error:
        raise ValueError(f"{path} says that its encoding is {encoding!r}, which Python does not know") from error
    if "\0" in text:
        raise ValueError(f"{path}: character {text.index(chr(0))} is NUL, so this is no text in {encoding}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_text(path: Path, data: BinaryIO, encoding: str, field: str) -> Iterator[Document]:
    yield str(path), _decode(path, data.read(), encoding)


def _read_html(path: Path, data: BinaryIO, encoding: str, field: str) -> Iterator[Document]:
    bs4 = _optional("bs4", "reading HTML")
    html = data.read()
    declared = bs4.dammit.EncodingDetector.find_declared_encoding(html, is_html=True)
    page = bs4.BeautifulSoup(_decode(path, html, declared or encoding), "html.parser")
    for element in page(["script", "style", "nav", "template"]):
        element.decompose()
    for element in page(_HTML_BLOCKS):
        element.append("\n")
    lines = (line.rstrip() for line in (page.body or page).get_text().split("\n"))
    yield str(path), re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _read_rst(path: Path, data: BinaryIO, encoding: str, field: str) -> Iterator[Document]:
    core, nodes = _optional("docutils.core", "reading .rst"), _optional("docutils.nodes", "reading .rst")
    # A document must neither read other files nor stop at what docutils does not know.
    settings = {"file_insertion_enabled": False, "raw_enabled": False, "report_level": 5, "halt_level": 5}
    tree = core.publish_doctree(_decode(path, data.read(), encoding), settings_overrides=settings)
    for message in list(tree.findall(nodes.system_message)):
        message.parent.remove(message)
    yield str(path), tree.astext() + "\n"


def _read_json_lines(path: Path, data: BinaryIO, encoding: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(data, start=1):
        place = f"{path}, line {number}"
        try:
            values = json.loads(line.decode())
        except ValueError as error:
            raise ValueError(f"{place}: not JSON in UTF-8: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get(field), str):
            raise ValueError(f"{place}: {field!r} is not a string in {line[:60]!r}; --field names the key of the text")
        yield place, values[field]


def _read_parquet(path: Path, data: BinaryIO, encoding: str, field: str) -> Iterator[Document]:
    parquet = _optional("pyarrow.parquet", "reading .parquet")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error
    if field not in file.schema_arrow.names:
        raise ValueError(f"{path}: no column {field!r}; --field names one of {file.schema_arrow.names}")
    row = 0
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {row}: {field!r} is not a string: {text!r}")
            yield f"{path}, row {row}", text
            row += 1


_HTML_BLOCKS = (
    "address article blockquote br caption dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header li ol p pre "
    "section table tr ul"
).split()
_DECOMPRESSORS = {".gz": gzip.open, ".dz": gzip.open, ".zst": _open_zstandard}
_READERS = {
    ".html": _read_html,
    ".htm": _read_html,
    ".xhtml": _read_html,
    ".rst": _read_rst,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
