"""The TPU's kernels: against the reference over the whole table of cases, in the interpreter but on a TPU, and lowered.

What test_api.py holds of every implementation (pieces, rubbish in dead slots, empty segments, grouped matmul) it holds of
this one too.
"""

import collections
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from models import small
from numerics import LIMITS, assert_close
from test_api import BFLOAT16_CASES, OPS, options, run_op
from test_triton_lowering import model_gradient, op_with_gradients

from mom_jax.config import MeshConfig
from pallas_kernels import api
from pallas_kernels.api import Segments
from pallas_kernels.mosaic_tpu import recurrence

KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


@pytest.mark.parametrize(("op", "case"), list(itertools.product(OPS, CASES)), ids=str)
def test_matches_reference_in_float32(op, case):
    inputs = make_inputs(case)
    actual = run_op(op, inputs, "mosaic_tpu")
    assert_close(actual, run_op(op, inputs, "reference"), LIMITS["float32"], f"{op} {case}")


@pytest.mark.parametrize(("op", "case"), list(itertools.product(OPS, BFLOAT16_CASES)), ids=str)
def test_matches_reference_in_bfloat16(op, case):
    inputs = make_inputs(case, dtype=jnp.bfloat16)
    actual = run_op(op, inputs, "mosaic_tpu")
    assert_close(actual, run_op(op, inputs, "reference"), LIMITS["bfloat16"], f"{op} {case}")


def test_slots_before_the_first_segment():
    """Chunks that nobody owns, at both ends of a row and a whole row of them: the states pass by."""
    inputs = make_inputs(Case("between", ((70, 60, 0), (0, 0, 1)), initial_state=True, spare=128))
    lengths = jnp.array([[70, 60, 0], [0, 0, 0]])
    inputs["segments"] = Segments(jnp.array([[64, 192, 256, 256], [64, 64, 64, 64]]), lengths)
    actual = run_op("gated_delta_rule", inputs, "mosaic_tpu")
    assert_close(actual, run_op("gated_delta_rule", inputs, "reference"), LIMITS["float32"])


def test_in_a_model_of_the_memory_of_a_tpu(monkeypatch):
    """Pallas's own model of a TPU: blocks are copied as the pipeline does, and what nobody has written is NaN."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    forward = recurrence._forward
    op = jax.custom_vjp(lambda *args: forward(*args, save=False)[0], nondiff_argnums=(0,))
    op.defvjp(forward, recurrence._backward)  # optimize_remat refuses the callbacks of which the model is made
    monkeypatch.setattr(recurrence, "_recurrence", lambda options, *args: op(options._replace(interpret=params), *args))
    inputs = make_inputs(Case("ragged", ((70, 3, 0),), heads=1, runs=True, initial_state=True, spare=64))
    actual = run_op("gated_delta_rule", inputs, "mosaic_tpu")
    assert_close(actual, run_op("gated_delta_rule", inputs, "reference"), LIMITS["float32"])


def test_rematerialised_gradients_are_the_same():
    inputs = make_inputs(Case("whole", 130))
    arrays = [inputs[name] for name in ("q", "k", "v", "log_decay", "beta")]

    def loss(*arrays):
        o, state = api.gated_delta_rule(*arrays, **options("mosaic_tpu"))
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state))

    expected, actual = (jax.jit(jax.grad(f, argnums=range(5)))(*arrays) for f in (loss, jax.checkpoint(loss)))
    assert_close(actual, expected, LIMITS["float32"])


def on(kind: str, **mesh: int):
    """A context in which is computed for devices of this kind."""
    device, sizes = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu"), dataclasses.asdict(MeshConfig(**mesh))
    types = (AxisType.Auto,) * len(sizes)
    return use_abstract_mesh(AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types, abstract_device=device))


def arrays_of(decay="head", key=256, value=256):
    shape = (1, 64, 2)
    decay = {None: None, "head": jnp.zeros(shape), "key": jnp.zeros((*shape, key))}[decay]
    return {"k": jnp.zeros((*shape, key)), "v": jnp.zeros((*shape, value)), "log_decay": decay}


def test_it_says_where_it_cannot_run():
    def reason(op="gated_delta_rule", **shapes):
        return api.unsupported_reason(op, "mosaic_tpu", arrays_of(**shapes))

    assert "needs a TPU or interpret=True" in reason()
    for kind in KINDS:
        with on(kind):
            assert reason() is None
            assert ("TPU v4" in (reason(decay="key") or "")) == (kind == "TPU v4")
            assert ("K * V is 327680" in (reason(value=1280) or "")) == (kind == "TPU v4")
            assert "has no short_convolution" in reason("short_convolution")
    with on("TPU v3"):
        assert "this is TPU v3" in reason()
    with on("TPU v5", data=2):
        assert "inside of shard_map only" in reason()


def lowered(function, *arguments, kind="TPU v5") -> tuple[str, collections.Counter]:
    """The program, and how often each kernel is called in it."""
    with on(kind):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    return text, collections.Counter(re.findall(r'@tpu_custom_call\(.*kernel_name = "(\w+)"', text))


@pytest.mark.parametrize(("op", "decay"), [(OPS[0], "key"), (OPS[0], None), (OPS[1], "head")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recurrences_lower(op, decay, dtype):
    """For the newest generation; compiled for all by experiments/compile_kernels_for_tpu.py."""
    function, arguments = op_with_gradients(op, decay, dtype, 128, 256, implementation="mosaic_tpu")
    _, found = lowered(function, *arguments, kind="TPU7x")
    assert found == {"recurrence": 1, "recurrence_grad": 1}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_model_uses_the_kernels(remat):
    """None chooses them for a TPU in both passes, and every product of memories' weights is one ragged_dot."""
    gradient, arguments = model_gradient(small(num_layers=1, remat=remat))
    text, found = lowered(gradient, *arguments)
    times = 1 if remat == "none" else 2  # the backward pass computes the forward pass again
    assert found == {"recurrence": times, "recurrence_grad": 1}
    products = 2  # keys and values; each with the gradients of x and of the weights
    assert text.count('"chlo.ragged_dot"(') == products * (times + 2)


def test_grouped_matmul_of_unused_chunks_is_zero():
    """Rows in no group hold what ragged_dot pleases."""
    segments = Segments(jnp.array([[64, 128, 192]]), jnp.array([[3, 64]]))
    x, w = jnp.full((1, 320, 16), jnp.nan).at[:, 64:192].set(1.0), jnp.ones((2, 16, 16))
    y = np.asarray(api.grouped_matmul(x, w, segments, **options("mosaic_tpu")))[0, :, 0]
    assert (y[:64] == 0).all() and (y[67:128] == 0).all() and (y[192:] == 0).all()
    assert (y[64:67] == 16).all() and (y[128:192] == 16).all()
