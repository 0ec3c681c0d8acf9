"""The loop: what goes to the devices, and when."""

import numpy as np

from tests.runs import run, short
from vit_jax import trainer
from vit_jax.trainer import Trainer, ahead


def test_each_item_is_made_before_the_one_in_front_of_it_is_handed_out():
    made, handed_out = [], []

    def items():
        for number in range(4):
            made.append(number)
            yield number

    for number in ahead(items()):
        handed_out.append((number, list(made)))
    assert handed_out == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]
    assert list(ahead([])) == []


def test_batches_lie_on_the_devices_one_step_ahead_and_as_bytes(data_dir, tmp_path, monkeypatch):
    events, put, compiled = [], Trainer._put, Trainer._compile

    def spy_put(self, batch):
        arrays = put(self, batch)
        events.append(("put", batch["image"].copy()))
        assert arrays["image"].dtype == np.uint8
        assert len(arrays["image"].sharding.device_set) == 8
        return arrays

    def spy_compile(self, batch):
        step = compiled(self, batch)

        def spy_step(state, arrays):
            events.append(("step", np.asarray(arrays["image"])))
            return step(state, arrays)

        return spy_step

    monkeypatch.setattr(trainer.Trainer, "_put", spy_put)
    monkeypatch.setattr(trainer.Trainer, "_compile", spy_compile)
    run(short(data_dir), tmp_path)
    order = [name for name, _ in events]
    assert order == ["put", "put", "step"] + ["put", "step"] * 4 + ["step"]
    put, stepped = ([image for name, image in events if name == kind] for kind in ("put", "step"))
    np.testing.assert_array_equal(put, stepped)
