"""Which device is computed for, and where a Pallas kernel cannot run because of how work is spread over devices."""

import jax


def current_device() -> tuple[str, str, str | None]:
    """Platform, kind and compute capability of the device that is computed or compiled for.

    The capability is None for what is no NVIDIA GPU, or is compiled for without being here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:  # a mesh knows the kind only; its capability is that of the devices of this kind here
        device = next((here for here in jax.devices() if here.device_kind == device.device_kind), device)
    else:
        device = jax.config.jax_default_device
        device = device if isinstance(device, jax.Device) else jax.devices(device)[0]
    return device.platform, device.device_kind, getattr(device, "compute_capability", None)


def spread_reason(arrays: dict) -> str | None:
    """Why a kernel, which XLA cannot split over devices, cannot take ``arrays`` under the mesh in use; None if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and not mesh.are_all_axes_manual:
        return "over several devices it runs inside of shard_map only: outside every device would do all the work"
    if any(getattr(jax.typeof(x), "vma", None) for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)):
        return "inside shard_map it needs check_vma=False"
    return None
