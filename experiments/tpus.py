"""Compilation for TPUs that are not here: a topology's devices, and an answer when memory does not suffice. libtpu, which
compiles, needs no TPU for it."""

import importlib.metadata
import importlib.util
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


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as "v5e:4x4".

    Raises:
      ModuleNotFoundError: libtpu is not installed. ValueError: there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "libtpu, which compiles for TPUs, is not installed here: make .venv-tpu/installed (221 MB, needs no TPU), then "
            "the same with .venv-tpu/bin/python"
        )
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


def gib(size: float) -> float:
    return float(np.round(size / 2**30, 3))
