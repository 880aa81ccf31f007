"""Where parameters lie, and that several devices compute what one does, each its part, whatever the axes."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hlo import collectives, matmul_flops
from jax.sharding import NamedSharding, PartitionSpec
from jaxprs import equations
from models import KINDS, draw_params, small
from numerics import LIMITS, assert_close, relative_l2

from mom_jax import sharding
from mom_jax.config import AttentionConfig, MeshConfig, TrainConfig
from mom_jax.generation import generate
from mom_jax.layers import Product, cast_weights, einsums
from mom_jax.model import ModelState, bind, model_structure, split_params
from mom_jax.sampling import Sampling
from mom_jax.sharding import (
    PARAMETER_AXES,
    constrain,
    leaf_name,
    make_mesh,
    parameter_specs,
    shardings,
    spec,
    take_rows,
    use_mesh,
)
from mom_jax.training import (
    abstract_state,
    jit_state,
    jit_step,
    loss_and_metrics,
    make_eval_step,
    make_state,
    make_train_step,
    place,
)

MESHES = {
    "data": {"data": 8}, "fsdp": {"fsdp": 8}, "memory": {"memory": 4}, "tensor": {"tensor": 4},
    "two": {"data": 2, "memory": 2}, "three": {"fsdp": 2, "memory": 2, "tensor": 2},
    "without_memory": {"data": 2, "fsdp": 2, "tensor": 2}, "sequence": {"sequence": 4},
    "long": {"fsdp": 2, "memory": 2, "sequence": 2}, "rows": {"data": 2, "fsdp": 2, "memory": 2},
    "wide": {"memory": 2, "tensor": 2, "sequence": 2},
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
    assert spec("bthv") == PartitionSpec(("data", "fsdp"), "sequence", ("tensor", "memory"), None)
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


CASES = {
    "mom": {},
    "packed": dict(remat="full"),
    "single_memory": dict(remat="dots", tie_embeddings=True),
    "single_kv": dict(conv_bias=True, vocab_size=61),  # a vocabulary that stays whole
    "not_shared": dict(remat="dots"),  # with the router's bias
    "few": {},  # rows that memory and tensor cannot share
    # Keys and values of attention that four devices cannot share, and an MLP that exchanges tokens instead of weights.
    "hybrid": dict(num_layers=2, intermediate_size=512, attention=AttentionConfig(layers=(1,), num_heads=4, num_kv_heads=2)),
    "plain_hybrid": dict(num_layers=2, attention=AttentionConfig(layers=(1,), num_heads=4)),
    "windowed": dict(num_layers=2, attention=AttentionConfig(layers=(1,), num_heads=4, num_kv_heads=2, window_size=20)),
}


def case(name, dtype="float32"):
    """A config, its values and a batch; some targets are missing. Of the packed ones there are documents, and padding."""
    config = small(name if name in KINDS else "mom", **dict(num_heads=4, vocab_size=64, dtype=dtype) | CASES[name])
    rng = np.random.default_rng(0)
    # Whole segments on every device need no dispatch to slots of the shared memory; not all meshes divide four rows.
    shape = {"mom": (B, 64), "single_kv": (B, 128), "not_shared": (4, T), "few": (2, T)}.get(name, (B, T))
    tokens, targets = rng.integers(0, 61, (2, *shape)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.where(rng.uniform(size=shape) < 0.1, -1, targets)}
    if name in ("packed", "hybrid", "single_kv"):
        batch["document_ids"] = np.cumsum(rng.uniform(size=shape) < 0.05, axis=1, dtype=np.int32)
    if name in ("packed", "hybrid"):
        batch["attention_mask"] = rng.uniform(size=shape) < 0.9
    return config, *draw_params(config), batch


def gradient_of(config, variables):
    """Of the loss, with the metrics."""

    def loss(params, batch):
        return loss_and_metrics(bind(config, cast_weights(params, config.dtype), variables), batch, 32)

    return jax.jit(jax.grad(loss, has_aux=True))


@cache
def on_one_device(name, dtype="float32"):
    config, params, variables, batch = case(name, dtype)
    return jax.device_get(gradient_of(config, variables)(params, batch))


def on_mesh(name, mesh, dtype="float32"):
    config, params, variables, batch = case(name, dtype)
    mesh = make_mesh(MeshConfig(**MESHES[mesh]), config)
    with use_mesh(mesh):
        params = jax.device_put(params, shardings(mesh, parameter_specs(params)))
        return jax.device_get(gradient_of(config, variables)(params, place(batch, mesh)))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (name, mesh)
        for name, meshes in {
            # Mixtures of memories on every mesh, hybrids, and single memories, which nothing shares over ``memory``.
            "mom": "data fsdp memory tensor", "packed": "two three sequence rows", "single_kv": "memory three long",
            "not_shared": "three sequence", "few": "wide long",
            "hybrid": "three long", "plain_hybrid": "data fsdp memory tensor", "windowed": "two sequence rows wide",
            "single_memory": "data fsdp tensor without_memory sequence",
        }.items()
        for mesh in meshes.split()
    ],
)  # fmt: skip
def test_a_mesh_gives_the_gradients_and_metrics_of_one_device(name, mesh):
    assert_close(on_mesh(name, mesh), on_one_device(name), LIMITS["float32"])


@pytest.mark.parametrize(
    "name_and_mesh", ["mom memory", "packed two", "packed rows", "not_shared memory", "single_kv long", "hybrid long"]
)
def test_so_does_a_mesh_whose_devices_keep_their_rows(name_and_mesh, monkeypatch):
    """All but the routed memories on a device's own rows, as of models with fewer weights than tokens, larger than these."""
    name, mesh = name_and_mesh.split()
    expected, (config, *_, batch) = on_one_device(name), case(name)
    monkeypatch.setattr(sharding, "keeps_tokens", lambda x, *_: sharding.shares_tokens(x))
    with use_mesh(make_mesh(MeshConfig(**MESHES[mesh]), config)):
        assert sharding.letters_of_memories(batch["tokens"], 0) == "rt"
    assert_close(on_mesh(name, mesh), expected, LIMITS["float32"])


