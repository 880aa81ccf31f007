"""Weights from one kind of directory into another: training runs, inference checkpoints, Hugging Face models.

=====================  ===========================  =========
directory              described in                 direction
=====================  ===========================  =========
training run           runs.py                      from
inference checkpoint   inference_checkpoint.py      from, to
Hugging Face           hf.py, hf_config.py          from, to
=====================  ===========================  =========

What is written has a checksums.json with the SHA-256 of every file, which is verified when it is read, and appears under its
name only when all is there. No more of the model is held at once than the size of its largest array.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mom_jax.config import DTYPES, DataConfig, require
from mom_jax.files import new_directory, write_json
from mom_jax.hf import open_pretrained, prepare_tensors
from mom_jax.inference_checkpoint import is_inference_checkpoint, open_weights, write_weights
from mom_jax.model import MoMLanguageModel
from mom_jax.runs import CHECKPOINTS, DEFAULTS, DESCRIPTION, TOKENIZER, open_run
from mom_jax.token_files import TOKENIZER_FILE, HuggingFaceTokenizer, Tokenizer, load_tokenizer, read_tokenizer_file
from mom_jax.tokenizer_files import TOKENIZER_FILES, write_transformers_files
from mom_jax.weights import Weights, to_model, with_config

GENERATION_CONFIG = "generation_config.json"


class Source(NamedTuple):
    """An opened directory.

    Attributes:
      weights: not read yet.
      model_type: the official one.
      tokenizer: the directory of the tokenizer's files, which may have none.
      generation_config: path of the file, which need not exist.
      step, data: of a run, the checkpoint's step and what it was trained on; else None.
    """

    weights: Weights
    model_type: str
    tokenizer: Path
    generation_config: Path
    step: int | None = None
    data: DataConfig | None = None


class Loaded(NamedTuple):
    """Attributes:
    model: float32 parameters, whatever the files' type.
    tokenizer: None if the directory has none.
    """

    model: MoMLanguageModel
    tokenizer: Tokenizer | None


def load(directory: str | os.PathLike, *, best: bool = False, mesh: Mesh | None = None, **overrides: Any) -> Loaded:
    """The model and the tokenizer in a training run, an inference checkpoint or a Hugging Face directory.

    Args:
      best: of a run, the kept checkpoint with the lowest held-out loss instead of the newest whole one.
      mesh: splits every array, so that no device ever holds more than its part; the model is then used inside of
        ``use_mesh(mesh)``. Of several processes all make the same call. None: the model is on one device.
      overrides: fields of ModelConfig, such as ``dtype``.

    Raises:
      FileNotFoundError: the directory or a file in it is missing.
      ValueError: a file is damaged (of a run: in all checkpoints), a field or override is not allowed, ``best`` is given for
        what is no run, or the tokenizer or the mesh does not fit the model.
    """
    source = open_source(directory, best=best, **DEFAULTS | overrides)
    tokenizer = _tokenizer(source)
    return Loaded(to_model(source.weights, mesh), tokenizer)


def open_source(directory: str | os.PathLike, *, best: bool = False, **overrides: Any) -> Source:
    """What kind of directory it is, its files verified; arguments and errors as in ``load``."""
    directory = Path(directory)
    tokenizer, generation_config = directory / TOKENIZER, directory / GENERATION_CONFIG
    if (directory / CHECKPOINTS).is_dir():
        weights, step, data = open_run(directory, best)
        weights = with_config(weights, directory, **overrides)
        return Source(weights, "mom", tokenizer, generation_config, step, data)
    require(not best, "best", best, f"{directory} is no training run, which alone has checkpoints to choose from")
    if is_inference_checkpoint(directory):
        weights, model_type = open_weights(directory)
        return Source(with_config(weights, directory, **overrides), model_type, tokenizer, generation_config)
    weights, model_type = open_pretrained(directory, overrides.pop("dtype", None), **overrides)
    return Source(weights, model_type, directory, generation_config)


def to_inference_checkpoint(
    source: Source, directory: str | os.PathLike, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write an inference checkpoint.

    Args:
      dtype: of the parameters, "float32" or "bfloat16"; None: as they are.
      overwrite: whether an earlier export or import in ``directory`` may be replaced.

    Raises ``ValueError`` or ``FileExistsError``, before anything is written, if this is not allowed.
    """
    _require_dtype(dtype)
    with new_directory(Path(directory), overwrite=overwrite) as aside:
        write_weights(source.weights, aside, dtype, source.model_type)
        files = [file for name in (*TOKENIZER_FILES, DESCRIPTION) if (file := source.tokenizer / name).is_file()]
        if files:
            (aside / TOKENIZER).mkdir()
            for file in files:
                shutil.copyfile(file, aside / TOKENIZER / file.name)
        _write_generation_config(source, aside)


def to_hugging_face(
    source: Source,
    directory: str | os.PathLike,
    *,
    dtype: str | None = None,
    model_type: str | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write a directory that flash-linear-attention's MomForCausalLM or GatedDeltaNetForCausalLM loads.

    The tokenizer of a run becomes one that transformers reads (see tokenizer_files.py).

    Args:
      model_type: "mom" or "gated_deltanet"; None: the source's, "mom" for a run.
      dtype, overwrite: as in ``to_inference_checkpoint``. max_shard_bytes: as in ``save_pretrained``.

    Raises ``ValueError`` or ``FileExistsError``, before anything is written, if this is not allowed or the official layout
    cannot hold the model.
    """
    _require_dtype(dtype)
    write_tensors = prepare_tensors(source.weights, dtype, max_shard_bytes, model_type or source.model_type)
    with new_directory(Path(directory), overwrite=overwrite) as aside:
        write_tensors(aside)
        for file in (source.tokenizer / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, aside / file.name)
        if (source.tokenizer / DESCRIPTION).is_file():
            write_transformers_files(load_tokenizer(source.tokenizer), source.weights.config, aside)
        _write_generation_config(source, aside)


def _require_dtype(dtype: str | None) -> None:
    require(dtype in (None, *DTYPES), "dtype", dtype, f"choose one of {', '.join(map(repr, DTYPES))}, or None")


def _write_generation_config(source: Source, directory: Path) -> None:
    if source.generation_config.is_file():
        shutil.copyfile(source.generation_config, directory / GENERATION_CONFIG)
        return
    ids = {name: getattr(source.weights.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / GENERATION_CONFIG, {name: value for name, value in ids.items() if value is not None})


def _tokenizer(source: Source) -> Tokenizer | None:
    if (source.tokenizer / DESCRIPTION).is_file():
        return load_tokenizer(source.tokenizer)
    path, config = source.tokenizer / TOKENIZER_FILE, source.weights.config
    if not path.is_file():
        return None
    file, eos_id = read_tokenizer_file(path), config.eos_token_id
    require(eos_id is not None, "eos_token_id", eos_id, f"the config.json beside {path} must name it")
    # What the file itself puts before a text tells whether documents of this model begin so.
    begins = config.bos_token_id in file.encode("").ids
    tokenizer = HuggingFaceTokenizer(file, eos_id, config.bos_token_id if begins else None)
    needed = tokenizer.vocab_size
    require(needed <= config.vocab_size, "the model's vocab_size", config.vocab_size, f"{path} needs {needed}")
    return tokenizer
