"""Compilation for TPUs that are not here: a topology's devices, compilation with an answer when memory does not suffice, and
the collectives of a compiled program. libtpu, which compiles, needs no TPU for it."""

import collections
import importlib.metadata
import importlib.util
import math
import os
import re
from datetime import date

import jax
import numpy as np
from jax.experimental import topologies

from mom_jax.config import require

# libtpu would otherwise look for a TPU's host and its neighbours, and refuse a second process.
HERE = {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}

# GiB of HBM of a chip, by Google's documentation of each generation (cloud.google.com/tpu/docs/v4 and so on).
HBM_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 192}
EXAMPLES = "v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:2x4 or tpu7x:2x2x1"
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as "v5e:4x4".

    Raises:
      ModuleNotFoundError: libtpu is not installed. ValueError: there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("libtpu, which compiles for TPUs, is not installed: use make tpu-check, or EXTRA=tpu")
    os.environ.update({name: os.environ.get(name, value) for name, value in HERE.items()})
    jax.config.update("jax_platforms", "cpu")  # compiled for a TPU, run on none
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # libtpu's own types, and jax's
        message = str(error).splitlines()[0]
        require(False, "topology", topology, f"GENERATION:CHIPS such as {EXAMPLES} ({message})")


def hbm_gib(devices: list[jax.Device]) -> float:
    """Of one of the devices, which may be half a chip."""
    chips = {tuple(device.coords) for device in devices}
    return HBM_GIB[devices[0].device_kind] * len(chips) / len(devices)


def versions(device: jax.Device) -> dict:
    """What a report begins with."""
    libtpu = importlib.metadata.version("libtpu")
    return {"device": device.device_kind, "jax": jax.__version__, "libtpu": libtpu, "date": str(date.today())}


def out_of_memory(error: Exception) -> str | None:
    """The compiler's sentence on what did not fit, None if the error is another."""
    found = re.search(r"Ran out of memory in memory space \w+\. Used [^ ]+ of [^ ]+ \w+", str(error))
    return found and found[0]


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """How often each kind of collective runs in a step of a compiled program, and the bytes of their results on a device.

    What is in a loop counts as often as the loop runs: the number that its condition compares with, once if there is none.
    """
    bodies = {}
    for text in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", hlo):
        if name := re.match(r"(ENTRY )?%([\w.\-]+) \(", text):
            bodies["ENTRY" if name[1] else name[2]] = text
    found = {kind: collections.Counter(count=0, bytes=0) for kind in COLLECTIVES}

    def visit(name: str, times: int):
        for line in bodies[name].splitlines()[1:]:
            for kind in COLLECTIVES:
                if result := re.search(rf" = (.*?) {kind}(-start)?\(", line):
                    arrays = [_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", result[1])]
                    # What is started gives its operands, too.
                    found[kind] += {"count": times, "bytes": times * (max(arrays) if result[2] else sum(arrays))}
            loop = re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line)
            if loop:
                limits = re.findall(r"s32\[\][^ ]* constant\((\d+)\)", bodies[loop[1]])
                visit(loop[2], times * (int(limits[0]) if len(limits) == 1 else 1))
            else:
                for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)", line):
                    visit(called, times)

    visit("ENTRY", 1)
    return {kind: dict(counts) for kind, counts in found.items()}


def kernels(hlo: str) -> dict[str, int]:
    """How often each kernel is in the text of a compiled program, XLA's ragged-dot too; a loop's body counts once."""
    calls = [line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = [re.search(r'op_name="[^"]*?(?:(ragged-dot)-(?!metadata)[\w-]+|(\w+)\)*/pallas_call)"', line) for line in calls]
    return dict(collections.Counter(name[1] or name[2] for name in names if name))


def _bytes(dtype: str, shape: str) -> int:
    size = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype.split("e")[0]) or 0) / 8
    return int(size * math.prod(int(n) for n in shape.split(",") if n))


def gib(size: float) -> float:
    return float(np.round(size / 2**30, 3))
