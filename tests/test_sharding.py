import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax import hlo
from vit_jax.axes import gathered, splitting
from vit_jax.sharding import (
    AXES,
    Splitting,
    batch_sharding,
    check_batch_size,
    config_sizes,
    layout,
    make_mesh,
    place,
    place_tree,
    split_fsdp,
)


def test_a_mesh_takes_all_devices_by_default():
    assert make_mesh().shape["data"] == jax.device_count() == make_mesh(data=8).shape["data"] == 8
    assert make_mesh().axis_names == ("replica", "data", "fsdp", "fsdp_z", "tensor")
    assert make_mesh(devices=jax.devices()[:2]).shape["data"] == 2


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({"fsdp": 2}, (1, 4, 2, 1)),
        ({"data": 1, "fsdp": -1}, (1, 1, 8, 1)),
        ({"replica": 2, "fsdp": 2, "tensor": 2}, (2, 1, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (1, 2, 2, 2)),
    ],
)
def test_one_size_of_a_mesh_may_be_left_open(sizes, shape):
    assert tuple(config_sizes(make_mesh(**sizes)).values()) == shape


@pytest.mark.parametrize(
    "sides, fsdp, parts",
    [
        ((4, 4, 4), 64, (16, 4)),
        ((4, 4, 4), 16, (16, 1)),
        ((8, 4, 4), 64, (32, 2)),
        ((16, 16, 16), 4096, (16, 256)),  # a plane's parts would be less than a tile
        ((16, 16, 16), 16, (16, 1)),
        ((4, 4, 4), 24, (4, 6)),  # no whole planes
        ((4, 4, 4), 27, (27, 1)),
        ((16, 16, 1), 256, (16, 16)),
        ((), 8, (8, 1)),
    ],
)
def test_a_large_fsdp_over_a_torus_has_two_axes(sides, fsdp, parts):
    devices = [types.SimpleNamespace(coords=place) for place in np.ndindex(sides)]
    assert split_fsdp(fsdp, devices if sides else jax.devices()) == parts