def test_bfloat16_errs_on_a_mesh_as_on_one_device():
    """Both against float32, all gradients as one vector: with values drawn this large, bfloat16 alone is far from it. With a
    single memory, since rounding changes what a router chooses."""
    exact, one, several = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients)])
        for gradients, _ in (
            on_one_device("single_memory"), on_one_device("single_memory", "bfloat16"),
            on_mesh("single_memory", "without_memory", "bfloat16"),
        )
    )  # fmt: skip
    assert relative_l2(several, exact) < 1.25 * relative_l2(one, exact) < 0.25


def test_short_rows_have_the_gates_of_one_device():
    """Rows that are stepped through: with one projection for all memories, and float32 gates of bfloat16 models."""
    config, params, variables, batch = case("single_kv")
    tokens = jnp.asarray(batch["tokens"][:, :9])
    expected = bind(config, params, variables).hidden(tokens).hidden
    x, w = jnp.ones((B, 9, 32), jnp.bfloat16), jnp.ones((4, 32, 2))
    with use_mesh(make_mesh(MeshConfig(data=2, memory=2), config)):
        found = jax.jit(lambda params: bind(config, params, variables).hidden(tokens).hidden)(params)
        gates = jax.jit(lambda x, w: einsums(x, {"a": Product("btd,mdh->btmh", (w,), jnp.float32)}, dtype="bfloat16"))(x, w)
    assert_close(found, expected, LIMITS["float32"])
    assert gates["a"].dtype == jnp.float32


def test_rows_that_the_devices_cannot_share_are_computed_all_the_same():
    config, params, variables, batch = case("mom")
    tokens = batch["tokens"]
    expected = bind(config, params, variables).hidden(jnp.asarray(tokens[:3])).hidden
    with use_mesh(make_mesh(MeshConfig(data=2, memory=2), config)):
        found = jax.jit(lambda params: bind(config, params, variables).hidden(jnp.asarray(tokens[:3])).hidden)(params)
    assert_close(found, expected, LIMITS["float32"])


