"""Without a GPU: kernels lower for CUDA, compile to H200 code where the CUDA plugin is installed, and are really used."""

import collections
import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.experimental.topologies
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh
from models import small

from mom_jax.config import MeshConfig
from mom_jax.layers import cast_weights
from mom_jax.model import bind, init_params
from mom_jax.training import loss_and_metrics
from pallas_kernels import api
from pallas_kernels.api import Segments

H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
H200_TARGET = (Path(__file__).parent / "data/h200.gpu_target_config.pbtxt").read_text(encoding="utf-8")
has_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
needs_plugin = pytest.mark.skipif(not has_plugin, reason="needs JAX's CUDA plugin (jax-cuda12-plugin, jax-cuda12-pjrt)")

CALLS = [
    ("gated_delta_rule", "head", "bfloat16", 256, 256),
    ("gated_delta_rule", "head", "bfloat16", 128, 128),
    ("gated_delta_rule", None, "float32", 32, 48),
    ("gated_delta_rule", "head", "float32", 64, 128),
    ("gated_delta_rule", "head", "float32", 128, 256),
    ("gated_delta_rule", "head", "float32", 256, 256),
    ("gated_delta_rule", "head", "bfloat16", 16, 1280),
    ("linear_attention", None, "bfloat16", 64, 16),
    ("linear_attention", "head", "float32", 256, 64),
    ("linear_attention", "key", "bfloat16", 256, 256),
    ("linear_attention", "key", "float32", 256, 256),
    ("linear_attention", "key", "float32", 16, 32),
]

LONG = [(*CALLS[i], 1, 32768, 2) for i in (0, 2, 5, 8, 9)]  # few long segments: cut into spans


def target(kind):
    """XLA's description of the device; an A100 has what matters here of its own: instructions and shared memory."""
    if kind == H200:
        return H200_TARGET
    text = H200_TARGET.replace(H200, kind)
    for ours, theirs in (
        ("major: 9\n    feature_extension: ACCELERATED_FEATURES", "major: 8"), ("_optin: 232448", "_optin: 166912"),
        ("per_core: 233472", "per_core: 167936"),
    ):  # fmt: skip
        assert text.count(ours) == 1
        text = text.replace(ours, theirs)
    return text


def lower(function, *arguments, kind=H200, **mesh):
    device, sizes = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu"), dataclasses.asdict(MeshConfig(**mesh))
    types = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types, abstract_device=device)
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def kernels(lowered) -> collections.Counter:
    """How often each kernel occurs in a lowered program, by name; without dead ones, which XLA drops."""
    counts = collections.Counter()
    for function in lowered.as_text().split("func.func")[1:]:
        lines, found = [], function.splitlines()
        while len(lines) != len(found):  # a kernel is dead if only dead ones read what it gives
            lines, uses = found, collections.Counter(re.findall(r"%\w+", "\n".join(found)))
            found = [x for x in lines if "__gpu$xla.gpu.triton" not in x or uses[re.search(r"%\w+", x)[0]] > 1]
        counts.update(re.search(r'name = "(\w+)"', x)[1] for x in found if "__gpu$xla.gpu.triton" in x)
    return counts


def op_with_gradients(op, decay, dtype, key, value, batch=2, num_slots=256, count=3, implementation="triton"):
    """A function of the op and all its gradients over ragged segments with runs, and its arguments' shapes."""
    heads = 2

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    keys, values = (array(batch, num_slots, heads, width, dtype=dtype) for width in (key, value))
    gate, state = array(batch, num_slots, heads), array(batch, count, heads, key, value)
    decay = {None: None, "head": gate, "key": array(batch, num_slots, heads, key)}[decay]
    segments = Segments(array(batch, count + 1, dtype="int32"), array(batch, count, dtype="int32"))
    arrays = (keys, keys, values, decay, gate)[: 5 if op == "gated_delta_rule" else 4]

    def function(arrays, state, segments, run_ids, cotangents):
        def run(arrays, state):
            return getattr(api, op)(
                *arrays, segments=segments, run_ids=run_ids, initial_state=state, implementation=implementation
            )  # fmt: skip

        outputs, pull = jax.vjp(run, arrays, state)
        return outputs, pull(cotangents)

    return function, (arrays, state, segments, array(batch, num_slots, dtype="int32"), (values, state))


