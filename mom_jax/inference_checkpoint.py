"""Inference checkpoints: a model's parameters and router biases in Orbax, without what only training needs.

    DIRECTORY/config.json             {"format": ..., "version": 1, "model_type": ..., "model": {ModelConfig's fields}}
    DIRECTORY/weights/state/          {"params": ..., "variables": ...} as Orbax writes a PyTree: as in a run's checkpoints
    DIRECTORY/tokenizer/              if there is one: a run's (see runs.py) or a Hugging Face model's
    DIRECTORY/generation_config.json  transformers': at least the ids that begin and end a text
    DIRECTORY/checksums.json          SHA-256 of every file

Parameters are float32 or bfloat16. Router biases (``variables``; only with ``router_bias_rate``) are always float32, because
their steps of 0.001 would be lost in bfloat16. Layers are stacked, as in the model; no more than the largest array is held.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.experimental import v1 as orbax_v1

from mom_jax.config import ModelConfig, require
from mom_jax.config_io import from_dict, to_dict
from mom_jax.files import read_json, verify_checksums, write_json
from mom_jax.weights import Part, Weights, by_name, cut, require_shapes, to_tree

CONFIG, WEIGHTS, STATE = "config.json", "weights", "state"
FORMAT, VERSION = "mom_jax inference checkpoint", 1


def is_inference_checkpoint(directory: Path) -> bool:
    return (directory / WEIGHTS).is_dir()


def write_weights(weights: Weights, directory: Path, dtype: str | None, model_type: str) -> None:
    """Write config.json and weights/ into ``directory``.

    Args:
      dtype: of the parameters; None: each keeps the type that it has.
      model_type: the official one, for a later export.
    """

    def array(name: str) -> np.ndarray:
        kept = weights.shapes[name].dtype if dtype is None or name.startswith("variables.") else jnp.dtype(dtype)
        return np.asarray(weights.read(name)).astype(kept, copy=False)

    # Every call of Orbax costs a tenth of a second, so small arrays go together, up to the size of the largest.
    sizes = {name: x.size * x.dtype.itemsize for name, x in weights.shapes.items()}
    path = (directory / WEIGHTS).absolute()  # Orbax takes no others
    for names in cut(sizes, max(sizes.values())):
        orbax_v1.partial.save(path, to_tree({name: array(name) for name in names}))
    orbax_v1.partial.finalize(path)
    values = {"format": FORMAT, "version": VERSION, "model_type": model_type, "model": to_dict(weights.config)}
    write_json(directory / CONFIG, values)


def open_weights(directory: Path) -> tuple[Weights, str]:
    """The weights in an inference checkpoint, all files verified, but not read into memory yet; and the model type.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the file that is missing or damaged.
    """
    verify_checksums(directory)
    values = read_json(directory / CONFIG)
    for name, only in (("format", FORMAT), ("version", VERSION)):
        require(values.get(name) == only, f"{directory / CONFIG}: {name}", values.get(name), f"only {only!r} is read")
    config = from_dict(ModelConfig, values["model"])
    return open_state(directory / WEIGHTS / STATE, config), values["model_type"]


def open_state(path: Path, config: ModelConfig) -> Weights:
    """The ``params`` and ``variables`` in a PyTree that Orbax wrote, one array read at a time.

    Raises ``ValueError`` listing every array that is not one of a model of ``config``.
    """
    handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(path).absolute()
    tree = handler.metadata(path).tree
    stored = by_name({part: tree[part] for part in ("params", "variables") if part in tree})
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in stored.items()}
    require_shapes(path, shapes, config)

    def parts(name: str) -> Iterator[Part]:
        item = to_tree({name: shapes[name]})
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        (array,) = jax.tree.leaves(handler.restore(path, args=args))
        yield (), array

    return Weights(config, shapes, parts)
