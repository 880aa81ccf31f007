"""Models in the official Hugging Face layout, flash-linear-attention's ``MomForCausalLM``, read and written.

    config.json                  see hf_config.py
    model.safetensors            all tensors; or model-00001-of-00003.safetensors and so on, with
    model.safetensors.index.json {"weight_map": {tensor: file}}

``TENSORS`` is the whole translation, in both directions.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mom_jax.config import DTYPES, ModelConfig, require
from mom_jax.hf_config import from_official, to_official
from mom_jax.model import MoMLanguageModel, Params, bind, model_structure, split_params

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD, SHARDS = "model-{:05}-of-{:05}.safetensors", "model-?????-of-?????.safetensors"
ASIDE = ".saving-"


# The shape in the file of an array of ours. But for the table, theirs is ours with axes grouped and reversed.
def _table(o: int, d: int) -> tuple[int, ...]:
    return o, d


def _vector(*width: int) -> tuple[int, ...]:
    return (prod(width),)


def _linear(d: int, *out: int) -> tuple[int, ...]:
    return prod(out), d


def _linear_from_heads(h: int, v: int, d: int) -> tuple[int, ...]:
    return d, h * v


def _convolution(w: int, h: int, k: int) -> tuple[int, ...]:
    return h * k, 1, w


# From our names, without the run, to the official ones, without "model.layers.N."; {} is a memory, an axis of ours.
TENSORS = {
    "embedding": ("model.embeddings.weight", _table),
    "final_norm": ("model.norm.weight", _vector),
    "head": ("lm_head.weight", _linear),
    "mixer_norm": ("attn_norm.weight", _vector),
    "mlp_norm": ("mlp_norm.weight", _vector),
    "mlp.w_gate": ("mlp.gate_proj.weight", _linear),
    "mlp.w_up": ("mlp.up_proj.weight", _linear),
    "mlp.w_down": ("mlp.down_proj.weight", _linear),
    "mixer.attention_q": ("attn.q_proj.weight", _linear),
    "mixer.attention_k": ("attn.k_proj.weight", _linear),
    "mixer.attention_v": ("attn.v_proj.weight", _linear),
    "mixer.attention_o": ("attn.o_proj.weight", _linear_from_heads),
    "mixer.router.router": ("attn.gate.weight", _linear),
    "mixer.rule.w_q": ("attn.q_proj.weight", _linear),
    "mixer.rule.w_k": ("attn.k_proj.{}.weight", _linear),
    "mixer.rule.w_v": ("attn.v_proj.{}.weight", _linear),
    "mixer.rule.w_a": ("attn.a_proj.{}.weight", _linear),
    "mixer.rule.w_b": ("attn.b_proj.{}.weight", _linear),
    "mixer.rule.shared_k": ("attn.shared_k.weight", _linear),
    "mixer.rule.shared_v": ("attn.shared_v.weight", _linear),
    "mixer.rule.shared_a": ("attn.shared_a.weight", _linear),
    "mixer.rule.shared_b": ("attn.shared_b.weight", _linear),
    "mixer.rule.a_log": ("attn.A_log", _vector),
    "mixer.rule.dt_bias": ("attn.dt_bias", _vector),
    "mixer.conv_q": ("attn.q_conv1d.weight", _convolution),
    "mixer.conv_k": ("attn.k_conv1d.weight", _convolution),
    "mixer.conv_v": ("attn.v_conv1d.weight", _convolution),
    "mixer.conv_q_bias": ("attn.q_conv1d.bias", _vector),
    "mixer.conv_k_bias": ("attn.k_conv1d.bias", _vector),
    "mixer.conv_v_bias": ("attn.v_conv1d.bias", _vector),
    "mixer.w_g": ("attn.g_proj.weight", _linear),
    "mixer.out_norm": ("attn.o_norm.weight", _vector),
    "mixer.w_o": ("attn.o_proj.weight", _linear_from_heads),
}


class Place(NamedTuple):
    """Where a tensor of the file is in our parameters.

    Attributes:
      leaf: number of the leaf in the tree.
      index: layer in the run and memory, as far as the leaf has these axes.
      shape: in the file.
      is_table: whether it is stored as we hold it, not reversed.
    """

    leaf: int
    index: tuple[int, ...]
    shape: tuple[int, ...]
    is_table: bool


def load_pretrained(directory: str | os.PathLike, dtype: str | None = None, **overrides: Any) -> MoMLanguageModel:
    """The model in ``directory``, its parameters float32 whatever the file's type (float32, bfloat16 or float16).

    Tensors are read one by one, so that memory holds the model and little more.

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
    directory = Path(directory)
    config = _read_config(directory, dtype, overrides)
    params, variables = split_params(nnx.merge(*model_structure(config)))
    places = _places(config, params)
    tensors = _open_tensors(directory)
    _check_tensors(directory, tensors, places)

    shapes, tree = jax.tree.flatten(params)
    leaves = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes]
    for name, (leaf, index, _, is_table) in places.items():
        tensor = tensors[name].get_tensor(name).astype(np.float32)
        part = tensor if is_table else tensor.T.reshape(shapes[leaf].shape[len(index) :])
        leaves[leaf] = _put(leaves[leaf], part, index)
    return bind(config, jax.tree.unflatten(tree, leaves), jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), variables))


