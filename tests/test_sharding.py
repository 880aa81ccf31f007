"""Where parameters lie, and that several devices compute what one does, each its part, whatever the axes."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from models import KINDS, draw_params, small
from numerics import LIMITS, assert_close

from mom_jax.config import AttentionConfig, MeshConfig, TrainConfig
from mom_jax.model import ModelState, bind, model_structure, split_params
from mom_jax.sharding import PARAMETER_AXES, constrain, leaf_name, make_mesh, parameter_specs, shardings, spec, use_mesh
from mom_jax.training import abstract_state, make_train_step

MESHES = {
    "data": {"data": 8}, "fsdp": {"fsdp": 8}, "memory": {"memory": 4}, "tensor": {"tensor": 4},
    "two": {"data": 2, "memory": 2}, "three": {"fsdp": 2, "memory": 2, "tensor": 2}, "sequence": {"sequence": 4},
    "long": {"fsdp": 2, "memory": 2, "sequence": 2},
}
B, T = 8, 72


def abstract_params(config):
    return split_params(nnx.merge(*model_structure(config)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_its_axes(kind):
    """Of every kind of model: a letter for each axis but that of stacked layers; the same letter, the same size."""
    config = small(kind)
    attention_heads, widths = config.attention.num_heads, (config.head_dim, 32 // config.attention.num_heads)
    sizes = {
        "o": (61,), "d": (32,), "f": (48,), "m": (config.num_memories,), "h": (config.num_heads, attention_heads),
        "k": widths, "v": (32,), "w": (config.conv_size,), "g": (config.attention.num_kv_heads or attention_heads,),
    }  # fmt: skip
    sizes |= {letter.upper(): sizes[letter] for letter in "dmh"}
    for tree in abstract_params(config):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            letters = PARAMETER_AXES[leaf_name(path)]
            shape = leaf.shape[1:] if path[0].key == "runs" else leaf.shape
            assert len(shape) == len(letters), path
            assert all(size in sizes[letter] for letter, size in zip(letters, shape, strict=True)), path


def test_specs_of_parameters_and_of_what_is_made_from_them():
    assert spec("bthv") == PartitionSpec(("data", "fsdp"), None, ("tensor", "memory"), None)
    params, _ = abstract_params(small())
    specs = parameter_specs(params)
    rule = specs["runs"]["run_0"]["mixer"]["rule"]
    assert rule["w_k"] == PartitionSpec(None, "memory", "fsdp", "tensor", None)
    assert rule["shared_k"] == PartitionSpec(None, "fsdp", ("tensor", "memory"), None)
    with use_mesh(make_mesh(MeshConfig(fsdp=2, memory=4))):  # 2 heads and a vocabulary of 61 stay whole
        found = parameter_specs(params)
    assert found["runs"]["run_0"]["mixer"]["rule"]["shared_k"] == PartitionSpec(None, "fsdp", None, None)
    assert found["head"] == PartitionSpec("fsdp", None)
    moments = parameter_specs(jax.eval_shape(optax.adamw(1e-3).init, params))[0]
    assert moments.mu == specs and moments.nu == specs and moments.count == PartitionSpec()


def loss_of(config, variables):
    def loss(params, tokens):
        model = bind(config, params, variables)
        out = model.hidden(tokens)
        log_p = jax.nn.log_softmax(model.logits(out.hidden))[:, :-1]
        cross_entropy = -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
        return cross_entropy + model.balance_loss(out.router)

    return jax.jit(jax.value_and_grad(loss))


def case(kind):
    layers = dict(num_layers=2, attention=AttentionConfig(layers=(1,), num_heads=4)) if kind == "hybrid" else {}
    config = small(kind, num_heads=4, vocab_size=64, **layers)
    tokens = np.random.default_rng(0).integers(0, 61, (B, T)).astype(np.int32)
    return config, *draw_params(config), tokens


@cache
def on_one_device(kind):
    config, params, variables, tokens = case(kind)
    return jax.device_get(loss_of(config, variables)(params, tokens))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("mom", name) for name in MESHES] + [("single_memory", "data"), ("single_memory", "tensor"), ("single_kv", "memory")]
    + [(kind, "three") for kind in ("single_kv", "not_shared", "hybrid")],
)  # fmt: skip
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(kind, name):
    config, params, variables, tokens = case(kind)
    mesh = make_mesh(MeshConfig(**MESHES[name]), config)
    with use_mesh(mesh):
        params = jax.device_put(params, shardings(mesh, parameter_specs(params)))
        tokens = jax.device_put(tokens, shardings(mesh, spec("bt")))
        loss, gradient = loss_of(config, variables)(params, tokens)
    assert_close(jax.device_get((loss, gradient)), on_one_device(kind), LIMITS["float32"])


def test_rows_that_the_devices_cannot_share_are_computed_all_the_same():
    config, params, variables, tokens = case("mom")
    expected = bind(config, params, variables).hidden(jnp.asarray(tokens[:3])).hidden
    with use_mesh(make_mesh(MeshConfig(data=2, memory=2), config)):
        found = jax.jit(lambda params: bind(config, params, variables).hidden(jnp.asarray(tokens[:3])).hidden)(params)
    assert_close(found, expected, LIMITS["float32"])


def train_program(**sizes):
    """A training step of a wider model, compiled for four devices of the mesh, or one."""
    config = small(hidden_size=64, head_dim=32, expand_v=1.0, num_heads=4, vocab_size=64, intermediate_size=96)
    train, mesh = TrainConfig(), make_mesh(MeshConfig(**sizes), config)
    with use_mesh(mesh):
        place = NamedSharding(mesh, spec("b"))
        batch = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((B, 128), jnp.int32, sharding=place))
        step = jax.jit(make_train_step(config, train), donate_argnums=0)
        return step.lower(abstract_state(config, train, mesh), batch).compile()


@cache
def whole_program():
    return train_program()


@pytest.mark.parametrize(("axis", "share_of_work"), [("data", 0.27), ("fsdp", 0.27), ("tensor", 0.27), ("memory", 0.45)])
def test_four_devices_do_a_quarter_of_the_work_each(axis, share_of_work):
    """A shard of the memories has slots for the case that all tokens choose its own, so it is not a quarter there."""
    program, whole = train_program(**{axis: 4}), whole_program()
    assert program.cost_analysis()["flops"] < share_of_work * whole.cost_analysis()["flops"]
    state_bytes = program.memory_analysis().argument_size_in_bytes / whole.memory_analysis().argument_size_in_bytes
    assert state_bytes > 0.9 if axis == "data" else state_bytes < 0.3

    gathered = re.findall(r"\w+\[([\d,]+)\]\S* all-gather", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    # Parameters, a layer at a time; queries, and the outputs' gradient; what the cross-entropy has one of for each device.
    allowed = {"data": 0, "fsdp": 4 * 64 * 128, "tensor": B * 128 * 4, "memory": B * 128 * 4 * 32}
    assert max(sizes, default=0) <= allowed[axis]
    assert axis != "memory" or sizes.count(allowed[axis]) == 2
    assert not re.search("all-to-all|collective-permute", program.as_text())


def test_new_keys_stay_on_the_device_of_their_row():
    """A token of decoding, rows over eight devices: no row's cache needs what another device has."""
    config = small("attention_only")
    model, mesh = bind(config, *draw_params(config)), make_mesh(MeshConfig(data=8))
    state = model.init_state(B)
    rows_of_layers = jax.tree.map(lambda _: PartitionSpec(None, "data"), state.layers)
    placement = shardings(mesh, (spec("bt"), ModelState(rows_of_layers, spec("b"))))
    tokens, state = jax.device_put((np.ones((B, 1), np.int32), state), placement)
    with use_mesh(mesh):
        program = jax.jit(lambda tokens, state: model.hidden(tokens, state=state)).lower(tokens, state).compile()
    assert "all-gather" not in program.as_text()


