"""The mesh, and what lies where on it.

A config's mesh has four axes. The batch is split over `replica`, `data` and `fsdp`; parameters,
optimiser state and averages over `fsdp` (ZeRO-3, Rajbhandari et al. 2020, section 5.3) and `tensor`
(Shoeybi et al. 2019, section 3), by the table PLACEMENTS. Models know nothing of it.

A large `fsdp` over the chips of a torus is two axes, the second of them `fsdp_z`. Over a line or a
plane the TPU compiler gathers and scatters; over all three sides, or where a part would be less
than a tile, it sums whole matrices, which sends twice the bytes. So parameters are gathered along
one axis after the other, most of their bytes along the first.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from vit_jax.tree import STACKED, map_named, named_leaves

AXES = ("replica", "data", "fsdp", "fsdp_z", "tensor")
CONFIG_AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = AXES[:4]
FSDP_AXES = ("fsdp", "fsdp_z")
HOST_MEMORY = "pinned_host"
MAX_FSDP = 64  # parts of 1,024 rows that are still 16 rows, a tile of bfloat16

# The first row whose regex is found in an array's name says for its last dimensions which mesh
# axes each is split over. Products that are split by columns come before those split by rows, so
# that one sum over `tensor` follows each pair. The fused qkv projection holds queries, keys and
# values side by side: a tensor axis on its columns would cut through them and not between heads, so
# its rows are split, and what each device gets for the product is its heads' columns. `fsdp` splits
# the rows of every matrix: of large ones (ViT-22B) the compiler sums columns whole.
PLACEMENTS = (
    (r"/(attn/)?(qkv|kv)/kernel$", (("fsdp", "tensor"), ("fsdp_z",))),
    (r"/mlp/fc1/kernel$", (("fsdp",), ("tensor", "fsdp_z"))),
    (r"/mlp/fc1/bias$", (("tensor",),)),
    (r"/(attn/proj|mlp/fc2)/kernel$", (("tensor", "fsdp"), ("fsdp_z",))),
    (r"/patch_embed/kernel$", (("fsdp", "fsdp_z"),)),
    (r"/kernel$", (("fsdp",), ("fsdp_z",))),
    (r"/pos_embed$", ((), ("fsdp", "fsdp_z"))),
    (r"", ()),  # biases, norms, tokens, counters: everywhere
)

# Which mesh axes the named axes of activations are split over, see `axes`.
ACTIVATIONS = {
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "dim": (),
    "draws": (),
}


def make_mesh(
    *, replica: int = 1, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None
) -> Mesh:
    """A mesh of all devices with AXES; one size may be -1, which takes what the others leave.

    Args:
      replica: copies of the rest that only gradients go between. Where the devices are several
        slices, a multiple of their number: nothing else then crosses the slow network.
      data: size of the axis that the batch is split over, parameters being the same.
      fsdp: the batch is split over it, and so are parameters and optimiser state.
      tensor: attention heads and MLP channels are split over it.
      devices: those of the job by default.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or slices that `replica`
        does not go over.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(len(devices), replica=replica, data=data, fsdp=fsdp, tensor=tensor)
    sizes["fsdp"], third = split_fsdp(sizes["fsdp"], devices)
    shape = *(sizes[axis] for axis in ("replica", "data", "fsdp")), third, sizes["tensor"]
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # no product of the torus's sides is that long: cut one of them
            split = {"devices": devices, "allow_split_physical_axes": True}
            return Mesh(mesh_utils.create_device_mesh(shape, **split), AXES, axis_types=types)
    if sizes["replica"] % slices:
        raise ValueError(
            f"mesh replica={sizes['replica']} must be a multiple of the {slices} slices that the "
            f"{len(devices)} devices are in; try replica={slices}."
        )
    within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices=devices)
    return Mesh(grid, AXES, axis_types=types)


