"""The device mesh and where every axis of every array lies on it.

Arrays are described by the letters of the glossary (README): ``"mdhk"`` is a stack of M matrices from D to H heads of K.
One table says which mesh axes split which letter; another gives the letters of every parameter by its leaf name.

Rows are split over ``data`` and ``fsdp``, their tokens over ``sequence``, the routed memories over ``memory``, their heads
over ``tensor``; what is outside of the memories over ``tensor`` and ``memory`` together, so that no device does another's
work: products by heads or widths, what is between them (norms, residuals) by rows, or by tokens where rows are few. Products
gather these tokens, and their partial results are summed and scattered again. Or they keep them and gather their weights, if
that exchanges less: mostly, for the MLP and, over ``memory``, for all of a mixer but its routed memories. An axis that does
not divide a size leaves it whole. What JAX used to call pjit is ``jax.jit`` with these shardings.

Whose job the collectives are: in training, what multiplies with a parameter that is split runs under ``shard_map`` and
names its own: the memories, :func:`products_over_mesh`, :func:`take_rows`, the cross-entropy. Parameters lie split over
``fsdp`` along D; :func:`gather_params` makes them whole where they are used, so that on every platform their gradients
are reduce-scattered over ``fsdp`` (over the widths, too, of what keeps its tokens) and then summed over ``data``, in the
dtype in which they were gathered. The rest is left to XLA's partitioner, annotated with :func:`constrain`: what has no
weights or small ones, which every device has whole and whose gradients it all-reduces; rows that the devices cannot share;
and the memories of a piece with a state.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mom_jax.config import DataConfig, MeshConfig, ModelConfig, require
from pallas_kernels.segments import SEGMENT_ALIGNMENT

ROWS, WIDTHS = ("data", "fsdp"), ("tensor", "memory")
# b and r are both rows, t and s tokens: r or s of what is between products (letters_of_tokens).
MESH_AXES = {
    "b": ROWS, "r": (*ROWS, *WIDTHS), "t": ("sequence",), "s": ("sequence", *WIDTHS), "m": ("memory",), "h": WIDTHS,
    "g": WIDTHS, "f": WIDTHS, "o": WIDTHS,
}  # fmt: skip
# Of parameters, whose capital letters are axes that are not split like activations: since they are small every device has
# them whole, but for the heads of the memories, of which it has those that it works with.
PARAMETER_MESH_AXES = MESH_AXES | {"d": ("fsdp",), "H": ("tensor",)}

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


# The name, for policies of jax.checkpoint, of activations that a collective gave. Gathered weights are not to be kept: they
# take the memory that fsdp is to save.
EXCHANGED = "exchanged_activations"


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


def gather_params(params: Any, specs: Any, axes: tuple[str, ...] = ("fsdp",)) -> Any:
    """Inside of ``shard_map``: parameters that came into it as ``specs`` say, whole over the mesh ``axes``."""

    def gather(x, of_x):
        for place in range(len(of_x)):
            names = tuple(name for name in mesh_axes(of_x[place : place + 1]) if name in axes)
            if math.prod(jax.lax.axis_size(name) for name in names) > 1:
                x = jax.lax.all_gather(x, names, axis=place, tiled=True)
        return x

    return jax.tree.map(gather, params, specs)


def gather_tokens(x: jax.Array, of_x: PartitionSpec) -> jax.Array:
    """Inside of ``shard_map``: x [B, T, ...], which came as ``of_x`` says, with the tokens of all that share widths."""
    for place in (0, 1):
        axes = tuple(axis for axis in mesh_axes(of_x[place : place + 1]) if axis in WIDTHS and jax.lax.axis_size(axis) > 1)
        if axes:
            return checkpoint_name(jax.lax.all_gather(x, axes, axis=place, tiled=True), EXCHANGED)
    return x


def scatter_tokens(x: jax.Array, axes: tuple[str, ...], of_sum: PartitionSpec) -> jax.Array:
    """Inside of ``shard_map``: the sum of x [B, T, ...] over mesh axes, of its tokens those that ``of_sum`` leaves here."""
    for place in (0, 1):
        if set(axes) <= set(mesh_axes(of_sum[place : place + 1])):
            return checkpoint_name(jax.lax.psum_scatter(x, axes, scatter_dimension=place, tiled=True), EXCHANGED)
    return checkpoint_name(jax.lax.psum(x, axes), EXCHANGED)


def products_over_mesh(
    multiply: Callable[[str, jax.Array, jax.Array], jax.Array], x: jax.Array, factors: list[tuple[str, jax.Array]]
) -> list[jax.Array]:
    """``multiply(equation, x, w)`` of each (equation, w), w a parameter, by every device with what it has of x and w.

    The equations' letters, alike in those of x, say where everything lies; what they contract is summed over the devices.
    Tokens of an x that w split over the widths are gathered from where :func:`spec_of_tokens` has them, those of a y summed
    over the widths scattered there. Where the equations call them "rt" or "bs", they stay there, and w is gathered.
    """
    letters = [re.split(",|->", equation) for equation, _ in factors]
    of_x, of_w, of_y = spec(letters[0][0], x.shape), [], []
    for (x_letters, w_letters, y_letters), (_, w) in zip(letters, factors, strict=True):
        sizes = dict(zip(x_letters + w_letters, x.shape + w.shape, strict=True))
        of_w.append(spec(w_letters, w.shape, PARAMETER_MESH_AXES))
        of_y.append(spec(y_letters, tuple(sizes[letter] for letter in y_letters)))
    axes_of_x, axes_of_y = mesh_axes(of_x), [mesh_axes(axes) for axes in of_y]
    is_shared = [any(axis in WIDTHS for axis in axes) for axes in axes_of_y]
    if len(set(is_shared)) == 2:  # heads that the devices cannot share: each has them of its own tokens
        parts = [[factor for factor, flag in zip(factors, is_shared, strict=True) if flag == part] for part in (False, True)]
        found = [iter(products_over_mesh(multiply, x, part)) for part in parts]
        return [next(found[flag]) for flag in is_shared]
    contracted = tuple(axis for axis in axes_of_x if axis not in axes_of_y[0])
    common = tuple(axis for axis in axes_of_y[0] if axis not in axes_of_x and all(axis in axes for axes in axes_of_y))
    gathers, scatters = (set(axes) == set(WIDTHS) for axes in (common, contracted))
    is_apart = not any(axis in WIDTHS for axes in (axes_of_x, *axes_of_y) for axis in axes)
    if gathers or is_apart:
        of_x = spec_of_tokens(x)
    if scatters or is_apart:
        of_y = [spec_of_tokens(x)] * len(of_y)
    whole = ("fsdp",) if letters[0][0].startswith("bt") else ("fsdp", *WIDTHS)

    def own(x, weights):
        # Cast once for all products, or each one's gradient of x would be summed over the devices by itself.
        x = jax.lax.pcast(x, tuple(axis for axis in common if axis not in mesh_axes(of_x)), to="varying")
        x = gather_tokens(x, of_x) if gathers else x
        weights = [_of_own_tokens(w, of_w, of_x) for w, of_w in zip(weights, of_w, strict=True)]
        weights = gather_params(weights, of_w, whole)
        products = [multiply(equation, x, w) for (equation, _), w in zip(factors, weights, strict=True)]
        return [scatter_tokens(y, contracted, of_y[0]) for y in products] if contracted else products

    return jax.shard_map(own, in_specs=(of_x, of_w), out_specs=of_y)(x, [w for _, w in factors])


def mesh_axes(of_x: PartitionSpec) -> list[str]:
    """The mesh axes that split an array."""
    return [axis for axes in of_x if axes for axis in ((axes,) if isinstance(axes, str) else axes)]


def _of_own_tokens(param: jax.Array, of_param: PartitionSpec, of_tokens: PartitionSpec) -> jax.Array:
    """A parameter cast to meet the device's tokens, before it is gathered: its gradient is cut before it is summed."""
    missing = tuple(axis for axis in mesh_axes(of_tokens[:2]) if axis not in mesh_axes(of_param))
    return jax.lax.pcast(param, missing, to="varying")


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
    devices, sizes = jax.devices() if devices is None else devices, dataclasses.asdict(config)
    require_fits(sizes, model, len(devices))
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices[: math.prod(sizes.values())]
    )  # fmt: skip