def compile_for(kind, function, arguments):
    topology = jax.experimental.topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=target(kind)
    )
    device = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments)
    return lower(function, *arguments, kind=kind).compile()


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_recurrences_lower(call):
    function, arguments = op_with_gradients(*call)
    expected = ["recurrence_scan", "recurrence_scan_grad", "recurrence_gradients"]
    expected += ["recurrence_per_key", "recurrence_per_key_grad"] if call[1] == "key" else ["recurrence_prepare"]
    expected += ["recurrence_inverse"] if call[0] == "gated_delta_rule" else []
    assert kernels(lower(function, *arguments)) == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("call", LONG, ids=str)
def test_long_segments_are_cut_into_spans(call):
    function, arguments = op_with_gradients(*call)
    found = kernels(lower(function, *arguments))
    assert found["recurrence_local_states"] == found["recurrence_local_states_grad"] == 1
    assert found["recurrence_scan"] == found["recurrence_scan_grad"] == 1


@needs_plugin
@pytest.mark.parametrize(
    ("kind", "call"), [(H200, call) for call in CALLS + LONG] + [(A100, CALLS[i]) for i in (0, 1, 5, 9)], ids=str
)
def test_recurrences_compile(kind, call):
    """Shared memory that overflows and what the compiler refuses are found here."""
    compile_for(kind, *op_with_gradients(*call))


def model_gradient(config, rows=2):
    """The gradient of a model's loss, and its arguments' shapes."""
    params, variables = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    batch = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((rows, 128), "int32"))

    def gradient(params, variables, batch):
        return jax.grad(lambda p: loss_and_metrics(bind(config, p, variables), batch, 128), has_aux=True)(params)

    return gradient, (params, variables, batch)


@needs_plugin
@pytest.mark.parametrize(("kind", "dtype"), [(H200, "bfloat16"), (H200, "float32"), (A100, "bfloat16")])
def test_wide_model_compiles(kind, dtype):
    """With the widths of the paper's model: every kernel, those that are not of the recurrences too."""
    wide = dict(vocab_size=32000, num_layers=1, hidden_size=1024, num_heads=4, head_dim=256, expand_v=1.0, dtype=dtype)
    compile_for(kind, *model_gradient(small(implementation="triton", **wide)))


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_model_uses_the_kernels(remat, implementation):
    """None chooses Triton for CUDA, for the forward and the backward pass: nothing falls back silently."""
    config = small(num_layers=1, remat=remat, implementation=implementation)
    gradient, arguments = model_gradient(config)
    forward = {
        "grouped_matmul": 2, "short_convolution": 3, "recurrence_prepare": 1, "recurrence_inverse": 1,
        "recurrence_scan": 1, "gated_rms_norm": 1,
    }  # fmt: skip
    backward = {
        "grouped_matmul_dx": 1, "grouped_matmul_dw": 2, "grouped_matmul_dw_add": 2, "short_convolution_grad": 3,
        "recurrence_scan_grad": 1, "recurrence_gradients": 1, "gated_rms_norm_grad": 1, "gated_rms_norm_slots_grad": 1,
        "softmax_rows": 1,
    }  # fmt: skip
    times = 1 if remat == "none" else 2  # the backward pass computes the forward pass again
    expected = {name: times * count for name, count in forward.items()} | backward
    if remat == "dots":  # api.WORTH_KEEPING
        kept = ("grouped_matmul", "gated_rms_norm", "recurrence_prepare", "recurrence_inverse")
        expected |= {name: forward[name] for name in kept}
    assert kernels(lower(gradient, *arguments)) == expected


