"""Compiles every kernel for TPUs, and the plain JAX of the same ops, forward and backward, on a machine without a TPU.

    python experiments/compile_kernels_for_tpu.py          CPU, libtpu; v4, v5e, v5p, v6e and 7x; 12 minutes on two cores

For each generation: gated_delta_rule, linear_attention and grouped_matmul with all their gradients, over ragged segments
with runs and initial states, in float32 and bfloat16, widths of 64, 128 and 256, with no, a head's and a key's decay.
libtpu refuses what exceeds VMEM and what Mosaic cannot do; nothing runs, so that speed and numbers are not seen (numbers
are: in the interpreter, tests/test_mosaic_tpu.py). Expected: all "compiled", except that a v4 has no kernel of decays a
key, and says so. It ends with status 1 where anything else is refused. make tpu-check installs libtpu first.
"""

import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from cli import run
from hlo import kernels
from timing import settings_of, write_report
from tpus import topology_devices, versions

from mom_jax.config import require
from pallas_kernels import api
from pallas_kernels.api import Segments

BATCH, SLOTS, HEADS, SEGMENTS = 2, 256, 4, 3
RECURRENCES = ("gated_delta_rule", "linear_attention")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class CompileKernelsForTPU:
    """What to compile, and for which TPUs."""

    topologies: tuple[str, ...] = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
    """A topology of each generation, of which one device is compiled for."""
    widths: tuple[int, ...] = (64, 128, 256)
    """K and V of a head; D and E of the grouped matmul are four times the largest."""
    output: str = "runs/compile_kernels_for_tpu"
    """Directory of the report."""

    def __post_init__(self):
        for name in ("topologies", "widths"):
            require(bool(getattr(self, name)), name, getattr(self, name), "there must be at least one")


def works(widths: tuple[int, ...]) -> list[dict]:
    """What is compiled: kernels of all widths with a head's decay; the largest with others, and in plain JAX."""
    largest = max(widths)
    recurrences = [
        (op, "mosaic_tpu", dtype, "head", width) for op in RECURRENCES for dtype in DTYPES for width in widths
    ]  # fmt: skip
    recurrences += [("gated_delta_rule", "mosaic_tpu", "bfloat16", "none", largest)]
    recurrences += [(op, "mosaic_tpu", "bfloat16", "key", largest) for op in RECURRENCES]
    recurrences += [(op, "chunked", "bfloat16", "head", largest) for op in RECURRENCES]
    matmuls = [("mosaic_tpu", "float32"), ("mosaic_tpu", "bfloat16"), ("chunked", "bfloat16")]
    found = recurrences + [("grouped_matmul", name, dtype, "none", 4 * largest) for name, dtype in matmuls]
    return [dict(zip(("op", "implementation", "dtype", "decay", "width"), values, strict=True)) for values in found]


def function_of(work: dict):
    """A function that gives the results and all gradients, and the shapes of its arguments."""
    width, dtype = work["width"], work["dtype"]
    array = jax.ShapeDtypeStruct
    segments = Segments(array((BATCH, SEGMENTS + 1), jnp.int32), array((BATCH, SEGMENTS), jnp.int32))
    options = {"segments": segments, "run_ids": array((BATCH, SLOTS), jnp.int32)}
    if work["op"] == "grouped_matmul":
        x, w = array((BATCH, SLOTS, width), dtype), array((SEGMENTS, width, width), dtype)
        arrays, options = {"x": x, "w": (w, w)}, {"segments": segments}
    else:
        values, gate = array((BATCH, SLOTS, HEADS, width), dtype), array((BATCH, SLOTS, HEADS), jnp.float32)
        decay = {"none": None, "head": gate, "key": array(values.shape, jnp.float32)}[work["decay"]]
        state = array((BATCH, SEGMENTS, HEADS, width, width), jnp.float32)
        arrays = {"q": values, "k": values, "v": values, "log_decay": decay, "initial_state": state}
        arrays |= {"beta": gate} if work["op"] == "gated_delta_rule" else {}
    op = partial(getattr(api, work["op"]), implementation=work["implementation"])

    def outputs(arrays, options):
        return op(**arrays, **options)

    def function(arrays, options, cotangents):
        results, pull = jax.vjp(lambda arrays: outputs(arrays, options), arrays)
        return results, pull(cotangents)

    return function, (arrays, options, jax.eval_shape(outputs, arrays, options))


def compile_work(work: dict, device: jax.Device) -> dict:
    """Whether it compiles, or why not; with the kernels that are found in the program."""
    mesh = jax.make_mesh((1,), ("one",), devices=[device], axis_types=(jax.sharding.AxisType.Auto,))
    here = jax.sharding.SingleDeviceSharding(device)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            function, arguments = function_of(work)
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
            found = kernels(jax.jit(function).lower(*arguments).compile().as_text())
    except NotImplementedError as error:  # what the implementation itself says that it cannot do
        return {"result": f"unsupported: {str(error).split(': ')[-1]}", "seconds": None, "kernels": {}}
    except jax.errors.JaxRuntimeError as error:
        return {"result": f"refused: {str(error).splitlines()[0]}", "seconds": None, "kernels": {}}
    expected = {}
    if work["implementation"] == "mosaic_tpu":
        # Two products, each with the gradients of x and w.
        expected = {"ragged-dot": 6} if work["op"] == "grouped_matmul" else {"recurrence": 1, "recurrence_grad": 1}
    result = "compiled" if found == expected else f"wrong kernels: {found}, expected {expected}"
    return {"result": result, "seconds": round(time.perf_counter() - start, 1), "kernels": found}


def main(config: CompileKernelsForTPU) -> dict:
    rows, columns = [], ("topology", "op", "implementation", "dtype", "decay", "width", "result", "seconds")
    name = "_".join(["kernels", *(topology.split(":")[0] for topology in config.topologies)])
    for topology in config.topologies:
        device = topology_devices(topology)[0]
        figures = versions(device) | {"device": "TPUs, compiled only", "settings": settings_of(config), "programs": rows}
        for work in works(config.widths):
            rows.append({"topology": topology} | work | compile_work(work, device))
            print(*(rows[-1][name] for name in columns), flush=True)
        # After each, so that a run that is cut off leaves what it has seen.
        lines = [f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows]
        write_report(config.output, name, figures, columns, lines)
    refused = sum(row["result"] != "compiled" and not _lacks_vmem(row) for row in rows)
    print(f"{sum(row['result'] == 'compiled' for row in rows)} of {len(rows)} programs compiled")
    if refused:
        raise ValueError(f"{refused} programs were refused: see the report in {config.output}")
    return figures


def _lacks_vmem(row: dict) -> bool:
    """Whether it is said beforehand that the small VMEM of a v4 does not hold it."""
    return row["topology"].startswith("v4:") and row["decay"] == "key" and row["result"].startswith("unsupported: ")


if __name__ == "__main__":
    run(CompileKernelsForTPU, main, __doc__)