def require_fits(sizes: Mapping[str, int], model: ModelConfig | None, there: int | None = None) -> None:
    """Raises ``ValueError``, which proposes others, if a mesh of these sizes cannot split the model or the devices there."""
    there = jax.device_count() if there is None else there
    meshes = (dict(zip(sizes, factors, strict=True)) for factors in _factorizations(there, len(sizes)))

    def how_far(mesh):  # of equally near ones, that with more of data
        distance = sum(abs(math.log(mesh[name] / size)) for name, size in sizes.items())
        return round(distance, 6), *(-size for size in mesh.values())

    nearest = min((mesh for mesh in meshes if not _misfits(mesh, model)), key=how_far)
    advice = " ".join(f"--mesh.{name} {size}" for name, size in nearest.items() if size > 1) or "--mesh.data 1"
    for name, value, rule in _misfits(sizes, model):
        require(False, name, value, f"{rule}; devices here: {there}; try {advice}")
    needed = math.prod(sizes.values())
    require(needed <= there, "the number of mesh devices", needed, f"there are {there} devices; try {advice}")


def _misfits(sizes: Mapping[str, int], model: ModelConfig | None) -> list[tuple[str, int, str]]:
    """(field, value, rule) of every rule of the model that a mesh of these sizes breaks."""
    if model is None:
        return []
    has_memories = any(kind == "mom" for kind, _ in model.layer_runs)
    rules = [
        (("fsdp",), "hidden_size", model.hidden_size, True),
        (("memory",), "num_memories", model.num_memories, True),
        (("memory", "tensor"), "num_heads", model.num_heads, has_memories),
    ]
    return [
        (" * ".join(f"MeshConfig.{axis}" for axis in axes), number, f"it must divide {field} = {size}")
        for axes, field, size, applies in rules
        if applies and size % (number := math.prod(sizes[axis] for axis in axes))
    ]


