"""Other packages' implementations, which the benchmarks set beside ours where they are installed.

    fla    flash-linear-attention (PyTorch, Triton)
    jla    jax-linear-attention (JAX, Mosaic GPU kernels for Hopper)
"""

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timing, milliseconds

from pallas_kernels.api import Segments

# The modules of each.
PEERS = {"fla": ("torch", "triton", "fla"), "jla": ("jla",)}
# What each calls a sequence op, by its name and kind of decay here.
SEQUENCE_OPS = {
    ("gated_delta_rule", "head"): {"fla": "chunk_gated_delta_rule", "jla": "gated_deltanet"},
    ("linear_attention", "head"): {"fla": "chunk_simple_gla", "jla": "simple_gla"},
    ("linear_attention", "key"): {"fla": "chunk_gla", "jla": "gla"},
}


def installed() -> tuple[str, ...]:
    return tuple(name for name, modules in PEERS.items() if all(map(find_spec, modules)))


def versions() -> dict[str, str]:
    """The versions of the installed peers' modules."""
    packages = metadata.packages_distributions()
    modules = [module for name in installed() for module in PEERS[name]]
    return {module: metadata.version(packages[module][0]) for module in modules if module in packages}


def jla_recurrence(op: str, decay: str, arrays: tuple, segments: Segments) -> tuple[jax.Array, jax.Array]:
    """o, and the state after each row's last segment [B, 1, H, K, V]: it gives no others. Rows of several are packed."""
    from jla.ops import linear_attention

    (q, k, v, *gates), num_slots = arrays, arrays[0].shape[1]
    o, state = linear_attention(
        SEQUENCE_OPS[op, decay]["jla"], q, k, v, **dict(zip(("g", "beta"), gates, strict=False)),
        segment_ids=segments.segment_of(num_slots) if segments.num_segments > 1 else None,
        output_final_state=True, impl="mosaic_gpu",
    )  # fmt: skip
    return o, state[:, None]


def fla_recurrence(op: str, decay: str, arrays: tuple, segments: Segments, cotangents: tuple) -> tuple[Callable, Callable]:
    """Functions for outputs, and for outputs and gradients. Rows of several segments (full ones) become a single row."""
    import fla.ops
    import torch

    function = getattr(fla.ops, SEQUENCE_OPS[op, decay]["fla"])
    batch, num_segments = segments.lengths.shape
    cu_seqlens, rows = None, batch
    if num_segments > 1:
        cu_seqlens, rows = torch.tensor(np.cumsum([0, *np.ravel(segments.lengths)]), device="cuda"), 1
    arrays, cotangents = [to_torch(a).requires_grad_() for a in arrays], [to_torch(a) for a in cotangents]

    def forward():
        packed = [a.reshape(rows, -1, *a.shape[2:]) for a in arrays]
        o, states = function(*packed, output_final_state=True, cu_seqlens=cu_seqlens)
        return o.reshape(batch, -1, *o.shape[2:]), states.reshape(batch, num_segments, *states.shape[1:])

    def with_gradients():
        outputs = forward()
        return outputs, torch.autograd.grad(outputs, arrays, cotangents)

    return forward, with_gradients


def to_torch(a: jax.Array):
    import torch

    dtype = torch.bfloat16 if a.dtype == jnp.bfloat16 else torch.float32
    return torch.tensor(np.asarray(a, np.float32)).to("cuda", dtype)


def torch_results(forward: Callable, with_gradients: Callable) -> tuple:
    """As arrays: the outputs and the gradients; only the outputs where gradients are refused."""
    try:
        results = with_gradients()
    except RuntimeError:
        results = (forward(),)
    return jax.tree.map(lambda x: x.detach().float().cpu().numpy(), results)


def time_torch(timing: Timing, forward: Callable, with_gradients: Callable) -> dict:
    """Times, and the peak GiB with gradients over what was held before; None where gradients are refused."""
    import torch

    def wait(_):
        torch.cuda.synchronize()

    def both():
        with_gradients()  # returns nothing: the results of the call before would count as GiB

    figures = {"forward_ms": milliseconds(timing, torch.no_grad()(forward), wait=wait), "ms": None, "gib": None}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        figures["ms"] = milliseconds(timing, both, wait=wait)
        figures["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    except RuntimeError as error:
        print(f"fla with gradients: {error}")
    return figures
