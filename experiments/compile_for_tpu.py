"""Compiles the whole sharded training step of a model for TPUs, on a machine without one, and says what it would take.

    python experiments/compile_for_tpu.py --topology v5p:2x2x2 --preset mom_1_3b        CPU, libtpu; 4 minutes on two cores
    python experiments/compile_for_tpu.py --topology v5e:4x4 --preset mom_1_3b --batch-size 16

Prints, for each device: bytes of the arguments (parameters, optimiser, batch), temporaries and results, whether they fit
into its HBM, the collectives of the compiled program by kind with their number and bytes in a step, and the kernels in it.
It ends with status 1 where it does not fit. libtpu compiles as it would on a TPU and refuses what exceeds HBM or VMEM;
nothing runs, so that speed and numbers are not seen. Expected figures: docs/results/README.md. make tpu-check installs
libtpu first.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from cli import run
from hlo import KINDS, collectives, kernels
from timing import settings_of, write_report
from tpus import gib, hbm_gib, out_of_memory, topology_devices, versions

from mom_jax.config import MeshConfig, ModelConfig, TrainConfig, require
from mom_jax.sharding import make_mesh, spec, use_mesh
from mom_jax.training import abstract_state, jit_step, make_train_step


@dataclass(frozen=True)
class CompileForTPU:
    """What to compile, and for which TPUs."""

    topology: str = "v5p:2x2x2"
    """Generation and chips: v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:2x4, tpu7x:2x2x1 and so on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The mesh, of all devices of the topology; all axes 1: fsdp over all of them."""
    train: TrainConfig = field(default_factory=TrainConfig)
    batch_size: int | None = None
    """Rows in a step, a multiple of mesh.data * mesh.fsdp * train.accumulation; None: as many as that."""
    sequence_length: int = 2048
    """T, tokens in a row."""
    output: str = "runs/compile_for_tpu"
    """Directory of the report."""

    def __post_init__(self):
        for name in ("batch_size", "sequence_length"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "it must be positive")


def completed(config: CompileForTPU, count: int) -> CompileForTPU:
    """With the mesh and the rows that are meant where none are given, for this number of devices."""
    mesh = config.mesh if config.mesh != MeshConfig() else MeshConfig(fsdp=count)
    used = math.prod(dataclasses.astuple(mesh))
    require(used == count, "the number of mesh devices", used, f"{config.topology} has {count}, all of which must be used")
    rows = mesh.data * mesh.fsdp * config.train.accumulation
    batch_size = config.batch_size or rows
    allowed = f"it must be a multiple of mesh.data * mesh.fsdp * train.accumulation = {rows}"
    require(batch_size % rows == 0, "batch_size", batch_size, allowed)
    allowed = f"it must be a multiple of mesh.sequence = {mesh.sequence}"
    require(config.sequence_length % mesh.sequence == 0, "sequence_length", config.sequence_length, allowed)
    return dataclasses.replace(config, mesh=mesh, batch_size=batch_size)


def compile_step(config: CompileForTPU, devices: list[jax.Device]):
    """The compiled training step."""
    mesh = make_mesh(config.mesh, config.model, devices)
    with use_mesh(mesh):
        state = abstract_state(config.model, config.train, mesh)
        place = jax.NamedSharding(mesh, spec("bt"))
        tokens = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32, sharding=place)
        step = jit_step(make_train_step(config.model, config.train), config.model, config.train, mesh)
        return step.lower(state, {"tokens": tokens, "targets": tokens}).compile()


def totals(hlo: str) -> dict[str, dict[str, int]]:
    """How often each kind of collective runs in a step, and the bytes of their results on a device."""
    found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for collective in collectives(hlo):
        found[collective.kind]["count"] += collective.times
        found[collective.kind]["bytes"] += collective.times * sum(collective.bytes)
    return found


def main(config: CompileForTPU) -> dict:
    devices = topology_devices(config.topology)
    config, hbm = completed(config, len(devices)), hbm_gib(devices)
    figures = versions(devices[0]) | {"settings": settings_of(config), "devices": len(devices), "hbm_gib": hbm}
    start = time.perf_counter()
    try:
        step = compile_step(config, devices)
    except jax.errors.JaxRuntimeError as error:
        figures["refused"] = out_of_memory(error)
        if figures["refused"] is None:
            raise
    figures["compile_seconds"] = round(time.perf_counter() - start, 1)
    lines = [f"| topology, devices | {config.topology}, {len(devices)} |"]
    lines += [f"| rows, tokens a row | {config.batch_size}, {config.sequence_length} |"]
    if "refused" in figures:
        figures["fits"] = False
        lines += [f"| refused | {figures['refused']} |"]
    else:
        memory, hlo = step.memory_analysis(), step.as_text()
        sizes = {
            "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes, "results in place of arguments": memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        }  # fmt: skip
        total = sum(sizes.values()) - 2 * sizes["results in place of arguments"]
        figures |= {"bytes": sizes | {"total": total}, "fits": total <= hbm * 2**30}
        figures |= {"collectives": totals(hlo), "kernels": kernels(hlo)}
        lines += [f"| {name}, GiB a device | {gib(size)} |" for name, size in figures["bytes"].items()]
        lines += [
            f"| {kind} | {found['count']}, {gib(found['bytes'])} GiB |" for kind, found in figures["collectives"].items()
        ]
        lines += [f"| kernel {name} | {count} |" for name, count in figures["kernels"].items()]
    lines += [f"| fits into {hbm:g} GiB | {'yes' if figures['fits'] else 'no'} |"]
    lines += [f"| seconds of compilation | {figures['compile_seconds']} |"]
    print("\n".join(lines))
    name = f"train_step_{config.topology.replace(':', '_')}"
    write_report(config.output, name, figures, ("of the training step", "figure"), lines)
    if not figures["fits"]:
        raise ValueError(f"the step does not fit into the {hbm:g} GiB of a {devices[0].device_kind}")
    return figures


if __name__ == "__main__":
    run(CompileForTPU, main, __doc__)