def test_a_step_on_a_mesh_with_accumulation_dropout_and_unrolled_layers():
    """The moments of the gradients and the metrics, of parameters born on the mesh, are those of one device."""
    config = small(num_heads=4, vocab_size=64, unroll=True, embedding_dropout=0.2, remat="dots")
    train, (*_, batch) = TrainConfig(accumulation=2, loss_chunk=32), case("mom")

    def after_a_step(mesh):
        with use_mesh(mesh):
            step = jit_step(make_train_step(config, train), config, train, mesh)
            state, metrics = step(make_state(config, train, mesh), place(batch, mesh))
            return jax.device_get((state["optimizer"], metrics))

    found, expected = (after_a_step(make_mesh(MeshConfig(**sizes), config)) for sizes in (MESHES["three"], {}))
    assert_close(found, expected, LIMITS["float32"])


WIDTH, LENGTH = 64, 128  # D and T of the programs
METRICS = 2048  # bytes enough for all of a step


def wide(**changes):
    """The model of the programs."""
    sizes = dict(hidden_size=WIDTH, head_dim=32, expand_v=1.0, num_heads=4, vocab_size=256, intermediate_size=96)
    return small(remat="dots", **sizes | changes)


@cache
def train_program(rows=B, length=LENGTH, attention=None, **sizes):
    """A training step of a wider model, compiled for devices of the mesh, or one, and the bytes of its parameters: of those
    that fsdp splits in a layer and outside of the layers, and of all others. The cross-entropy has two chunks."""
    config = wide() if attention is None else wide(attention=attention)
    train, mesh = TrainConfig(loss_chunk=length // 2), make_mesh(MeshConfig(**sizes), config)
    with use_mesh(mesh):
        of_tokens = NamedSharding(mesh, spec("bt"))
        batch = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=of_tokens))
        step = jit_step(make_train_step(config, train), config, train, mesh)
        state = abstract_state(config, train, mesh)
        program = step.lower(state, batch).compile()
    parameters = {"layer": 0, "outside": 0, "others": 0}
    for path, x in jax.tree_util.tree_leaves_with_path(state["params"]):
        layers = config.num_layers if path[0].key == "runs" else 1
        part = "others" if "d" not in PARAMETER_AXES[leaf_name(path)] else "outside" if layers == 1 else "layer"
        parameters[part] += 4 * x.size // layers
    return program, parameters


HYBRID = AttentionConfig(layers=(1,), num_heads=4, num_kv_heads=2)  # heads of keys and values that four cannot share
LONG = dict(rows=2, length=2048)


@pytest.mark.parametrize(
    ("sizes", "shape", "share_of_work"),
    [
        ({"data": 4}, {}, 0.25), ({"fsdp": 4}, {}, 0.25), ({"data": 2, "fsdp": 2}, {}, 0.25), ({"tensor": 4}, {}, 0.25),
        # A shard of the memories has slots for the case that all tokens choose its own: 3 chunks a memory, not 10 of 5.
        ({"memory": 4}, {}, 0.342), ({"memory": 2, "tensor": 2}, {}, 0.342),
        ({"tensor": 4}, {"rows": 1, "length": 512}, 0.25),
        ({"sequence": 4}, LONG, 0.336),  # the second pass, which only follows the states, is part of the work
        ({"tensor": 4}, {"attention": HYBRID}, 0.252), ({"memory": 2, "tensor": 2}, {"attention": HYBRID}, 0.335),
    ],
)  # fmt: skip
def test_each_of_four_devices_has_its_part_of_the_products(sizes, shape, share_of_work):
    """Of the compiled step, loops as often as they run."""
    flops, of_one = (matmul_flops(train_program(**shape, **axes)[0].as_text()) for axes in (sizes, {}))
    assert flops <= (share_of_work + 1e-9) * of_one


