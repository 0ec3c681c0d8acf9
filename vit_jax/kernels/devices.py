"""What a program is traced for: the devices of the mesh in use, which need not be here."""

import jax


def mesh_device() -> jax.sharding.AbstractDevice | None:
    """The kind of device that a mesh in use (`jax.set_mesh`) is made of, or None."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def device_kind() -> str:
    """JAX's name of the chip: of the mesh in use, else of this machine's."""
    device = mesh_device()
    return (device if device is not None else jax.local_devices()[0]).device_kind
