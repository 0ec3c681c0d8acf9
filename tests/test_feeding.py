"""Which slots of a batch each process brings, and where they then lie."""

import importlib.util
import itertools

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from vit_jax.data.feed import Feed
from vit_jax.feeding import make_feed, pad_batch, put_batch, put_parts
from vit_jax.sharding import AXES, make_mesh, num_batch_parts, replicated


def test_a_batch_is_spread_in_order_and_parameters_are_everywhere():
    mesh = make_mesh()
    images = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = put_batch({"image": images, "mask": np.ones(16, bool)}, mesh)
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"], images)
    parts = {shard.device.id: np.asarray(shard.data) for shard in batch["image"].addressable_shards}
    for index, device in enumerate(mesh.devices.flat):
        np.testing.assert_array_equal(parts[device.id], images[2 * index : 2 * index + 2])
    everywhere = jax.device_put(images, replicated(mesh))
    assert all(shard.data.shape == (16, 3) for shard in everywhere.addressable_shards)


@pytest.mark.parametrize(("size", "padded"), [(16, 16), (17, 24), (3, 8)])
def test_what_the_devices_do_not_divide_is_padded(size, padded):
    batch = {"image": np.ones((size, 2, 2, 3), np.uint8), "mask": np.ones(size, bool)}
    out = pad_batch(batch, make_mesh())
    assert out["image"].shape == (padded, 2, 2, 3) and out["image"].dtype == np.uint8
    np.testing.assert_array_equal(out["mask"], np.arange(padded) < size)
    np.testing.assert_array_equal(out["image"][:size], batch["image"])
    assert not out["image"][size:].any()
    assert size < padded or out["image"] is batch["image"]  # the usual case copies nothing


class Chip:
    """A device, as far as a feed looks at it."""

    def __init__(self, process_index):
        self.process_index = process_index


def mesh_of(processes) -> Mesh:
    """A mesh [data, tensor] whose devices are those of the processes."""
    chips = np.vectorize(Chip, otypes=[object])(np.array(processes))
    data, tensor = chips.shape
    sizes = {"data": data, "tensor": tensor}
    return Mesh(chips.reshape([sizes.get(axis, 1) for axis in AXES]), AXES)


@pytest.mark.parametrize(
    "processes, slots",
    [
        ([[0], [0], [1], [1]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[1], [0], [0], [1]], [[2, 3, 4, 5], [0, 1, 6, 7]]),  # a torus
        ([[0, 1], [0, 1]], [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),  # both bring the same
        ([[0, 1], [2, 3]], [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2),
    ],
)
def test_a_process_brings_the_slots_of_its_devices(processes, slots):
    mesh = mesh_of(processes)
    for process, wanted in enumerate(slots):
        assert make_feed(mesh, process).slots(8).tolist() == wanted
    assert Feed((0, 2), 3).whole(10) == 12 and Feed((0, 2), 3).whole(9) == 9


def test_what_is_brought_lies_where_its_slots_are():
    """As on a torus: the devices of this process, which are all, in another order."""
    order = [3, 0, 7, 1, 5, 4, 2, 6]
    mesh = make_mesh(fsdp=2, tensor=2, devices=[jax.devices()[at] for at in order])
    labels = np.arange(32) * 10
    feed = make_feed(mesh)
    batch = put_batch({"label": labels[feed.slots(32)]}, mesh)
    np.testing.assert_array_equal(batch["label"], labels)
    parts = mesh.devices.reshape(num_batch_parts(mesh), -1)
    for shard in batch["label"].addressable_shards:
        (part,) = (at for at, devices in enumerate(parts) if shard.device in devices.tolist())
        np.testing.assert_array_equal(shard.data, labels.reshape(4, 8)[part])
    mesh = make_mesh(devices=[jax.devices()[at] for at in order])
    (dealt,) = put_parts({"label": labels[make_feed(mesh).slots(32)]}, mesh).values()
    np.testing.assert_array_equal(dealt, labels.reshape(8, 4))
    found = {shard.index[0].start: shard.device for shard in dealt.addressable_shards}
    assert found == dict(enumerate(mesh.devices.ravel()))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra tpu) is not installed"
)
@pytest.mark.parametrize(
    "name, num_slices, sizes, together",
    [
        ("v5e:4x4", 1, {}, 1),
        ("v5e:4x4", 2, {"replica": 2, "fsdp": 4}, 1),
        ("v5p:4x4x4", 1, {"data": 1, "fsdp": -1}, 1),
        ("v5p:4x4x4", 1, {"fsdp": 2, "tensor": 2}, 1),
        ("v5p:4x4x4", 1, {"tensor": 4}, 2),  # tensor goes over two hosts each
    ],
)
def test_the_hosts_of_a_pod_bring_each_slot(monkeypatch, name, num_slices, sizes, together):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"platform": "tpu", "topology_name": name, "num_slices": num_slices}
    devices = topologies.get_topology_desc(**options).devices
    mesh = make_mesh(**sizes, devices=devices)
    hosts = sorted({device.process_index for device in devices})
    assert len(hosts) == len(devices) // 4
    slots = [make_feed(mesh, host).slots(256).tolist() for host in hosts]
    assert {len(each) for each in slots} == {256 // len(hosts) * together}
    assert sorted(itertools.chain(*slots)) == sorted([*range(256)] * together)
    assert any(each != list(range(each[0], each[0] + len(each))) for each in slots)  # gaps