def _factorizations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All tuples of ``count`` factors whose product is ``number``."""
    if count == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            yield from ((factor, *rest) for rest in _factorizations(number // factor, count - 1))


def require_shares(data: DataConfig, mesh: MeshConfig, accumulation: int = 1) -> None:
    """Raises ``ValueError`` if the mesh cannot split the batches, in ``accumulation`` pieces, into equal parts."""
    rows = mesh.data * mesh.fsdp * accumulation
    product = "mesh.data * mesh.fsdp" + (" * train.accumulation" if accumulation > 1 else "")
    for name, value, of, divisor in (
        ("batch_size", data.batch_size, product, rows),
        ("sequence_length", data.sequence_length, "mesh.sequence", mesh.sequence),
    ):
        require(value % divisor == 0, f"data.{name}", value, f"it must be a multiple of {of} = {divisor}")


def use_mesh(mesh: Mesh | None):
    """Context in which :func:`constrain` refers to ``mesh``; None: no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def take_rows(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """table[tokens] [B, T, D] of a table [O, D], NaN beyond it; over a mesh every device looks among its own rows."""
    if not shares_tokens(tokens):
        return jnp.take(table, tokens, axis=0).astype(dtype)
    of_table, of_ids, size = spec("od", table.shape, PARAMETER_MESH_AXES), spec("bt", tokens.shape), len(table)
    axes = of_table[0] or ()
    of_found = spec_of_tokens(tokens) if axes else spec("bt", tokens.shape)

    def own(table, tokens):
        table = gather_params(_of_own_tokens(table, of_table, of_ids), of_table)
        place = tokens - jax.lax.axis_index(axes) * len(table)
        is_own = (place >= 0) & (place < len(table))
        found = jnp.take(table, jnp.where(is_own, place, 0), axis=0).astype(dtype)
        is_there = (tokens >= 0) & (tokens < size)
        found = jnp.where(is_own[..., None], found, jnp.where(is_there, 0, jnp.nan)[..., None].astype(dtype))
        return scatter_tokens(found, axes, of_found) if axes else found

    return jax.shard_map(own, in_specs=(of_table, of_ids), out_specs=of_found)(table, tokens)


def letters_of_tokens(x: jax.Array) -> str:
    """What the axes of x [B, T, ...] are between products: rows over the widths too, or tokens; not the few of decoding."""
    shared = ("rt", "bs") if x.shape[1] >= SEGMENT_ALIGNMENT else ()
    return next((letters for letters in shared if None not in spec(letters, x.shape)), "bt")


def spec_of_tokens(x: jax.Array) -> PartitionSpec:
    """Where tokens of x [B, T, ...] lie between products."""
    return spec(letters_of_tokens(x), x.shape)


def keeps_tokens(x: jax.Array, of_token: int, of_weights: int) -> bool:
    """Whether devices that share the widths exchange less if the tokens of x [B, T, D] stay where they lie between products.

    Args:
      of_token: arrays like x that are exchanged otherwise, forward and backward.
      of_weights: numbers that are exchanged then, over D: three times those of the weights, which are gathered for the
        forward and the backward pass, and whose gradients are scattered.
    """
    if not shares_tokens(x):
        return False
    sizes = jax.sharding.get_abstract_mesh().shape
    tokens = math.prod(x.shape[:2]) // math.prod(sizes[name] for name in mesh_axes(spec("bt")))
    return of_token * tokens > of_weights


def letters_of_mlp(x: jax.Array, width: int) -> str:
    """What an MLP of ``width`` calls the tokens of x [B, T, D] in equations: as between products, if that exchanges less.

    With "bt" it gathers and scatters all tokens of a data shard, forward and backward; else three matrices. Of two H200s
    that exchanged tokens one waited for 27 ms of a step of 491 ms, and for 12 ms of 469 when they exchanged weights
    (docs/results).
    """
    return letters_of_tokens(x) if keeps_tokens(x, 4, 9 * width) else "bt"


def letters_of_memories(x: jax.Array, width: int) -> str:
    """What the outputs of a mixture of memories call the tokens of its x [B, T, D] in equations.

    "rt": the shared memory, queries, norm and gate are of the rows that a device has between products, of all heads, and
    their matrices, of ``width`` together, are gathered; only the routed memories see all rows of a data shard. "bt": all are
    of these rows and of some heads, as where ``tensor`` splits these too, and what they give is exchanged once more, after
    W_o. Of two H200s that did so a step of ``mom_340m`` took 472 ms, and 451 with "rt" (docs/results): no partial result of
    W_o, no heads to be brought together from where collectives lay them, products of x with whole matrices.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    is_by_memories = sizes["memory"] > 1 and sizes["tensor"] == 1 and letters_of_tokens(x) == "rt"
    return "rt" if is_by_memories and keeps_tokens(x, 2, 3 * width) else "bt"


def is_spread() -> bool:
    """Whether a mesh of several devices is in use, outside of ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not mesh.are_all_axes_manual


def shares_tokens(x: jax.Array) -> bool:
    """Whether there are such devices, and they can share the tokens of x [B, T, ...]."""
    return is_spread() and None not in spec("bt", x.shape)


def splits_tokens() -> bool:
    """Whether, inside of ``shard_map``, a row's tokens lie on several devices along ``sequence``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.are_all_axes_manual and mesh.shape.get("sequence", 1) > 1


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Annotates an activation whose axes are ``letters``; the identity where no mesh is in use, or inside ``shard_map``."""
    return _annotate(x, lambda: spec(letters, x.shape))


def constrain_tokens(x: jax.Array) -> jax.Array:
    """:func:`constrain` to :func:`spec_of_tokens`."""
    return _annotate(x, lambda: spec_of_tokens(x))


def _annotate(x, of_x):
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.are_all_axes_manual else jax.lax.with_sharding_constraint(x, of_x())