def bytes_a_device(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ({"data": 4}, 1), ({"fsdp": 4}, 0.25), ({"data": 2, "fsdp": 2}, 0.5), ({"tensor": 4}, 0.25), ({"memory": 4}, 0.25),
        ({"sequence": 4}, 1),
    ],
)  # fmt: skip
def test_each_of_four_devices_has_its_part_of_the_parameters_and_of_the_optimiser(sizes, share):
    """All but what is small, which every device has whole. The compiled step takes just these, and the tokens."""
    config, train = wide(), TrainConfig()
    split, whole = (abstract_state(config, train, make_mesh(MeshConfig(**axes))) for axes in (sizes, {}))
    for part in ("params", "optimizer"):
        assert share <= bytes_a_device(split[part]) / bytes_a_device(whole[part]) < share + 0.05
    shape = LONG if "sequence" in sizes else {}
    arguments = train_program(**shape, **sizes)[0].memory_analysis().argument_size_in_bytes
    tokens = 2 * 4 * (math.prod(LONG.values()) if shape else B * LENGTH)
    assert arguments <= bytes_a_device(split) + tokens + METRICS


def test_parameters_are_born_split():
    """No device ever has the whole of the largest parameter, nor of the moments."""
    config, train = wide(hidden_size=512, vocab_size=4096), TrainConfig()
    memory = jit_state(config, train, make_mesh(MeshConfig(fsdp=8))).lower().compile().memory_analysis()
    state = abstract_state(config, train, make_mesh(MeshConfig()))
    largest = max(4 * x.size for x in jax.tree.leaves(state["params"]))
    assert memory.temp_size_in_bytes < largest
    assert memory.output_size_in_bytes < 0.14 * bytes_a_device(state)


def kinds_of(program):
    return {collective.kind for collective in collectives(program.as_text())}


def sent(program, kind, **which):
    """The bytes of all results of the collectives of a kind."""
    return [
        size for collective in collectives(program.as_text()) for size in collective.bytes
        if collective.kind == kind and all(getattr(collective, name) == value for name, value in which.items())
    ]  # fmt: skip


def test_tokens_of_a_row_are_shared_and_only_states_handed_on():
    """Every device gets the states and transitions of all parts, forward and again in the backward pass, and what comes
    back; of tokens only the convolutions' inputs."""
    program, _ = train_program(**LONG, sequence=4)
    memories, matrix = 2 * 5 * 4, 4 * 32 * 32  # of all rows, memories and heads
    gathered = sorted(sent(program, "all-gather"), reverse=True)
    assert gathered[:3] == [4 * memories * 2 * matrix] * 2 + [4 * memories * matrix]
    assert max(gathered[3:]) <= 4 * memories * 3 * 4 * 32  # W - 1 inputs
    activations = 4 * 2 * 2048 * WIDTH // 4
    assert max(sent(program, "all-reduce") + sent(program, "reduce-scatter")) < activations
    assert not sent(program, "all-to-all") + sent(program, "collective-permute")


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "fsdp": 2}])
def test_fsdp_gathers_parameters_and_scatters_their_gradients(sizes):
    """A layer's are gathered for the forward and the backward pass; over ``data`` the parts of the gradients are summed."""
    (program, parameters), fsdp = train_program(**sizes), sizes["fsdp"]
    for is_in_loop, size, times in ((True, parameters["layer"], 2), (False, parameters["outside"], 1)):
        of_fsdp = dict(devices=fsdp, is_in_loop=is_in_loop)
        assert sum(sent(program, "all-gather", **of_fsdp)) == times * size
        assert sum(sent(program, "reduce-scatter", **of_fsdp)) == size // fsdp
    summed_over_data = (parameters["layer"] + parameters["outside"]) // fsdp if "data" in sizes else 0
    assert sum(sent(program, "all-reduce")) < summed_over_data + parameters["others"] + METRICS
    assert kinds_of(program) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_data_sums_gradients_once():
    """Those of a layer for each, the head's after all chunks."""
    program, parameters = train_program(data=4)
    assert kinds_of(program) == {"all-reduce"}
    of_layer, outside = (sum(sent(program, "all-reduce", is_in_loop=is_in_loop)) for is_in_loop in (True, False))
    assert of_layer < parameters["layer"] + parameters["others"] + METRICS
    assert outside < parameters["outside"] + parameters["others"] + METRICS


