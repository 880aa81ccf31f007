"""Pallas kernels on the Triton backend, for NVIDIA GPUs: the ops of the other implementations, and what they cannot do."""

from pallas_kernels.device import current_device, spread_reason
from pallas_kernels.triton.cross_entropy import linear_cross_entropy
from pallas_kernels.triton.gated_rms_norm import combine, combine_gated_rms_norm
from pallas_kernels.triton.grouped_matmul import grouped_matmul
from pallas_kernels.triton.recurrence import CHUNK_MATRICES, final_states, gated_delta_rule, linear_attention
from pallas_kernels.triton.short_convolution import short_convolution
from pallas_kernels.triton.stacked_matmul import MOST_ROWS, stacked_matmul
from pallas_kernels.triton.step import combine_step, gated_delta_rule_step, router_step, short_convolution_step

__all__ = [
    "CHUNK_MATRICES", "combine", "combine_gated_rms_norm", "combine_step", "final_states", "gated_delta_rule",
    "gated_delta_rule_step", "grouped_matmul", "linear_attention", "linear_cross_entropy", "router_step",
    "short_convolution", "short_convolution_step", "stacked_matmul", "unsupported_reason",
]  # fmt: skip

# Compute capabilities whose shared memory holds the tiles: H100, H200 (run on an H200), A100 (compiled for it); not 8.6, 8.9
# and 12.0, which have 100 KiB.
CAPABILITIES = ("8.0", "9.0", "10.0", "10.3")


def unsupported_reason(op: str, arrays: dict, *, interpret: bool) -> str | None:
    """Why the kernels cannot run ``op``, given its arguments by their names, here; None if they can."""
    return (None if interpret else _device_reason(arrays)) or _shape_reason(op, arrays)


def _device_reason(arrays: dict) -> str | None:
    platform, _, capability = current_device()
    if platform != "gpu":
        return f"it needs an NVIDIA GPU or interpret=True, and the platform is {platform}"
    if capability not in (*CAPABILITIES, None):
        return f"it needs an NVIDIA GPU of compute capability {', '.join(CAPABILITIES)}; this is {capability}"
    return spread_reason(arrays)


def _shape_reason(op: str, arrays: dict) -> str | None:
    if op == "grouped_matmul":
        sizes = [(name, size) for w in arrays["w"] for name, size in zip("DE", w.shape[1:], strict=True)]
        for name, size in sizes:
            if size % 16:
                return f"{name} is {size}; it must be a multiple of 16"
    if op == "stacked_matmul":
        if arrays["x"].shape[1] % 16:
            return f"D is {arrays['x'].shape[1]}; it must be a multiple of 16"
        ragged = [w.shape[3] for stacks in arrays["weights"] for w in stacks if w.shape[3] % 16 and w.shape[3] > 64]
        if ragged and arrays["x"].shape[0] > 1:
            return f"N is {ragged[0]}; for several rows it must be a multiple of 16, or at most 64"
        if arrays["x"].shape[0] > MOST_ROWS:
            return f"x has {arrays['x'].shape[0]} rows; from {MOST_ROWS + 1} on it would be slower than XLA's products"
    if op == "router_step" and arrays["weight"].shape[2] > 1024:
        return f"M is {arrays['weight'].shape[2]}; it must be at most 1024"
    if op == "short_convolution" and arrays["normalize"] and arrays["x"].shape[-1] & (arrays["x"].shape[-1] - 1):
        return f"K is {arrays['x'].shape[-1]}; with normalize it must be a power of two"
    if op == "short_convolution_step":
        for name, x in arrays["streams"].items():
            if name in arrays["normalized"] and x.shape[-1] & (x.shape[-1] - 1):
                return f"the heads of {name} have {x.shape[-1]} elements; normalized they must be a power of two"
            if arrays["weights"][name].shape[1] == 1:
                return "W is 1: there is no history"
    if op in ("gated_delta_rule", "gated_delta_rule_step", "linear_attention") and arrays["k"].shape[-1] < 16:
        return f"K is {arrays['k'].shape[-1]}; it must be at least 16"
    if op == "gated_delta_rule" and _is_per_key(arrays):
        return "it has no log-decay a key for the delta rule"
    return None


def _is_per_key(arrays: dict) -> bool:
    return arrays["log_decay"] is not None and arrays["log_decay"].ndim == 4