class Chip:
    """A device of a slice, as far as making a mesh looks at it."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index


def test_replicas_are_the_slices():
    chips = [Chip(number, number % 2) for number in range(8)]
    mesh = make_mesh(replica=2, data=2, fsdp=2, devices=chips)
    assert mesh.devices.shape == (2, 2, 2, 1, 1)
    for index in range(2):
        assert {chip.slice_index for chip in mesh.devices[index].flat} == {index}
    with pytest.raises(ValueError, match=r"replica=1 .* multiple of the 2 slices .* replica=2"):
        make_mesh(devices=chips)


@pytest.mark.parametrize(
    "name, shape, spec, note",
    [
        ("blocks/0/attn/qkv/kernel", (32, 96), (("fsdp", "tensor"),), ""),
        ("blocks/attn/qkv/kernel", (4, 32, 96), (None, ("fsdp", "tensor")), ""),
        ("blocks/0/attn/proj/kernel", (32, 32), (("tensor", "fsdp"),), ""),
        ("blocks/0/mlp/fc1/kernel", (32, 64), ("fsdp", "tensor"), ""),
        ("blocks/mlp/fc1/bias", (4, 64), (None, "tensor"), ""),
        ("blocks/0/norm1/scale", (32,), (), ""),
        ("blocks/norm1/scale", (4, 32), (), ""),
        ("patch_embed/kernel", (4, 4, 3, 32), (None, None, None, "fsdp"), ""),
        ("head/fc/kernel", (32, 10), ("fsdp",), ""),
        ("head/fc/kernel", (31, 10), (None, "fsdp"), "fsdp on dimension 1 instead of 0"),
        ("head/fc/kernel", (31, 9), (), "fsdp=2 divides no dimension"),
        ("blocks/attn/proj/kernel", (4, 30, 31), (None, ("fsdp",)), None),
        ("blocks/attn/qkv/kernel", (4, 32), (), ""),  # a factored second moment
        ("count", (), (), ""),
    ],
)
@pytest.mark.parametrize("prefix", ["params/backbone/", "opt_state/0/mu/objective/teacher/"])
def test_a_table_says_where_each_array_lies(prefix, name, shape, spec, note):
    found = place(prefix + name, shape, make_mesh(fsdp=2, tensor=4))
    if note is not None:
        assert found == (PartitionSpec(*spec), note)
        return
    # The layers are not split, whatever divides them.
    assert found == (PartitionSpec(None, "fsdp"), "tensor=4 divides no dimension")


def test_a_layout_counts_the_bytes_of_a_device():
    mesh = make_mesh(fsdp=2, tensor=4)
    shape = {"attn": {"qkv": {"kernel": jax.ShapeDtypeStruct((32, 96), "bfloat16")}}}
    state = place_tree({"params": {"blocks": {"3": shape}}}, mesh)
    (row,) = layout(state)
    assert row.name == "params/blocks/3/attn/qkv/kernel"
    assert row.bytes_per_device == 32 * 96 * 2 // 8
    assert (row.shape, row.dtype, row.spec) == ((32, 96), "bfloat16", "('fsdp', 'tensor')")
    arrays = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state)
    assert layout(arrays) == [row]
    (kernel,) = jax.tree.leaves(arrays)
    assert kernel.addressable_shards[0].data.nbytes == row.bytes_per_device


@pytest.mark.parametrize("data", [3, 0, 16, -2])
def test_a_mesh_that_does_not_fit_is_refused(data):
    with pytest.raises(ValueError, match="does not multiply to the 8 devices; use -1"):
        make_mesh(data=data)


@pytest.mark.parametrize(("size", "near"), [(1000, 1000), (1001, 1000), (1007, 1008), (3, 8)])
def test_batch_size(size, near):
    if size == near:
        return check_batch_size(size, make_mesh())
    with pytest.raises(ValueError, match=f"batch_size={size} .* 8 devices; try {near}."):
        check_batch_size(size, make_mesh())


@pytest.mark.parametrize("size", [0, -8])
def test_a_batch_has_examples(size):
    with pytest.raises(ValueError, match="try 8"):
        check_batch_size(size, make_mesh())


def test_a_parameter_is_gathered_and_its_gradient_scattered_on_every_axis():
    shape = (1, 1, 4, 2, 1)
    devices = np.array(jax.devices()).reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    name = "blocks/0/mlp/fc1/kernel"
    spec = place(name, (8, 16), mesh).spec
    assert spec == PartitionSpec("fsdp", "fsdp_z")
    rng = np.random.default_rng(0)
    kernel = jax.device_put(rng.normal(size=(8, 16)).astype("f"), NamedSharding(mesh, spec))
    x = jax.device_put(rng.normal(size=(32, 8)).astype("f"), batch_sharding(mesh))

    def loss(kernel, x):
        with splitting(Splitting(mesh)):
            whole = gathered({"kernel": kernel}, "blocks/0/mlp/fc1/", jnp.bfloat16)["kernel"]
        assert whole.dtype == jnp.bfloat16
        return jnp.square(x.astype(jnp.bfloat16) @ whole).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss)).lower(kernel, x).compile()
    grad = compiled(kernel, x)
    assert grad.sharding.is_equivalent_to(kernel.sharding, 2) and grad.dtype == np.float32
    plain = 2 * np.asarray(x).T @ (np.asarray(x) @ np.asarray(kernel))
    np.testing.assert_allclose(grad, plain, rtol=0.05, atol=1)
    groups = {
        len(each.groups[0])
        for each in hlo.collectives(hlo.parse(compiled.as_text()), 8)
        if each.kind == "all-gather"
    }
    assert groups == {2, 4}  # never all eight at once


def test_what_lies_whole_is_not_touched():
    x = jnp.ones(8)
    with splitting(Splitting(make_mesh(fsdp=8))):
        assert gathered(x, "blocks/0/norm1/scale", jnp.bfloat16) is x
    assert gathered(x, "blocks/0/mlp/fc1/kernel", jnp.bfloat16) is x