@pytest.mark.parametrize(
    ("axis", "rows"), [("data", 2), ("fsdp", 2), ("tensor", 2), ("memory", 2), ("memory", 8), ("sequence", 2)]
)
def test_several_devices_use_the_kernels(axis, rows):
    """Each on what it has: with split memories the routed ones and its part of the shared one, of the heads or, if they are
    many, of the rows: two runs of all. With split tokens a pass that only follows the states comes first, and the gradients
    of states are scanned twice. With a split vocabulary the cross-entropy's is cut in two where the devices tell each other
    of their parts."""
    gradient, arguments = model_gradient(small(num_layers=1, vocab_size=64), rows)
    whole, found = kernels(lower(gradient, *arguments)), kernels(lower(gradient, *arguments, **{axis: 2}))
    if axis in ("tensor", "memory"):
        del whole["softmax_rows"]
        whole |= {"row_statistics": 1, "row_gradients": 1}
        assert found["row_statistics"] == found["row_gradients"] == 1
    if axis == "memory":
        assert found["recurrence_scan"] == found["recurrence_scan_grad"] == found["recurrence_gradients"] == 2
        assert found["grouped_matmul"] == whole["grouped_matmul"] and found["grouped_matmul_dw"] == 2
        assert found["gated_rms_norm"] == found["gated_rms_norm_slots_grad"] == 1  # the shared one works in place
    elif axis == "sequence":
        assert found["recurrence_local_states"] == 1 and found["recurrence_scan_grad"] == 2
        assert found["short_convolution_grad"] == 3
    else:
        assert found == whole


def decode_step(rows, kind="mom", **overrides):
    """A step of decoding, and its arguments' shapes, the state the last."""
    config = small(kind, **overrides)
    params, variables = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.eval_shape(lambda p: cast_weights(p, config.dtype, of_embedding=True), params)

    def step(params, variables, tokens, state):
        model = bind(config, params, variables)
        out = model.hidden(tokens, state=state)
        return model.logits(out.hidden), out.state

    state = jax.eval_shape(lambda: bind(config, *init_params(config, jax.random.key(0))).init_state(rows, 160))
    return step, (params, variables, jax.ShapeDtypeStruct((rows, 1), "int32"), state)


@pytest.mark.parametrize(("kind", "mom_layers", "products"), [("mom", 1, 4), ("single_kv", 1, 4), ("hybrid", 2, 4 + 4 + 4)])
def test_decoding_uses_the_kernels(kind, mom_layers, products):
    """Products of a layer, whatever its kind: what its mixer is made of, its output, the MLP in and out."""
    step, arguments = decode_step(3, kind)
    found = kernels(lower(step, *arguments))
    of_memories = ("recurrence_step", "short_convolution_step", "router_step", "combine_step")
    assert found == dict.fromkeys(of_memories, mom_layers) | {"stacked_matmul": products}


@needs_plugin
@pytest.mark.parametrize("rows", [1, 32, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decoding_compiles_and_copies_no_state(rows, dtype):
    """With the widths of the paper's model. Beside its arguments a step in a loop needs little."""
    wide = dict(vocab_size=1000, num_layers=3, hidden_size=1024, num_heads=4, head_dim=256, expand_v=1.0, dtype=dtype)
    step, (params, variables, tokens, state) = decode_step(rows, **wide)

    def loop(params, variables, tokens, state, count):
        def body(carry):
            n, tokens, state = carry
            logits, state = step(params, variables, tokens, state)
            return n + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), state

        return jax.lax.while_loop(lambda carry: carry[0] < count, body, (0, tokens, state))

    compiled = compile_for(H200, loop, (params, variables, tokens, state, jax.ShapeDtypeStruct((), "int32")))
    state_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().temp_size_in_bytes < max(state_bytes / 4, 2**25)
