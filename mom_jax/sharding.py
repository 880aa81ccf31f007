"""The device mesh and where every axis of every array lies on it.

Arrays are described by the letters of the glossary (README): ``"mdhk"`` is a stack of M matrices from D to H heads of K.
One table says which mesh axis splits which letter; another gives the letters of every parameter by its leaf name. Nothing
else in the package mentions a mesh: modules annotate activations with :func:`constrain`, which does nothing without one.

``data`` splits the rows of a batch, ``memory`` the routed memories. What JAX used to call pjit is ``jax.jit`` with these
shardings.
"""

import contextlib
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mom_jax.config import MeshConfig, ModelConfig, require

MESH_AXIS = {"b": "data", "m": "memory"}

PARAMETER_AXES = {
    # embedding and head
    "embedding": "od", "head": "do",
    # blocks
    "mixer_norm": "d", "mlp_norm": "d", "final_norm": "d", "w_gate": "df", "w_up": "df", "w_down": "fd",
    # mixture of memories
    "router": "dm", "router_bias": "m", "w_q": "dhk", "w_k": "mdhk", "w_v": "mdhv", "w_a": "mdh", "w_b": "mdh",
    "shared_k": "dhk", "shared_v": "dhv", "shared_a": "dh", "shared_b": "dh", "a_log": "h", "dt_bias": "h",
    "conv_q": "whk", "conv_k": "whk", "conv_v": "whv", "conv_q_bias": "hk", "conv_k_bias": "hk", "conv_v_bias": "hv",
    "w_g": "dhv", "out_norm": "v", "w_o": "hvd",
    # softmax attention; g: key/value heads
    "attention_q": "dhk", "attention_k": "dgk", "attention_v": "dgk", "attention_o": "hkd",
}  # fmt: skip


def spec(letters: str) -> PartitionSpec:
    """The PartitionSpec of an array whose axes are ``letters``."""
    return PartitionSpec(*(MESH_AXIS.get(letter) for letter in letters))


def leaf_name(path: tuple) -> str:
    """The name of a parameter from its path in a tree."""
    return str(getattr(path[-1], "key", path[-1]))


def parameter_specs(tree: Any) -> Any:
    """PartitionSpecs for a tree whose leaves are parameters (or moments of them); stacked layers have leading axes."""

    def one(path, x):
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        letters = next((PARAMETER_AXES[name] for name in reversed(names) if name in PARAMETER_AXES), None)
        if letters is None or len(x.shape) < len(letters):
            return PartitionSpec()  # step counters and the like
        return PartitionSpec(*(None,) * (len(x.shape) - len(letters)), *spec(letters))

    return jax.tree_util.tree_map_with_path(one, tree)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings on ``mesh`` for a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )  # fmt: skip


def make_mesh(config: MeshConfig, model: ModelConfig | None = None) -> Mesh:
    """The mesh that ``config`` asks for, over the first devices.

    Raises:
      ValueError: the sizes do not fit the devices or the model; the message proposes sizes that do.
    """
    sizes = {"data": config.data, "memory": config.memory}
    needed, there = math.prod(sizes.values()), jax.device_count()
    advice = f"--mesh.data {max(1, there // config.memory)} --mesh.memory {min(config.memory, there)}"
    require(needed <= there, "the number of mesh devices", needed, f"there are {there} devices; try {advice}")
    if model is not None:
        require(
            model.num_memories % config.memory == 0,
            "MeshConfig.memory", config.memory, f"it must divide num_memories = {model.num_memories}",
        )  # fmt: skip
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:needed]
    )  # fmt: skip


def use_mesh(mesh: Mesh | None):
    """Context in which :func:`constrain` refers to ``mesh``; None: no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Annotates an activation whose axes are ``letters``; the identity where no mesh is in use."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))
