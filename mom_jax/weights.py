"""A model's arrays by name, read one at a time, so that what copies them between files need not hold them all.

Names are dotted paths: ``params.embedding``, ``params.runs.run_0.mixer.rule.w_k``, and for what is not trained
``variables.runs.run_0.mixer.router.bias``. Layers of a run are stacked: the first axis of ``runs.run_0`` counts them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from mom_jax.config import ModelConfig
from mom_jax.model import MoMLanguageModel, bind, model_structure, split_params
from mom_jax.sharding import parameter_specs, require_fits, shardings, use_mesh

Part = tuple[tuple[int, ...], jax.Array | np.ndarray]


class Weights(NamedTuple):
    """Attributes:
    config: the model's.
    shapes: shape and type of every array, as it is stored; in the order of the model's tree.
    parts: from a name to pieces of the array with the indices (of its leading axes) where they belong. What no piece covers
      is zero. Each piece is read when it is asked for.
    """

    config: ModelConfig
    shapes: dict[str, jax.ShapeDtypeStruct]
    parts: Callable[[str], Iterable[Part]]

    def read(self, name: str) -> jax.Array | np.ndarray:
        """One whole array, of its stored type."""
        whole = np.zeros(self.shapes[name].shape, self.shapes[name].dtype)
        for index, part in self.parts(name):
            if index == ():
                return part
            whole[index] = part
        return whole


def weights_of(model: MoMLanguageModel) -> Weights:
    """Those of a model in memory."""
    arrays = by_name(dict(zip(("params", "variables"), split_params(model), strict=True)))
    return Weights(model.config, arrays, lambda name: [((), arrays[name])])


def with_config(weights: Weights, source: Any, **overrides: Any) -> Weights:
    """The weights with other values of some fields of their config, which must still fit them."""
    config = dataclasses.replace(weights.config, **overrides)
    require_shapes(source, weights.shapes, config)
    return weights._replace(config=config)


def to_model(weights: Weights, mesh: Mesh | None = None) -> MoMLanguageModel:
    """The model with these weights, float32. Beside it only one piece at a time is in memory.

    Args:
      mesh: every array is born split over it, no device ever having more than its part; it is read whole by every process,
        one array at a time. Raises ``ValueError`` if the mesh does not fit the model.
    """
    if mesh is None or mesh.size == 1:
        arrays = {name: _on_device(x.shape, weights.parts(name)) for name, x in weights.shapes.items()}
    else:
        require_fits(mesh.shape, weights.config)
        with use_mesh(mesh):
            places = by_name(shardings(mesh, parameter_specs(to_tree(weights.shapes))))
        arrays = {name: _over_mesh(weights.read(name), place) for name, place in places.items()}
    tree = to_tree(arrays)
    return bind(weights.config, tree["params"], tree.get("variables", {}))


def _over_mesh(whole: np.ndarray | jax.Array, place: NamedSharding) -> jax.Array:
    # Copies: on a CPU a view would keep the whole array in memory.
    return jax.make_array_from_callback(whole.shape, place, lambda index: np.array(whole[index], np.float32))


def _on_device(shape: tuple[int, ...], parts: Iterable[Part]) -> jax.Array:
    whole = None
    for index, part in parts:
        part = part.astype(np.float32, copy=False)
        if index == ():
            return jnp.asarray(part)
        whole = _put(jnp.zeros(shape, jnp.float32) if whole is None else whole, part, index)
    return jnp.zeros(shape, jnp.float32) if whole is None else whole


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """``whole`` with ``part`` at ``index``, in place."""
    return lax.dynamic_update_slice(whole, part.reshape((1,) * len(index) + part.shape), (*index, *(0,) * part.ndim))


def shapes_of(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What the arrays of a model are."""
    params, variables = split_params(nnx.merge(*model_structure(config)))
    return by_name({"params": params, "variables": variables})


def require_shapes(source: Any, found: dict[str, jax.ShapeDtypeStruct], config: ModelConfig) -> None:
    """Raise ``ValueError`` listing the arrays of ``source`` that are not those of a model of ``config``."""
    wanted = {name: x.shape for name, x in shapes_of(config).items()}
    found = {name: tuple(x.shape) for name, x in found.items()}
    problems = [
        f"\n  {name}: {found.get(name, 'missing')}, the config wants {wanted.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if problems:
        raise ValueError(f"the arrays in {source} do not fit its config:" + "".join(problems))


def cut(sizes: dict[str, int], limit: float) -> list[list[str]]:
    """The names in order, in groups that add up to ``limit`` at most, or of one that is larger."""
    groups, room = [], 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def by_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by dotted path."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def to_tree(leaves: dict[str, Any]) -> dict[str, Any]:
    """The tree of dictionaries of which ``leaves`` are the leaves by dotted path."""
    tree = {}
    for name, leaf in leaves.items():
        *branches, last = name.split(".")
        place = tree
        for branch in branches:
            place = place.setdefault(branch, {})
        place[last] = leaf
    return tree
