"""Where parameters lie, and that eight devices compute what one does: over data, over memories and over both."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from models import KINDS, draw_params, small
from numerics import assert_close

from mom_jax.config import AttentionConfig, MeshConfig
from mom_jax.model import ModelState, bind, model_structure, split_params
from mom_jax.sharding import PARAMETER_AXES, constrain, leaf_name, make_mesh, parameter_specs, shardings, spec, use_mesh

MESHES = [(8, 1), (2, 4), (4, 2)]
B, T = 8, 70


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
    for tree in abstract_params(config):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            letters = PARAMETER_AXES[leaf_name(path)]
            shape = leaf.shape[1:] if path[0].key == "runs" else leaf.shape
            assert len(shape) == len(letters), path
            assert all(size in sizes[letter] for letter, size in zip(letters, shape, strict=True)), path


def test_specs_of_parameters_and_of_what_is_made_from_them():
    assert spec("bthv") == PartitionSpec("data", None, None, None)
    params, _ = abstract_params(small())
    specs = parameter_specs(params)
    rule = specs["runs"]["run_0"]["mixer"]["rule"]
    assert rule["w_k"] == PartitionSpec(None, "memory", None, None, None)
    assert rule["shared_k"] == PartitionSpec(None, None, None, None)
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
    config = small(kind, **layers)
    tokens = np.random.default_rng(0).integers(0, 61, (B, T)).astype(np.int32)
    return config, *draw_params(config), tokens


@cache
def on_one_device(kind):
    config, params, variables, tokens = case(kind)
    return jax.device_get(loss_of(config, variables)(params, tokens))


@pytest.mark.parametrize("kind", ["mom", "hybrid"])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(kind, sizes):
    config, params, variables, tokens = case(kind)
    mesh = make_mesh(MeshConfig(*sizes), config)
    placement = shardings(mesh, parameter_specs(params))
    params = jax.device_put(params, placement)
    tokens = jax.device_put(tokens, shardings(mesh, spec("bt")))
    with use_mesh(mesh):
        loss, gradient = loss_of(config, variables)(params, tokens)

    w_k = params["runs"]["run_0"]["mixer"]["rule"]["w_k"]
    assert {shard.data.shape[1] for shard in w_k.addressable_shards} == {config.num_memories // sizes[1]}
    assert {shard.data.shape[0] for shard in tokens.addressable_shards} == {B // sizes[0]}
    assert_close(jax.device_get((loss, gradient)), on_one_device(kind), 1e-5)


def test_new_keys_stay_on_the_device_of_their_row():
    """A token of decoding, rows over eight devices: no row's cache needs what another device has."""
    config = small("attention_only")
    model, mesh = bind(config, *draw_params(config)), make_mesh(MeshConfig(8, 1))
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
        (MeshConfig(16, 1), r"number of mesh devices = 16 .*there are 8 devices; try --mesh.data 8 --mesh.memory 1"),
        (MeshConfig(4, 4), r"number of mesh devices = 16 .*try --mesh.data 2 --mesh.memory 4"),
        (MeshConfig(1, 16), r"number of mesh devices = 16 .*try --mesh.data 1 --mesh.memory 8"),
        (MeshConfig(1, 8), r"MeshConfig.memory = 8 is not allowed: it must divide num_memories = 4"),
        (MeshConfig(1, 3), r"MeshConfig.memory = 3 is not allowed: it must divide num_memories = 4"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_advice(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, small())


def test_a_mesh_of_some_devices():
    mesh = make_mesh(MeshConfig(data=2, memory=2), small())
    assert dict(mesh.shape) == {"data": 2, "memory": 2} and mesh.devices.size == 4