def test_without_a_mesh_nothing_is_annotated():
    x = jnp.ones((2, 3))
    assert constrain(x, "bt") is x
    with use_mesh(None):
        assert constrain(x, "bt") is x


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=16), r"number of mesh devices = 16 .*there are 8 devices; try --mesh.data 8$"),
        (MeshConfig(data=4, memory=4), r"number of mesh devices = 16 .*try --mesh.data 2 --mesh.memory 4"),
        (MeshConfig(memory=16), r"number of mesh devices = 16 .*try --mesh.data 1 --mesh.memory 8"),
        (MeshConfig(fsdp=4, memory=4), r"number of mesh devices = 16 .*try --mesh.data 2 --mesh.memory 4"),
        (MeshConfig(memory=8), r"MeshConfig.memory = 8 is not allowed: it must divide num_memories = 4"),
        (MeshConfig(memory=3), r"MeshConfig.memory = 3 is not allowed: it must divide num_memories = 4"),
        (MeshConfig(memory=2, tensor=4), r"MeshConfig.memory \* MeshConfig.tensor = 8 .* must divide num_heads = 2"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_advice(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, small())


def test_a_mesh_of_some_devices():
    mesh = make_mesh(MeshConfig(data=2, memory=2), small())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "memory": 2, "tensor": 1} and mesh.devices.size == 4