def mesh_sizes(
    num_devices: int, *, replica: int = 1, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> dict[str, int]:
    """The sizes of a config's axes on so many devices, see `make_mesh`; none of them is -1."""
    sizes = {"replica": replica, "data": data, "fsdp": fsdp, "tensor": tensor}
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) == 1 and known > 0:
        sizes[rest[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices or min(sizes.values()) < 1:
        raise ValueError(
            f"mesh {given} does not multiply to the {num_devices} devices; use -1 for one axis."
        )
    return sizes


def split_fsdp(fsdp: int, devices: Sequence[Any]) -> tuple[int, int]:
    """The sizes of `fsdp` and `fsdp_z`: the first over one or two sides of the devices' torus.

    Args:
      fsdp: their product.
      devices: of a torus where they have coordinates; without them nothing is to be split.
    """
    coordinates = [getattr(device, "coords", ()) for device in devices]
    sides = sorted(len(set(side)) for side in zip(*coordinates, strict=True))
    choices = [math.prod(sides[-2:]), *sides[-1:]]  # a plane, a line
    if fsdp <= min(choices[0], MAX_FSDP) or not sides:
        return fsdp, 1
    first = next((size for size in choices if size <= MAX_FSDP and fsdp % size == 0), fsdp)
    return first, fsdp // first


def config_sizes(mesh: Mesh) -> dict[str, int]:
    """The sizes of the four axes that a config has."""
    sizes = {axis: mesh.shape[axis] for axis in CONFIG_AXES}
    return sizes | {"fsdp": math.prod(mesh.shape[axis] for axis in FSDP_AXES)}


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_batch_parts(mesh: Mesh) -> int:
    """How many parts the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


class Place(NamedTuple):
    """Where an array lies.

    Attributes:
      spec: for each dimension the mesh axes that it is split over.
      note: what of PLACEMENTS could not be done, in words, or ''.
    """

    spec: PartitionSpec
    note: str


def place(name: str, shape: tuple[int, ...], mesh: Mesh) -> Place:
    """Where the array `name` lies by PLACEMENTS.

    A dimension that an axis does not divide gives it to the largest one that it divides; where
    there is none, the array is the same along that axis. The layers of a scan are never split.

    Args:
      name: as `tree.named_leaves` gives it, such as 'params/backbone/blocks/0/attn/qkv/kernel'.
      shape: of the whole array.
      mesh: of `make_mesh`.
    """
    wanted = next(dims for pattern, dims in PLACEMENTS if re.search(pattern, name))
    first = 1 if STACKED.match(name) else 0
    if len(shape) - first < len(wanted):  # statistics that are smaller than their parameter
        wanted = ()
    dims: list[tuple[str, ...]] = [()] * len(shape)
    notes = []
    for dim, axes in enumerate(wanted, start=len(shape) - len(wanted)):
        for axis in axes:
            if mesh.shape[axis] == 1:
                continue
            others = sorted(range(first, len(shape)), key=lambda other: -shape[other])
            for candidate in (dim, *others):
                parts = math.prod(mesh.shape[other] for other in dims[candidate])
                if shape[candidate] % (parts * mesh.shape[axis]) == 0:
                    dims[candidate] += (axis,)
                    if candidate != dim:
                        notes.append(f"{axis} on dimension {candidate} instead of {dim}")
                    break
            else:
                notes.append(f"{axis}={mesh.shape[axis]} divides no dimension")
    while dims and not dims[-1]:
        dims.pop()
    spec = PartitionSpec(*(d[0] if len(d) == 1 else d or None for d in dims))
    return Place(spec, "; ".join(notes))


def place_tree(abstract: Any, mesh: Mesh) -> Any:
    """The same tree of `jax.ShapeDtypeStruct`s with shardings by PLACEMENTS."""

    def placed(name, leaf):
        sharding = NamedSharding(mesh, place(name, leaf.shape, mesh).spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return map_named(placed, abstract)


def on_host(abstract: Any) -> Any:
    """What `place_tree` answers, its arrays in the memory of the devices' hosts, scalars not."""

    def moved(leaf):
        kind = HOST_MEMORY if leaf.shape else "device"
        sharding = leaf.sharding.with_memory_kind(kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(moved, abstract)


def check_host_memory(mesh: Mesh, why: str) -> None:
    """Raises ValueError, naming `why`, where the devices cannot reach their host's memory."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"{why} wants to keep arrays in the host's memory, which the {device.platform} backend "
            f"cannot (it has {', '.join(kinds)}); turn it off."
        )


class Row(NamedTuple):
    """One array of a layout.

    Attributes:
      name: as `tree.named_leaves` gives it.
      shape: of the whole array.
      dtype: its name.
      spec: like "('fsdp', 'tensor'), None", for each dimension the mesh axes that it is split
        over; '' where it is the same on every device.
      bytes_per_device: of its largest part; 0 of what the devices' hosts keep.
      note: what could not be split as wanted and what hosts keep, or ''.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int
    note: str


def layout(state: Any) -> list[Row]:
    """What lies where, an array a row: of arrays or of what `place_tree` answers."""
    rows = []
    for name, leaf in named_leaves(state).items():
        sharding, dtype = leaf.sharding, np.dtype(leaf.dtype)
        size = math.prod(sharding.shard_shape(leaf.shape)) * dtype.itemsize
        spec = ", ".join(map(repr, sharding.spec))
        notes = [place(name, leaf.shape, sharding.mesh).note]
        if sharding.memory_kind == HOST_MEMORY:
            size, notes = 0, ["in the host's memory", *notes]
        note = "; ".join(filter(None, notes))
        rows.append(Row(name, leaf.shape, dtype.name, spec, size, note))
    return rows


class Splitting:
    """How a mesh splits activations, see `axes`; an axis that it does not divide is whole.

    Args:
      mesh: of `make_mesh`.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def num_parts(self, axis: str) -> int:
        """Into how many parts an axis is split."""
        return math.prod(self.mesh.shape[name] for name in ACTIVATIONS[axis])

    def split(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """x with its named axes split; the others stay as the compiler likes them."""
        if self.mesh.size == 1:
            return x
        dims = [PartitionSpec.UNCONSTRAINED] * x.ndim
        for dim, axis in enumerate(axes):
            if axis and x.shape[dim] % self.num_parts(axis) == 0:
                dims[dim] = ACTIVATIONS[axis] or None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*dims)))

    def gather(self, params: Any, prefix: str, dtype: DTypeLike) -> Any:
        """Parameters as products want them, see `axes.gathered`."""
        return map_named(lambda name, x: self._gather(prefix + name, x, dtype), params)

    def _gather(self, name, x, dtype):
        dims = [np.ravel(dim or ()).tolist() for dim in place(name, x.shape, self.mesh).spec]
        steps = [PartitionSpec(*map(tuple, dims))]
        for axis in reversed(FSDP_AXES):  # one after the other, the last to be split the first
            dims = [[each for each in dim if each != axis] for dim in dims]
            steps.append(PartitionSpec(*map(tuple, dims)))
        if steps[0] == steps[-1]:
            return x
        return _gather(x.astype(dtype), tuple(NamedSharding(self.mesh, spec) for spec in steps))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, steps: tuple[NamedSharding, ...]) -> jax.Array:
    """x from the first place to the last; its gradient goes back, a reduce-scatter at each step.

    Without the steps back the compiler would sum the whole gradient everywhere and then cut it.
    """
    return _along(x, steps[1:])


def _gather_forward(x, steps):
    return _along(x, steps[1:]), None


def _gather_back(steps, _, grad):
    return (_along(grad, steps[-2::-1]),)


def _along(x, steps):
    for step in steps:
        x = jax.lax.with_sharding_constraint(x, step)
    return x


_gather.defvjp(_gather_forward, _gather_back)


def num_slices(mesh: Mesh) -> int:
    """Of how many slices its devices are."""
    return len({getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat})


def sum_by_slices(tree: Any) -> Any:
    """The sum over all devices of each one's tree, inside `jax.shard_map` over BATCH_AXES.

    All arrays travel as one: it is summed within each slice, each device keeping a part, which
    alone crosses the slow network (Cho et al. 2019, BlueConnect). Left to itself the TPU compiler
    sends small arrays across whole, from every chip.

    Args:
      tree: float32 arrays, as gradients are; others and scalars are summed one by one.
    """
    leaves, structure = jax.tree.flatten(tree)
    alone = [x.ndim == 0 or x.dtype != jnp.float32 for x in leaves]
    summed = [
        jax.lax.psum(x, BATCH_AXES) if single else x
        for x, single in zip(leaves, alone, strict=True)
    ]
    bundle = [x for x, single in zip(leaves, alone, strict=True) if not single]
    if bundle:
        flat = jnp.concatenate([x.ravel() for x in bundle])
        within = BATCH_AXES[1:]
        tiles = 16 * 128 * jax.lax.psum(1, within)  # a part is of whole tiles
        rows = jnp.pad(flat, (0, -flat.size % tiles)).reshape(-1, 128)
        part = jax.lax.psum_scatter(rows, within, tiled=True)
        rows = jax.lax.all_gather(jax.lax.psum(part, BATCH_AXES[0]), within, tiled=True)
        ends = np.cumsum([x.size for x in bundle])
        pieces = iter(jnp.split(rows.ravel()[: flat.size], ends[:-1]))
        summed = [
            x if single else next(pieces).reshape(x.shape)
            for x, single in zip(summed, alone, strict=True)
        ]
    return jax.tree.unflatten(structure, summed)


def check_batch_size(
    batch_size: int, mesh: Mesh, *, accumulate: int = 1, together: int = 1
) -> None:
    """Raises ValueError, with the nearest size that works, unless the batch can be split.

    Args:
      batch_size: of all processes together.
      mesh: the devices that must divide it.
      accumulate: into how many parts each device's share is split again.
      together: how many neighbours must stay together in such a part.
    """
    parts, devices = num_batch_parts(mesh), mesh.size
    multiple = parts * accumulate * together
    if batch_size < 1 or batch_size % multiple:
        near = max(round(batch_size / multiple), 1) * multiple
        what = f"{devices} devices" if parts == devices else f"{parts} parts of {devices} devices"
        what += f" × {accumulate} accumulated parts" if accumulate > 1 else ""
        what += f" × {together} examples that are mixed" if together > 1 else ""
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {what}; try {near}.")
