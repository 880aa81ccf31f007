"""The device mesh and where every axis of every array lies on it.

Arrays are described by the letters of the glossary (README): ``"mdhk"`` is a stack of M matrices from D to H heads of K.
One table says which mesh axes split which letter; another gives the letters of every parameter by its leaf name. Modules
annotate activations with :func:`constrain`, which does nothing without a mesh; only the memories run under ``shard_map``.

Rows are split over ``data`` and ``fsdp``, the routed memories over ``memory``, their heads over ``tensor``; what is outside
of the memories over ``tensor`` and ``memory`` together, by heads or widths, so that no device does another's work.
Parameters lie split over ``fsdp`` along D and are gathered a layer at a time (:func:`gather_over_fsdp`). An axis that does
not divide a size leaves it whole. What JAX used to call pjit is ``jax.jit`` with these shardings.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mom_jax.config import MeshConfig, ModelConfig, require

ROWS, WIDTHS = ("data", "fsdp"), ("tensor", "memory")
MESH_AXES = {"b": ROWS, "m": ("memory",), "h": WIDTHS, "g": WIDTHS, "f": WIDTHS, "o": WIDTHS}
# Of parameters, whose capital letters are axes that every device has whole, since they are small.
PARAMETER_MESH_AXES = MESH_AXES | {"d": ("fsdp",)}

PARAMETER_AXES = {
    # embedding and head
    "embedding": "od", "head": "do",
    # blocks
    "mixer_norm": "D", "mlp_norm": "D", "final_norm": "D", "w_gate": "df", "w_up": "df", "w_down": "fd",
    # mixture of memories
    "router": "DM", "router_bias": "M", "w_q": "dhk", "w_k": "mdhk", "w_v": "mdhv", "w_a": "mdh", "w_b": "mdh",
    "shared_k": "dhk", "shared_v": "dhv", "shared_a": "dh", "shared_b": "dh", "a_log": "H", "dt_bias": "H",
    "conv_q": "wHk", "conv_k": "wHk", "conv_v": "wHv", "conv_q_bias": "Hk", "conv_k_bias": "Hk", "conv_v_bias": "Hv",
    "w_g": "dhv", "out_norm": "v", "w_o": "hvd",
    # softmax attention; g: key/value heads
    "attention_q": "dhk", "attention_k": "dgk", "attention_v": "dgk", "attention_o": "hkd",
}  # fmt: skip


def spec(letters: str, shape: tuple[int, ...] | None = None, axes: dict[str, tuple[str, ...]] = MESH_AXES) -> PartitionSpec:
    """The PartitionSpec of an array whose axes are ``letters``; a mesh axis that splits one does not split a later one.

    Args:
      shape: axes of sizes that the mesh in use does not divide stay whole; None: all are divided.
      axes: the mesh axes that split each letter.
    """
    sizes, used, entries = dict(jax.sharding.get_abstract_mesh().shape), set(), []
    for place, letter in enumerate(letters):
        names = tuple(name for name in axes.get(letter, ()) if name not in used)
        if shape is not None and shape[place] % math.prod(sizes.get(name, 1) for name in names):
            names = ()
        used.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def leaf_name(path: tuple) -> str:
    """The name of a parameter from its path in a tree."""
    return str(getattr(path[-1], "key", path[-1]))


def parameter_specs(tree: Any, axes: dict[str, tuple[str, ...]] = PARAMETER_MESH_AXES) -> Any:
    """PartitionSpecs for a tree whose leaves are parameters (or moments of them), on the mesh in use; without one as if it
    divided all sizes. Stacked layers have leading axes."""

    def one(path, x):
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        letters = next((PARAMETER_AXES[name] for name in reversed(names) if name in PARAMETER_AXES), None)
        if letters is None or len(x.shape) < len(letters):
            return PartitionSpec()  # step counters and the like
        layers = len(x.shape) - len(letters)
        return PartitionSpec(*(None,) * layers, *spec(letters, x.shape[layers:], axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def gather_over_fsdp(params: Any) -> Any:
    """Parameters of a layer as it is computed with them: whole along D, split as the activations are."""
    if not is_spread():
        return params
    return jax.tree.map(jax.lax.with_sharding_constraint, params, parameter_specs(params, MESH_AXES))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings on ``mesh`` for a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )  # fmt: skip


def make_mesh(
    config: MeshConfig, model: ModelConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh that ``config`` asks for, over the first of ``devices``; None: of those that there are.

    Raises:
      ValueError: the sizes do not fit the devices or the model; the message proposes sizes that do.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    needed, there = math.prod(sizes.values()), len(devices)
    rest = {name: min(size, there) for name, size in sizes.items() if name != "data"}
    if math.prod(rest.values()) > there:
        rest = {"fsdp": 1, "memory": min(config.memory, there), "tensor": 1}
    proposal = {"data": there // math.prod(rest.values())} | {name: size for name, size in rest.items() if size > 1}
    advice = " ".join(f"--mesh.{name} {size}" for name, size in proposal.items())
    require(needed <= there, "the number of mesh devices", needed, f"there are {there} devices; try {advice}")
    if model is not None:
        require(
            model.num_memories % config.memory == 0,
            "MeshConfig.memory", config.memory, f"it must divide num_memories = {model.num_memories}",
        )  # fmt: skip
        require(
            all(kind != "mom" for kind, _ in model.layer_runs) or model.num_heads % (config.memory * config.tensor) == 0,
            "MeshConfig.memory * MeshConfig.tensor", config.memory * config.tensor,
            f"it must divide num_heads = {model.num_heads}",
        )  # fmt: skip
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:needed]
    )  # fmt: skip


def use_mesh(mesh: Mesh | None):
    """Context in which :func:`constrain` refers to ``mesh``; None: no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def take_rows(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """table[tokens] [B, T, D] of a table [O, D], NaN beyond it; over a mesh every device looks among its own rows."""
    of_table = spec("od", table.shape)
    if not is_spread() or of_table[0] is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    axes, of_tokens, size = of_table[0], spec("bt", tokens.shape), len(table)

    def own(table, tokens):
        place = tokens - jax.lax.axis_index(axes) * len(table)
        is_own = (place >= 0) & (place < len(table))
        found = jnp.take(table, jnp.where(is_own, place, 0), axis=0).astype(dtype)
        found = jax.lax.psum(jnp.where(is_own[..., None], found, 0), axes)
        return jnp.where(((tokens >= 0) & (tokens < size))[..., None], found, jnp.nan)

    return jax.shard_map(own, in_specs=(of_table, of_tokens), out_specs=of_tokens)(table, tokens)


def is_spread() -> bool:
    """Whether a mesh of several devices is in use, outside of ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not mesh.are_all_axes_manual


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Annotates an activation whose axes are ``letters``; the identity where no mesh is in use, or inside ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape))
