"""Grain pipelines: token files and on-the-fly recall tasks as endless or single passes of batches.

A batch is a dictionary of int32 arrays [B, T], B being this process's share of the batch:

    tokens          token ids; 0 where there is none
    targets         the id that follows each token; NO_TARGET where there is no loss
    document_ids    with packing: 1, 2, ... along a row; 0 on the padding at its end
    attention_mask  with packing, and in evaluation: 1 on tokens, 0 on padding

The batches of all processes, put together in process order, do not depend on the number of processes, and the state of
an iterator is the same on each: a run may be resumed on fewer or more. ``iter(dataset).get_state()`` is plain JSON, and
after ``set_state`` in a fresh iterator the stream goes on exactly. Rows are slices of a memory-mapped file or cheap to
draw, so one thread that works two batches ahead suffices; Grain's worker processes would copy every batch from process
to process, and forking one that has started JAX can hang.
"""

from dataclasses import dataclass

import grain
import numpy as np

from mom_jax.config import DataConfig, require
from mom_jax.token_files import TokenFile

NO_TARGET = -1
PACKING_ROWS = 64
"""Rows filled together when documents are packed: the more, the less padding (below 3 % on web-like lengths)."""
_PADDING = {"tokens": 0, "targets": NO_TARGET, "document_ids": 0, "attention_mask": 0}
_NOW = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def make_dataset(
    token_file: TokenFile, config: DataConfig, *, train: bool, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Batches of a token file, as the module's docstring describes them; call ``token_file.verify()`` first.

    For training the rows are shuffled by ``config.seed``, anew in every epoch, for ever. For evaluation they come once,
    in order, and the last batch is filled up with padding: each token is a target exactly once, but for the first token
    of the file or, with packing, of each document.

    Plain rows are windows of T + 1 tokens at stride T, across document borders; training leaves out the short last one.
    With ``config.packing`` whole documents (longer ones cut in pieces of T) fill the rows first-fit, and no target
    crosses a document border. Every process packs all the rows and keeps its own: about 2 million tokens a second.

    Raises ``ValueError`` if the processes cannot share the batch, or the file has less than one batch (in evaluation:
    less than one target).
    """
    share = _share(config.batch_size, "DataConfig.batch_size", process_index, process_count)
    require(config.seed < 1 << 32, "DataConfig.seed", config.seed, "it must be below 2**32")
    length, num_tokens = config.sequence_length, len(token_file.tokens)
    smallest = config.batch_size * length + 1 if train else 2
    need = f"a batch of {config.batch_size} rows of {length} tokens" if train else "one target"
    require(num_tokens >= smallest, f"{token_file.path}: tokens", num_tokens, f"{need} takes at least {smallest}")
    if config.packing:
        rows = grain.MapDataset.source(_Pieces(token_file, length))
    else:
        full, rest = divmod(num_tokens - 1, length)
        num_rows = full if train else _round_up(full + (rest > 0), config.batch_size)
        rows = grain.MapDataset.source(_Windows(token_file.tokens, length, num_rows, with_mask=not train))
    if train:
        rows = _for_ever(rows.seed(config.seed).shuffle())
    if config.packing:
        return _packed_batches(rows, config, share, process_index, shuffle=train)
    return _batches(rows, share, process_index, process_count)


def _share(batch_size: int, name: str, process_index: int, process_count: int) -> int:
    """Rows of a batch that fall to one process."""
    require(process_count >= 1, "process_count", process_count, "it must be at least 1")
    require(0 <= process_index < process_count, "process_index", process_index, f"it must be in [0, {process_count})")
    require(batch_size % process_count == 0, name, batch_size, f"process_count = {process_count} must divide it")
    return batch_size // process_count


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _row(tokens: np.ndarray, targets: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Tokens and targets as int32 [length], padded at the end."""
    row = {name: np.full(length, _PADDING[name], np.int32) for name in ("tokens", "targets")}
    row["tokens"][: len(tokens)] = tokens
    row["targets"][: len(targets)] = targets
    return row


class _Windows:
    """Row i holds tokens i*T to i*T + T of the stream; rows past its end hold padding."""

    def __init__(self, tokens: np.ndarray, row_tokens: int, num_rows: int, with_mask: bool):
        self._tokens, self._row_tokens, self._num_rows, self._with_mask = tokens, row_tokens, num_rows, with_mask

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._row_tokens
        window = self._tokens[start : start + self._row_tokens + 1]
        row = _row(window[:-1], window[1:], self._row_tokens)
        if self._with_mask:
            row["attention_mask"] = (np.arange(self._row_tokens) < len(window) - 1).astype(np.int32)
        return row


def _for_ever(rows: grain.MapDataset) -> grain.MapDataset:
    """As far as anyone will see: of endless rows Grain cannot count batches of one."""
    return rows.repeat(2**62 // len(rows))


def _batches(rows: grain.MapDataset, share: int, process_index: int, process_count: int) -> grain.IterDataset:
    """Every ``process_count``-th run of ``share`` rows, which only this process reads."""
    return rows.batch(share)[process_index::process_count].to_iter_dataset(_AHEAD)


class _Pieces:
    """Documents cut in pieces of at most T tokens, all the pieces of the first document first."""

    def __init__(self, token_file: TokenFile, row_tokens: int):
        self._tokens, self._offsets, self._row_tokens = token_file.tokens, token_file.document_offsets, row_tokens
        pieces = -(-np.diff(self._offsets) // row_tokens)
        self._first_piece = np.concatenate([[0], np.cumsum(pieces)])

    def __len__(self) -> int:
        return int(self._first_piece[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document = np.searchsorted(self._first_piece, index, side="right") - 1
        start = self._offsets[document] + (index - self._first_piece[document]) * self._row_tokens
        end = self._offsets[document + 1]
        tokens = self._tokens[start : min(start + self._row_tokens, end)]
        return _row(tokens, self._tokens[start + 1 : min(start + 1 + len(tokens), end)], len(tokens))


def _packed_batches(
    pieces: grain.MapDataset, config: DataConfig, share: int, process_index: int, *, shuffle: bool
) -> grain.IterDataset:
    def name_columns(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = row["tokens_segment_ids"]
        mask = (ids > 0).astype(np.int32)
        return {"tokens": row["tokens"], "targets": row["targets"], "document_ids": ids, "attention_mask": mask}

    def stack_own_rows(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Of the whole batch (short at the end of an evaluation) the rows of this process."""
        batch = {}
        for name, padding in _PADDING.items():
            batch[name] = np.full((share, config.sequence_length), padding, np.int32)
            for place, row in enumerate(rows[process_index * share : (process_index + 1) * share]):
                batch[name][place] = row[name]
        return batch

    rows = grain.experimental.FirstFitPackIterDataset(
        pieces.to_iter_dataset(_NOW),
        length_struct={"tokens": config.sequence_length, "targets": config.sequence_length},
        padding_struct={"tokens": _PADDING["tokens"], "targets": _PADDING["targets"]},
        num_packing_bins=PACKING_ROWS,
        shuffle_bins=shuffle,
        seed=config.seed,
    )
    batches = rows.map(name_columns).batch(config.batch_size, batch_fn=stack_own_rows)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


@dataclass(frozen=True)
class MQARConfig:
    """Multi-query associative recall as Zoology defines it (arXiv 2312.04927; HazyResearch/zoology, multiquery_ar.py).

    A row is K key-value pairs, then queries: each key comes back once, and the target there is its value, which is not
    shown. Keys are from [1, V // 2), values from [V // 2, V).
    """

    vocab_size: int = 8192
    """V, token ids."""
    sequence_length: int = 64
    """T, tokens in a row: even, at least 4 K."""
    num_pairs: int = 4
    """K, key-value pairs, and queries, in a row."""
    power_a: float = 0.01
    """Exponent a of the gaps: a key is asked at token 2K + 2(i - 1), where i = 1, 2, ... has a chance ~ i^(a - 1)."""
    random_non_queries: bool = True
    """Whether tokens that are neither context nor query are random ids (True) or 0."""
    num_examples: int = 100_000
    """Rows; training repeats them in the same order."""
    seed: int = 0
    """Row i is a function of the seed and i only."""

    def __post_init__(self):
        for name in ("vocab_size", "sequence_length", "num_pairs", "num_examples"):
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            require(is_integer and value > 0, f"MQARConfig.{name}", value, "it must be a positive integer")
        pairs, length = self.num_pairs, self.sequence_length
        require(length % 2 == 0, "MQARConfig.sequence_length", length, "it must be even")
        require(4 * pairs <= length, "MQARConfig.num_pairs", pairs, f"it must be <= sequence_length / 4 = {length / 4}")
        require(
            pairs < self.vocab_size // 2,
            "MQARConfig.vocab_size", self.vocab_size, f"it must be at least 2 * (num_pairs + 1) = {2 * (pairs + 1)}",
        )  # fmt: skip
        require(0 < self.power_a < float("inf"), "MQARConfig.power_a", self.power_a, "it must be a number > 0")
        require(self.seed >= 0, "MQARConfig.seed", self.seed, "it must be >= 0")


def make_mqar_dataset(
    config: MQARConfig, batch_size: int, *, train: bool, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Batches of MQAR rows in order: for ever for training, once for evaluation, the last batch filled up with padding.

    Raises ``ValueError`` if the batch cannot be split over the processes.
    """
    require(batch_size >= 1, "batch_size", batch_size, "it must be positive")
    share = _share(batch_size, "batch_size", process_index, process_count)
    rows = grain.MapDataset.source(
        _MQARRows(config, config.num_examples if train else _round_up(config.num_examples, batch_size))
    )
    return _batches(_for_ever(rows) if train else rows, share, process_index, process_count)


class _MQARRows:
    """Row i of a task; rows from ``num_examples`` on hold padding."""

    def __init__(self, config: MQARConfig, num_rows: int):
        self._config, self._num_rows = config, num_rows
        num_gaps = (config.sequence_length - 2 * config.num_pairs) // 2
        self._log_weights = (config.power_a - 1) * np.log(np.arange(1, num_gaps + 1))

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        config, pairs = self._config, self._config.num_pairs
        tokens = np.zeros(config.sequence_length, np.int32)
        targets = np.full(config.sequence_length, NO_TARGET, np.int32)
        if index >= config.num_examples:
            return {"tokens": tokens, "targets": targets}
        rng = np.random.default_rng([config.seed, index])
        first_value = config.vocab_size // 2
        keys = 1 + rng.choice(first_value - 1, pairs, replace=False)
        values = first_value + rng.choice(config.vocab_size - first_value, pairs, replace=False)
        # The K largest log-weights under Gumbel noise are K weighted draws without replacement (arXiv 1903.06059).
        gaps = np.argsort(-self._log_weights - rng.gumbel(size=len(self._log_weights)))[:pairs]
        queries = 2 * pairs + 2 * gaps
        tokens[0 : 2 * pairs : 2] = tokens[queries] = keys
        tokens[1 : 2 * pairs : 2] = targets[queries] = values
        if config.random_non_queries:
            random_tokens = rng.integers(config.vocab_size, size=config.sequence_length, dtype=np.int32)
            tokens = np.where(tokens == 0, random_tokens, tokens)
        return {"tokens": tokens, "targets": targets}
