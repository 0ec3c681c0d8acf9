import jax
import numpy as np
import pytest

from vit_jax.sharding import check_batch_size, make_mesh, pad_batch, put_batch, replicated


def test_a_mesh_takes_all_devices_by_default():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count()} == {"data": 8}
    assert dict(make_mesh(data=8).shape) == {"data": 8}
    assert dict(make_mesh(devices=jax.devices()[:2]).shape) == {"data": 2}


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


def test_a_batch_is_spread_in_order_and_parameters_are_everywhere():
    mesh = make_mesh()
    images = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = put_batch({"image": images, "mask": np.ones(16, bool)}, mesh)
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"], images)
    parts = {shard.device.id: np.asarray(shard.data) for shard in batch["image"].addressable_shards}
    for place, device in enumerate(mesh.devices):
        np.testing.assert_array_equal(parts[device.id], images[2 * place : 2 * place + 2])
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