@pytest.mark.parametrize(("axis", "rows", "keeps_rows"), [("tensor", B, False), ("memory", B, True), ("memory", 4, False)])
def test_widths_exchange_rows_and_the_weights_of_what_keeps_them(axis, rows, keeps_rows):
    """Rows of [B, T, D] are gathered before the mixer and scattered after it, with their gradients the other way; so are the
    hidden states before the head, and the embeddings after theirs. The MLP has its own rows, and gathers its weights.

    ``memory`` gathers queries and scatters outputs, too; of many rows the rest of the mixer has its own, like the MLP, and
    nothing is scattered after it. Nothing of it is gathered twice, though remat is "dots".
    """
    program, activations = train_program(rows=rows, **{axis: 4})[0], 4 * rows * LENGTH * WIDTH
    queries, statistics = 4 * rows * LENGTH * 4 * 32, 4 * 4 * 4 * rows * LENGTH // 2
    choices = [4 * rows * LENGTH * 3] * 2  # memories and their weights
    tokens = [activations] * (1 if keeps_rows else 2) + [queries] * 2 * (axis == "memory")
    heads = [4 * WIDTH * 4 * 32] * 5 + [4 * WIDTH * 4] * 2  # q, gate, o, the shared k and v; the shared gates
    weights = [4 * WIDTH * 96] * 3 + heads * keeps_rows
    gathered = sent(program, "all-gather", is_in_loop=True)
    assert sorted(gathered) == sorted(choices + [statistics] + tokens + 2 * weights)
    scattered = [4 * size for size in sent(program, "reduce-scatter", is_in_loop=True)]
    assert sorted(scattered) == sorted([choices[0]] + tokens + weights)
    for kind, size in (("all-gather", activations), ("reduce-scatter", activations // 4)):
        assert sent(program, kind, is_in_loop=False) == [size] * 2
    assert sum(sent(program, "all-reduce")) < 32 * 1024  # of the small parameters, and metrics
    assert not sent(program, "all-to-all") + sent(program, "collective-permute")


def test_a_token_of_decoding_is_not_moved_about():
    """Only summed, after mixer and MLP."""
    config = small(num_heads=4)
    model, mesh = bind(config, *draw_params(config)), make_mesh(MeshConfig(tensor=4), config)
    with use_mesh(mesh):
        step = jax.jit(lambda tokens, state: model.hidden(tokens, state=state))
        program = step.lower(np.ones((B, 1), np.int32), model.init_state(B)).compile()
    found = [collective.kind for collective in collectives(program.as_text()) if collective.is_in_loop]
    assert set(found) == {"all-reduce"} and len(found) <= 2


def test_ids_out_of_range_are_nan_over_a_mesh_too():
    table, ids = jnp.arange(32.0).reshape(8, 4), np.tile(np.arange(-1, 63, dtype=np.int32), (4, 1))
    with use_mesh(make_mesh(MeshConfig(fsdp=2, memory=2))):
        found = jax.jit(lambda table, ids: take_rows(table, ids, jnp.float32))(table, ids)
    is_there = ((ids >= 0) & (ids < 8))[..., None]
    np.testing.assert_array_equal(found, np.where(is_there, np.asarray(table)[np.where(is_there[..., 0], ids, 0)], np.nan))


def test_weights_are_gathered_in_the_compute_type():
    """In training and evaluation; not the embedding and the head, whose gradients are float32."""
    config, train, mesh = small(dtype="bfloat16"), TrainConfig(), make_mesh(MeshConfig(fsdp=8))
    with use_mesh(mesh):
        state = abstract_state(config, train, mesh)
        batch = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((B, T), jnp.int32))
        steps = ((make_train_step(config, train), state), (make_eval_step(config, 64), state["params"], state["variables"]))
        for step, *arguments in steps:
            gathers = [e.invars[0].aval for e in equations(step, *arguments, batch) if e.primitive.name == "all_gather"]
            assert {x.shape for x in gathers if x.dtype == jnp.float32} == {(61, 4), (4, 61)}
            assert len(gathers) > 14


def test_a_piece_with_a_state_and_a_token_after_it():
    """The partitioner's, but for the products: hidden states, and every part of the state."""
    config, params, variables, batch = case("hybrid")

    @jax.jit
    def run(params, batch):
        model = bind(config, params, variables)
        piece = model.hidden(batch["tokens"], batch["attention_mask"], return_state=True)
        token = model.hidden(batch["tokens"][:, :1], state=piece.state)
        return piece.hidden, token.hidden, token.state

    expected, mesh = run(params, batch), make_mesh(MeshConfig(**MESHES["three"]), config)
    with use_mesh(mesh):
        found = run(jax.device_put(params, shardings(mesh, parameter_specs(params))), place(batch, mesh))
    assert_close(jax.device_get(found), jax.device_get(expected), LIMITS["float32"])


def test_states_are_born_split_and_stay_so():
    """Rows over data and fsdp, heads over memory and tensor: the program of a prompt's first piece is that of the next."""
    config, mesh = small(num_heads=4), make_mesh(MeshConfig(fsdp=2, memory=2, tensor=2))
    model = bind(config, *draw_params(config))
    with use_mesh(mesh):
        born = jax.jit(lambda: model.init_state(B))()
        used = jax.jit(lambda tokens, state: model.hidden(tokens, state=state).state)(np.ones((B, 64), np.int32), born)
    for state in (born, used):
        assert bytes_a_device(state.layers[0].recurrent) * 8 == state.layers[0].recurrent.nbytes
        assert bytes_a_device(state.layers[0].history) * 8 == sum(x.nbytes for x in state.layers[0].history.values())
    shards = [jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), state) for state in (born, used)]
    assert shards[0] == shards[1]


