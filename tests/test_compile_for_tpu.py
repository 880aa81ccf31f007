"""Compilation for TPUs: what is read out of a compiled program, the settings, and, where libtpu is, kernels and a step."""

import importlib.util

import compile_for_tpu
import compile_kernels_for_tpu
import hlo
import jax
import pytest
import tpus
from compile_for_tpu import CompileForTPU
from models import small

from mom_jax.config import MeshConfig, TrainConfig
from mom_jax.sharding import make_mesh

has_libtpu = importlib.util.find_spec("libtpu") is not None

# Layouts, attributes and so on as libtpu prints them, shortened.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%condition.2 (p: (s32[], f32[4])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(24), backend_config={"flag_configs":[]}
  ROOT %lt = pred[]{:T(256)} compare(%n, %constant.3), direction=LT
}

%body.4 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %gather = bf16[1,2048,4,256]{3,2,0,1:T(4,128)(2,1)} all-gather(%w), replica_groups=mesh['fsdp'=4] {'fsdp'}
  %kernel = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="a/recurrence/pallas_call"}
  ROOT %all = (f32[4]{0:T(128)}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add.1
}

%fused.5 (p: f32[4]) -> f32[4] {
  ROOT %scattered = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add.1
  %one = f32[4]{0} all-reduce(%p), replica_groups=mesh['data'=1,'fsdp'=4] {'data'}, to_apply=%add.1
}

%all-reduce-scatter.3 (p: f32[8]) -> f32[2] {
  %sum = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add.1
  ROOT %own = f32[2]{0:T(128)S(1)} dynamic-slice(%sum, %place), dynamic_slice_sizes={2}
}

ENTRY %main.6 (p: f32[4]) -> f32[4] {
  %fused = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %loop = (s32[], f32[4]{0}) while(%tuple), condition=%condition.2, body=%body.4, metadata={op_name="jit(step)/while"}
  %fusion = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused.5
  %kernel.1 = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="b/recurrence/pallas_call"}
  %dot = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="c/ragged-dot-none"}
  %g = f32[4] custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="t(jvp(recurrence_grad))/pallas_call"}
  %start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  ROOT %done = f32[4]{0} collective-permute-done(%start)
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    found = {kind: (x["count"], x["bytes"]) for kind, x in compile_for_tpu.totals(PROGRAM).items() if x["count"]}
    assert found == {
        "all-gather": (24, 24 * 2 * 2048 * 4 * 256), "all-reduce": (24, 24 * 20), "reduce-scatter": (2, 16 + 8),
        "collective-permute": (1, 16),
    }  # fmt: skip


def test_kernels_are_found_by_name():
    assert hlo.kernels(PROGRAM) == {"recurrence": 2, "ragged-dot": 1, "recurrence_grad": 1}


def test_what_is_not_given_comes_from_the_topology():
    config = compile_for_tpu.completed(CompileForTPU(train=TrainConfig(accumulation=2)), 8)
    assert (config.mesh, config.batch_size) == (MeshConfig(fsdp=8), 16)
    with pytest.raises(ValueError, match="number of mesh devices = 4 is not allowed: v5p:2x2x2 has 8"):
        compile_for_tpu.completed(CompileForTPU(mesh=MeshConfig(fsdp=4)), 8)
    with pytest.raises(ValueError, match="batch_size = 12 is not allowed: it must be a multiple of .* = 8"):
        compile_for_tpu.completed(CompileForTPU(batch_size=12), 8)
    with pytest.raises(ValueError, match="batch_size = 0"):
        CompileForTPU(batch_size=0)


def test_a_mesh_of_other_devices():
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(data=2, memory=2), devices=devices)
    assert set(mesh.devices.flat) == set(devices)
    with pytest.raises(ValueError, match="there are 4 devices"):
        make_mesh(MeshConfig(data=8), devices=devices)


def test_every_op_is_compiled_with_every_decay():
    works = compile_kernels_for_tpu.works((64, 128))
    kernels = {(work["op"], work["decay"], work["width"]) for work in works if work["implementation"] == "mosaic_tpu"}
    for op in ("gated_delta_rule", "linear_attention"):
        assert {(op, "head", 64), (op, "head", 128), (op, "key", 128)} <= kernels
    for work in {work["op"]: work for work in works}.values():  # their arguments fit the ops
        function, arguments = compile_kernels_for_tpu.function_of(work | {"implementation": "chunked"})
        jax.eval_shape(function, *arguments)


@pytest.mark.skipif(has_libtpu, reason="libtpu is there; make test runs it where there is none")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match="make .venv-tpu/installed"):
        tpus.topology_devices("v5e:2x2")


@pytest.mark.skipif(not has_libtpu, reason="needs libtpu: make tpu-check runs it")
def test_a_step_compiles_and_bad_topologies_are_named(tmp_path):
    with pytest.raises(ValueError, match="topology = 'v9:2x2' is not allowed: GENERATION:CHIPS"):
        tpus.topology_devices("v9:2x2")
    work = {"op": "gated_delta_rule", "implementation": "mosaic_tpu", "dtype": "float32", "decay": "head", "width": 64}
    assert compile_kernels_for_tpu.compile_work(work, tpus.topology_devices("v5e:2x2")[0])["result"] == "compiled"
    model = small(num_layers=1, hidden_size=128, head_dim=64, expand_v=1.0)
    figures = compile_for_tpu.main(
        CompileForTPU("v5e:2x2", model, MeshConfig(data=2, fsdp=2), sequence_length=128, output=str(tmp_path))
    )
    assert figures["fits"] and figures["kernels"]["recurrence_grad"] == 1
    assert figures["collectives"]["all-gather"]["bytes"] > 0 and (tmp_path / "train_step_v5e_2x2.md").exists()
