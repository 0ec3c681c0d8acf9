"""The mesh, and what lies where on it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(*, data: int = -1, devices: list | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      data: size of the axis that the batch is split over; -1 takes all devices.
      devices: those of the job by default.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data}
    if -1 in sizes.values():
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes = {k: len(devices) // known if v == -1 else v for k, v in sizes.items()}
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        raise ValueError(
            f"mesh {sizes} does not multiply to the {len(devices)} devices; use -1 for one axis."
        )
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError, with the nearest size that works, unless the devices divide the batch."""
    devices = mesh.shape["data"]
    if batch_size < 1 or batch_size % devices:
        near = max(round(batch_size / devices), 1) * devices
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {devices} devices; try {near}."
        )


def pad_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """Zeros (`mask` False) behind the last example, until this process's devices divide them."""
    devices = mesh.shape["data"] // jax.process_count()
    missing = -len(batch["mask"]) % devices
    if not missing:
        return batch
    return {k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's contiguous slots as part of the global batch, on the devices."""
    sharding = batch_sharding(mesh)
    put: Any = jax.make_array_from_process_local_data
    return {name: put(sharding, value) for name, value in batch.items()}