def test_generation_draws_the_tokens_of_one_device():
    """From a training state as it lies, with rows that the devices cannot share: as train_lm.py does at its end."""
    config, params, variables, batch = case("mom")
    prompts = [batch["tokens"][0, :n] for n in (1, 9, 66)]
    settings = dict(max_new_tokens=5, sampling=Sampling(0.8, top_k=40))
    expected, mesh = generate(bind(config, params, variables), prompts, **settings), make_mesh(MeshConfig(**MESHES["three"]))
    with use_mesh(mesh):
        params = jax.device_put(params, shardings(mesh, parameter_specs(params)))
        assert generate(bind(config, params, variables), prompts, **settings) == expected


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
        (MeshConfig(data=16), "number of mesh devices = 16 .*there are 8 devices; try --mesh.data 8$"),
        (MeshConfig(data=4, memory=4), "number of mesh devices = 16 .*try --mesh.data 4 --mesh.memory 2$"),
        (MeshConfig(fsdp=4, memory=4), "number of mesh devices = 16 .*try --mesh.fsdp 4 --mesh.memory 2$"),
        (MeshConfig(fsdp=12), "MeshConfig.fsdp = 12 .* divide hidden_size = 32; devices here: 8; try --mesh.fsdp 8$"),
        (MeshConfig(memory=8), "MeshConfig.memory = 8 .* divide num_memories = 4; .* try --mesh.data 2 --mesh.memory 4$"),
        (MeshConfig(memory=3), "MeshConfig.memory = 3 .* divide num_memories = 4; .* try --mesh.data 2 --mesh.memory 4$"),
        (MeshConfig(memory=2, tensor=4), r"memory \* MeshConfig.tensor = 8 .* divide num_heads = 4; .* try --mesh.data 2"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_advice(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, small(num_heads=4))


def test_a_mesh_of_some_devices():
    mesh = make_mesh(MeshConfig(data=2, memory=2), small())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "memory": 2, "tensor": 1, "sequence": 1} and mesh.devices.size == 4
