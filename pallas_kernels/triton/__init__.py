"""Pallas kernels on the Triton backend, for NVIDIA GPUs: the ops of the other implementations, and what they cannot do."""

import jax

from pallas_kernels.triton.gated_rms_norm import combine_gated_rms_norm
from pallas_kernels.triton.grouped_matmul import grouped_matmul
from pallas_kernels.triton.recurrence import gated_delta_rule, linear_attention
from pallas_kernels.triton.short_convolution import short_convolution

__all__ = [
    "combine_gated_rms_norm", "gated_delta_rule", "grouped_matmul", "linear_attention", "short_convolution",
    "unsupported_reason",
]  # fmt: skip

MAX_ELEMENTS = 2**31 - 1  # the kernels count elements in int32


def unsupported_reason(op: str, arrays: dict[str, jax.Array | None], *, interpret: bool) -> str | None:
    """Why the kernels cannot run ``op`` on ``arrays``, by the names of its arguments; None if they can."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if not interpret and platform != "gpu":
        return f"it needs an NVIDIA GPU or interpret=True, and the platform is {platform}"
    if mesh.size > 1 and not mesh.are_all_axes_manual:
        return "over several devices it is not yet wrapped in shard_map, without which every device would do all the work"
    if op in ("short_convolution", "combine_gated_rms_norm"):
        elements = arrays["x"].size
    elif op == "grouped_matmul":
        sizes = {"D": arrays["w"].shape[1], "E": arrays["w"].shape[2]}
        for name, size in sizes.items():
            if size % 16:
                return f"{name} is {size}; it must be a multiple of 16"
        elements = arrays["segments"].lengths.shape[0] * arrays["num_slots"] * max(sizes.values())
    else:
        (batch, num_slots, heads, key_width), value_width = arrays["k"].shape, arrays["v"].shape[-1]
        if key_width < 16:
            return f"K is {key_width}; it must be at least 16"
        if op == "gated_delta_rule" and arrays["log_decay"] is not None and arrays["log_decay"].ndim == 4:
            return "it has no log-decay a key for the delta rule"
        elements = batch * num_slots * heads * max(value_width * key_width // 64, value_width, key_width)
    if elements > MAX_ELEMENTS:
        return f"its largest array would have {elements:,} elements; it can count up to {MAX_ELEMENTS:,}"
    return None
