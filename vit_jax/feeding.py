"""How the examples of each process become global batches on a mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.feed import Feed
from vit_jax.sharding import batch_sharding, num_batch_parts


def make_feed(mesh: Mesh, process: int | None = None) -> Feed:
    """What a process brings for a mesh.

    Args:
      mesh: of `make_mesh`.
      process: its index; None for this one.
    """
    process = jax.process_index() if process is None else process
    parts = mesh.devices.reshape(num_batch_parts(mesh), -1)
    mine = [any(device.process_index == process for device in part) for part in parts]
    return Feed(tuple(np.flatnonzero(mine).tolist()), len(parts))


def pad_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """Zeros (`mask` False) behind the last example, until this process's devices divide them."""
    missing = -len(batch["mask"]) % len(make_feed(mesh).parts)
    if not missing:
        return batch
    return {k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's slots, in the order of `Feed.slots`, as part of the global batch."""
    feed, sharding = make_feed(mesh), batch_sharding(mesh)

    def put(value: np.ndarray) -> jax.Array:
        size = len(value) // len(feed.parts)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            at = size * feed.parts.index((index[0].start or 0) // size)
            return value[at : at + size]

        shape = (size * feed.num_parts, *value.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(value) for name, value in batch.items()}


def put_parts(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The same as global arrays [parts, batch / parts, …]: a part each device, as pmap wants it."""
    count = len(make_feed(mesh).parts)
    return put_batch({k: v.reshape(count, -1, *v.shape[1:]) for k, v in batch.items()}, mesh)
