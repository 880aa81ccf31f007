"""Models in the official Hugging Face layout, flash-linear-attention's, read and written.

    config.json                  see hf_config.py
    model.safetensors            all tensors (see hf_layout.py); or model-00001-of-00003.safetensors and so on, with
    model.safetensors.index.json {"weight_map": {tensor: file}}

A directory of an export (see interchange.py) has a checksums.json besides, which is verified.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mom_jax.config import DTYPES, require
from mom_jax.files import CHECKSUMS, fsync, read_json, verify_checksums, write_json
from mom_jax.hf_config import from_official, to_official
from mom_jax.hf_layout import TENSORS, Place, places
from mom_jax.model import MoMLanguageModel
from mom_jax.weights import Weights, cut, shapes_of, to_model, weights_of

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD, SHARDS = "model-{:05}-of-{:05}.safetensors", "model-?????-of-?????.safetensors"
ASIDE = ".saving-"
KINDS = (
    "a training run has checkpoints/, an inference checkpoint weights/ and config.json, a Hugging Face model config.json "
    "with a model_type and model.safetensors"
)
TYPES = {"float32": "F32", "bfloat16": "BF16"}  # safetensors' names


def load_pretrained(directory: str | os.PathLike, dtype: str | None = None, **overrides: Any) -> MoMLanguageModel:
    """The model in ``directory``, its parameters float32 whatever the file's type (float32, bfloat16 or float16).

    Both of flash-linear-attention's models are read: ``mom`` (MomForCausalLM), and ``gated_deltanet``
    (GatedDeltaNetForCausalLM) as a model of one memory whose router, which then decides nothing, is zero. Tensors are read
    one by one, so that memory holds the model and little more.

    Args:
      dtype: compute type, "float32" or "bfloat16"; None: what config.json says, else ModelConfig's default.
      overrides: fields of ModelConfig, for what the official configuration does not have (``implementation``, ``remat``,
        ``router_z_loss_scale``, ...). Its ``use_layer_wise_balance`` is taken at its word, as ``balance_loss_form``;
        flash-linear-attention ignores it and computes ``balance_loss_form="global"``.

    Raises:
      FileNotFoundError: there is no such directory, or it lacks a file.
      ValueError: the directory is a training run's, a file is damaged, a field of config.json is refused, or tensors are
        missing, unexpected or of the wrong shape or type: all are listed, before any is read.
    """
    return to_model(open_pretrained(directory, dtype, **overrides)[0])


def open_pretrained(directory: str | os.PathLike, dtype: str | None = None, **overrides: Any) -> tuple[Weights, str]:
    """The weights in ``directory``, not read yet, and the model type. Arguments and errors as in ``load_pretrained``.

    An array is bfloat16 if all its tensors are, float32 otherwise (which holds all values of float16).
    """
    directory = Path(directory)
    official = _read_config(directory)
    if (directory / CHECKSUMS).exists():
        verify_checksums(directory)
    try:
        config = from_official(official, dtype, overrides)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    model_type, shapes = official["model_type"], shapes_of(config)
    params = {name: x for name, x in shapes.items() if name.startswith("params.")}
    where = places(config, params, model_type)
    tensors, files = _open_tensors(directory)
    _check_tensors(directory, tensors, where, model_type)

    tensors_of, types = {name: [] for name in shapes}, {name: set() for name in shapes}
    for name, place in where.items():
        tensors_of[place.array].append(name)
        types[place.array].add(tensors[name].get_slice(name).get_dtype())
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if types[name] == {"BF16"} else jnp.float32)
        for name, x in shapes.items()
    }

    def parts(array: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for name in tensors_of[array]:
            # Opened anew for each: what was read of a file counts as memory for as long as it is open.
            tensor = _open(files[name]).get_tensor(name).astype(shapes[array].dtype)
            yield where[name].index, where[name].ours(tensor, shapes[array].shape)

    return Weights(config, shapes, parts), model_type


def save_pretrained(
    model: MoMLanguageModel,
    directory: str | os.PathLike,
    *,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    model_type: str = "mom",
) -> None:
    """Write ``model`` into ``directory``, made if it is not there, with all tensors of type ``dtype``.

    What the official configuration has no field for (``remat``, ``unroll``, ``implementation``, dropout, the router's
    z-loss) is not saved. The files are written aside and moved in together when all are whole, config.json last: an error
    before that leaves the directory as it was, and a model of which only some files were moved has no config.json and does
    not load. A checksums.json, which would no longer be true, is removed.

    Args:
      dtype: "float32", to the bit, or "bfloat16".
      max_shard_bytes: size above which the tensors are spread over several files.
      model_type: "mom", or "gated_deltanet" for a model of one memory, whose router, which decides nothing, is left out.

    Raises:
      ValueError: an argument is not allowed, or the layout cannot hold a field of the model's config; nothing is written.
    """
    require(dtype in DTYPES, "dtype", dtype, f"choose one of {', '.join(map(repr, DTYPES))}")
    write = prepare_tensors(weights_of(model), dtype, max_shard_bytes, model_type)
    with _replacing(Path(directory)) as aside:
        write(aside)


def prepare_tensors(weights: Weights, dtype: str | None, max_shard_bytes: float, model_type: str):
    """A function that writes config.json and the tensors into a directory, one array of ours in memory at a time.

    Args:
      dtype: of all tensors; None: each keeps the type that it has.

    Raises ``ValueError`` as ``save_pretrained`` does.
    """
    require(max_shard_bytes > 0, "max_shard_bytes", max_shard_bytes, "it must be > 0")
    table = weights.shapes["params.embedding"].dtype
    config = to_official(weights.config, model_type) | {"torch_dtype": dtype or jnp.dtype(table).name}
    arrays = {name: x for name, x in weights.shapes.items() if name.startswith("params.")}
    where = places(weights.config, arrays, model_type)
    types = {name: jnp.dtype(dtype or weights.shapes[place.array].dtype) for name, place in where.items()}
    sizes = {name: prod(place.shape) * types[name].itemsize for name, place in where.items()}
    groups = cut(sizes, max_shard_bytes)
    files = [SHARD.format(i + 1, len(groups)) for i in range(len(groups))] if len(groups) > 1 else [WEIGHTS]
    held = {}  # the array whose tensors are being written, and its name

    def tensor(name: str) -> np.ndarray:
        place = where[name]
        if place.array not in held:
            held.clear()
            held[place.array] = weights.read(place.array)
        return place.theirs(np.asarray(held[place.array][place.index]))

    def write(directory: Path) -> None:
        for file, names in zip(files, groups, strict=True):
            shapes = {name: jax.ShapeDtypeStruct(where[name].shape, types[name]) for name in names}
            write_safetensors(directory / file, shapes, tensor)
        held.clear()
        if len(files) > 1:
            weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
            write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        write_json(directory / CONFIG, config)

    return write


def write_safetensors(path: Path, shapes: dict[str, jax.ShapeDtypeStruct], tensor: Callable[[str], np.ndarray]) -> None:
    """Write a safetensors file of which only one tensor at a time is in memory.

    The format (github.com/huggingface/safetensors): the header's length, little-endian uint64; the header, JSON padded with
    spaces to a multiple of 8 bytes; the tensors' raw little-endian values without gaps.

    Args:
      shapes: shape and type (float32 or bfloat16) of every tensor; in the file those of the wider type come first, so that
        all are aligned.
      tensor: asked once for each, in the order in which they are written.
    """
    shapes = dict(sorted(shapes.items(), key=lambda item: -item[1].dtype.itemsize))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without a format
    for name, x in shapes.items():
        begin, end = end, end + prod(x.shape) * x.dtype.itemsize
        header[name] = {"dtype": TYPES[x.dtype.name], "shape": x.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in shapes.items():
            file.write(np.ascontiguousarray(tensor(name), x.dtype).view(np.uint8))  # no name may hold it: the next follows


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    for folder, kind in (("checkpoints", "a training run"), ("weights", "an inference checkpoint")):
        if (directory / folder).is_dir():
            raise ValueError(f"{directory} is the directory of {kind}: mom_jax.load reads it")
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; models are read from disk, never downloaded")
    if not path.exists() and any(directory.glob(f"{ASIDE}*")):
        raise FileNotFoundError(f"{path} is missing: a save was interrupted, whose other files are in {directory}/{ASIDE}*")
    config = read_json(path) if path.exists() else {}
    if not path.exists() or "model" in config:  # a table that only our own files have
        found = shorten(", ".join(sorted(file.name for file in directory.iterdir())), 200) or "nothing"
        raise FileNotFoundError(f"{directory} holds no model: it has {found}; {KINDS}")
    return config


def _open_tensors(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """For every tensor the file that holds it, opened, and its path."""
    index = directory / INDEX
    if (directory / WEIGHTS).exists():
        weight_map = dict.fromkeys(_open(directory / WEIGHTS).keys(), WEIGHTS)
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        require(isinstance(weight_map, dict), f"{index}: weight_map", weight_map, "it must be {tensor: file}")
    else:
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    handles = {file: _open(directory / file) for file in sorted(set(weight_map.values()))}
    held = {(name, file) for file, handle in handles.items() for name in handle.keys()}
    wrong = sorted({name for name, _ in held ^ weight_map.items()})
    require(not wrong, f"{index}: weight_map", wrong, "these tensors are not in the files that it says")
    paths = {name: directory / file for name, file in weight_map.items()}
    return {name: handles[file] for name, file in weight_map.items()}, paths


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _check_tensors(directory: Path, tensors: dict[str, Any], where: dict[str, Place], model_type: str) -> None:
    """Raise ``ValueError`` listing every tensor that is missing, unexpected or of the wrong shape or type."""
    table, head = TENSORS["embedding"][0], TENSORS["head"][0]
    repeats_table = head not in where and head in tensors
    wanted = where | {head: where[table]} if repeats_table else where
    found = tensors.keys()
    if model_type == "gated_deltanet":  # early versions had a D, as Mamba-2, which no code ever read
        found = {name for name in found if not name.endswith(".attn.D")}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - found)]
    problems += [f"unexpected: {name}" for name in sorted(found - wanted.keys())]
    for name in sorted(wanted.keys() & found):
        header = tensors[name].get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != wanted[name].shape:
            problems.append(f"wrong shape: {name} has {shape}, config wants {wanted[name].shape}")
        if dtype not in ("F32", "BF16", "F16"):
            problems.append(f"wrong type: {name} is {dtype}, not F32, BF16 or F16")
    if repeats_table and not problems:
        if tensors[head].get_tensor(head).tobytes() != tensors[table].get_tensor(table).tobytes():
            problems.append(f"tie_word_embeddings is true, but {head} differs from {table}")
    if problems:
        raise ValueError(f"the tensors in {directory} do not fit its {CONFIG}:" + "".join(f"\n  {p}" for p in problems))


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder whose files, written inside the context, take the place of the model in ``directory`` on leaving it."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=directory))
    try:
        yield aside
        for file in aside.iterdir():
            fsync(file)
    except BaseException:
        shutil.rmtree(aside)
        raise
    (directory / CHECKSUMS).unlink(missing_ok=True)
    config = directory / CONFIG
    if config.exists():  # from here to the last move there is none, so that old and new weights never load together
        config.rename(aside / f"{CONFIG}.old")
    new = {file.name for file in aside.glob("model*")}
    for name in new:
        (aside / name).replace(directory / name)
    for old in {directory / WEIGHTS, directory / INDEX, *directory.glob(SHARDS)}:
        if old.name not in new:
            old.unlink(missing_ok=True)
    (aside / CONFIG).replace(config)
    for leftover in directory.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover)