def save_pretrained(
    model: MoMLanguageModel, directory: str | os.PathLike, *, dtype: str = "float32", max_shard_bytes: float = 5e9
) -> None:
    """Write ``model`` into ``directory``, made if it is not there, with all tensors of type ``dtype``.

    What the official configuration has no field for (``remat``, ``unroll``, ``implementation``, dropout, the router's
    z-loss) is not saved. The files are written aside and moved in together when all are whole, config.json last: an error
    before that leaves the directory as it was, and a model of which only some files were moved has no config.json and does
    not load.

    Args:
      dtype: "float32", to the bit, or "bfloat16".
      max_shard_bytes: size above which the tensors are spread over several files; one file at a time is held in memory.

    Raises:
      ValueError: an argument is not allowed, or the layout cannot hold a field of the model's config; nothing is written.
    """
    require(dtype in DTYPES, "dtype", dtype, f"choose one of {', '.join(map(repr, DTYPES))}")
    require(max_shard_bytes > 0, "max_shard_bytes", max_shard_bytes, "it must be > 0")
    config = to_official(model.config) | {"torch_dtype": dtype}
    params, _ = split_params(model)
    leaves, places = jax.tree.leaves(params), _places(model.config, params)
    sizes = {name: prod(place.shape) * jnp.dtype(dtype).itemsize for name, place in places.items()}
    groups = _cut(sizes, max_shard_bytes)
    files = [SHARD.format(i + 1, len(groups)) for i in range(len(groups))] if len(groups) > 1 else [WEIGHTS]
    shards = dict(zip(files, groups, strict=True))

    def tensor(place: Place) -> np.ndarray:
        part = np.asarray(leaves[place.leaf][place.index])
        part = part if place.is_table else part.reshape(place.shape[::-1]).T
        return np.ascontiguousarray(part, jnp.dtype(dtype))  # safetensors writes the buffer, whatever the strides

    with _replacing(Path(directory)) as aside:
        for file, names in shards.items():
            # transformers refuses files without a format.
            save_file({name: tensor(places[name]) for name in names}, aside / file, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            _write_json(aside / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        _write_json(aside / CONFIG, config)


def _places(config: ModelConfig, params: Params) -> dict[str, Place]:
    """Every tensor of the file; ``params`` may be abstract."""
    first_layers = [0, *accumulate(count for _, count in config.layer_runs)]
    places = {}
    for leaf, (path, array) in enumerate(jax.tree.leaves_with_path(params)):
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        run, name = re.fullmatch(r"(?:runs\.run_(\d+)\.)?(.+)", path).groups()
        official, layout = TENSORS[name]
        stacked = (run is not None) + ("{}" in official)
        shape = layout(*array.shape[stacked:])
        for index in np.ndindex(array.shape[:stacked]):
            prefix = f"model.layers.{first_layers[int(run)] + index[0]}." if run else ""
            places[prefix + official.format(*index[1:])] = Place(leaf, index, shape, layout is _table)
    return places


@partial(jax.jit, donate_argnums=0)
def _put(leaf: jax.Array, part: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """``leaf`` with ``part`` at ``index``, in place."""
    return lax.dynamic_update_slice(leaf, part.reshape((1,) * len(index) + part.shape), (*index, *(0,) * part.ndim))


def _cut(sizes: dict[str, int], limit: float) -> list[list[str]]:
    """The names in order, in groups that add up to ``limit`` at most, or of one that is larger."""
    groups, room = [], 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _read_config(directory: Path, dtype: str | None, overrides: dict[str, Any]) -> ModelConfig:
    path = directory / CONFIG
    if (directory / "checkpoints").is_dir():
        raise ValueError(f"{directory} is the directory of a training run: mom_jax.load_run reads it")
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; models are read from disk, never downloaded")
    if not path.exists() and any(directory.glob(f"{ASIDE}*")):
        raise FileNotFoundError(f"{path} is missing: a save was interrupted, whose other files are in {directory}/{ASIDE}*")
    official = _read_json(path)
    try:
        return from_official(official, dtype, overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _open_tensors(directory: Path) -> dict[str, Any]:
    """For every tensor the open file that holds it."""
    index = directory / INDEX
    if (directory / WEIGHTS).exists():
        weight_map = dict.fromkeys(_open(directory / WEIGHTS).keys(), WEIGHTS)
    elif index.exists():
        weight_map = _read_json(index).get("weight_map")
        require(isinstance(weight_map, dict), f"{index}: weight_map", weight_map, "it must be {tensor: file}")
    else:
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    handles = {file: _open(directory / file) for file in sorted(set(weight_map.values()))}
    held = {(name, file) for file, handle in handles.items() for name in handle.keys()}
    wrong = sorted({name for name, _ in held ^ weight_map.items()})
    require(not wrong, f"{index}: weight_map", wrong, "these tensors are not in the files that it says")
    return {name: handles[file] for name, file in weight_map.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _check_tensors(directory: Path, tensors: dict[str, Any], places: dict[str, Place]) -> None:
    """Raise ``ValueError`` listing every tensor that is missing, unexpected or of the wrong shape or type."""
    table, head = TENSORS["embedding"][0], TENSORS["head"][0]
    repeats_table = head not in places and head in tensors
    wanted = places | {head: places[table]} if repeats_table else places
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
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
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    except BaseException:
        shutil.rmtree(aside)
        raise
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    require(isinstance(values, dict), str(path), type(values).__name__, "it must hold a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
