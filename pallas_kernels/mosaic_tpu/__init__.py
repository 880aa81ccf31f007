"""The implementation for TPUs: Pallas kernels compiled by Mosaic, and XLA's own grouped matmul."""

from pallas_kernels.device import current_device, spread_reason
from pallas_kernels.handover import final_states_of
from pallas_kernels.mosaic_tpu.grouped_matmul import grouped_matmul
from pallas_kernels.mosaic_tpu.recurrence import gated_delta_rule, linear_attention

OPS = ("gated_delta_rule", "grouped_matmul", "linear_attention")
__all__ = ["final_states", "gated_delta_rule", "grouped_matmul", "linear_attention", "unsupported_reason"]

final_states = final_states_of(gated_delta_rule)

# Generations for which the kernels are compiled (v4, v5e, v5p, v6e, 7x). All but the v4 have 64 MiB of VMEM or more.
KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


def unsupported_reason(op: str, arrays: dict, *, interpret: bool) -> str | None:
    """Why ``op``, given its arguments by their names, cannot run here; None if it can."""
    if op not in OPS:
        return f"it has no {op}: its ops are {', '.join(OPS)}"
    if interpret:
        return None
    platform, kind, _ = current_device()
    if platform != "tpu":
        return f"it needs a TPU or interpret=True, and the platform is {platform}"
    if kind not in KINDS:
        return f"it needs one of {', '.join(KINDS)}; this is {kind}"
    return spread_reason(arrays) or (_small_vmem_reason(op, arrays) if kind == "TPU v4" else None)


def _small_vmem_reason(op: str, arrays: dict) -> str | None:
    if op == "grouped_matmul":
        return None
    if arrays["log_decay"] is not None and arrays["log_decay"].ndim == 4:
        return "a log-decay a key needs more than the 16 MiB of VMEM that a TPU v4 has"
    size = arrays["k"].shape[-1] * arrays["v"].shape[-1]
    return f"K * V is {size}; on a TPU v4, with 16 MiB of VMEM, it must be at most {2**17}" if size > 2**17 else None
