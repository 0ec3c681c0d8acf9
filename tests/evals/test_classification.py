import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.models import reference
from vit_jax import evaluation as evaluation_lib
from vit_jax.data import loader as loader_lib
from vit_jax.data.prepare import prepare_folder
from vit_jax.data.sources import load_source
from vit_jax.evals import EVALS
from vit_jax.evals.classification import Classification
from vit_jax.functional import Functional
from vit_jax.models.heads import Head, make_pool
from vit_jax.models.model import Model
from vit_jax.models.vit import make_vit
from vit_jax.preprocess import Preprocess
from vit_jax.sharding import make_mesh


@functools.cache
def model(num_classes=10):
    """Random weights: about one in ten digits right."""

    def make():
        rngs = nnx.Rngs(0)
        shape = {"image_size": 8, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12}
        vit = make_vit(variant="Ti/4", **shape, rngs=rngs)
        pool = make_pool("gap", vit, rngs=rngs)
        return Model(vit, pool, Head(vit.dim, num_classes, rngs=rngs), Preprocess())

    return reference.made(make)


def evaluate(data_dir, dataset="digits", devices=8, num_classes=10, batch_size=120, **options):
    recipe = {"name": "none", "size": (8, 8)}
    evaluation = Classification(
        dataset=dataset, data_dir=data_dir, augment=recipe, batch_size=batch_size, **options
    )
    mesh = make_mesh(devices=jax.devices()[:devices])
    results = evaluation_lib.evaluate({"x": evaluation}, Functional.of(model(num_classes)), mesh)
    assert all(name.startswith("x/") for name in results)
    return {name.removeprefix("x/"): value for name, value in results.items()}


def decoded(source):
    images = [np.asarray(Image.open(io.BytesIO(r["image"])).convert("RGB")) for r in source]
    return np.stack(images), np.array([record["label"] for record in source])


def wanted(images, labels, num_classes=10):
    """Ranks and losses in NumPy, from logits in float64."""
    tokens = reference.encoder(model(num_classes).backbone, images / 127.5 - 1.0)
    logits = reference.logits(model(num_classes).head, tokens.mean(axis=1))
    own = logits[np.arange(len(labels)), labels]
    rank = (logits > own[:, None]).sum(axis=1)
    losses = np.log(np.exp(logits).sum(axis=1)) - own
    return {"top1": (rank < 1).mean(), "top5": (rank < 5).mean(), "loss": losses.mean()}


def read(data_dir, dataset="digits", split="test"):
    source = load_source(dataset, split=split, data_dir=data_dir)
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize(
    ("batch_size", "devices"),
    [(8, 8), (120, 8), (360, 8), (400, 8), (100, 8), (3, 8), (7, 1), (120, 1), (400, 1)],
)
def test_every_example_counts_once_at_any_batch_size_and_device_count(
    data_dir, batch_size, devices
):
    results = evaluate(data_dir, batch_size=batch_size, devices=devices)
    right = wanted(*decoded(read(data_dir)))
    assert results["count"] == 360 and results["rejected"] == 0
    assert isinstance(results["count"], int)
    assert 0 < right["top1"] < right["top5"] < 1
    assert results["top1"] == pytest.approx(right["top1"], abs=1e-12)
    assert results["top5"] == pytest.approx(right["top5"], abs=1e-12)
    assert results["loss"] == pytest.approx(right["loss"], rel=1e-6)


@dataclasses.dataclass
class Damaged:
    """A source with truncated, empty and unreadable records."""

    source: object
    broken: tuple[int, ...] = (3, 200, 359)

    @property
    def info(self):
        return self.source.info

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        if index == self.broken[0]:
            return record | {"image": record["image"][:40]}
        if index == self.broken[1]:
            return record | {"image": b""}
        if index == self.broken[2]:
            raise OSError(f"example {index} of digits/test cannot be read: damaged")
        return record


@pytest.mark.parametrize("batch_size", [120, 400])
def test_unreadable_images_are_counted_apart(data_dir, monkeypatch, batch_size):
    load = loader_lib.load_source
    monkeypatch.setattr(loader_lib, "load_source", lambda *a, **k: Damaged(load(*a, **k)))
    results = evaluate(data_dir, batch_size=batch_size)
    assert (results["count"], results["rejected"]) == (357, 3)
    whole = [r for index, r in enumerate(read(data_dir)) if index not in Damaged.broken]
    right = wanted(*decoded(whole))
    assert results["top1"] == pytest.approx(right["top1"], abs=1e-12)
    assert results["loss"] == pytest.approx(right["loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"example 3 .* cannot be decoded"):
        evaluate(data_dir, batch_size=batch_size, strict=True)


def test_a_split_without_one_readable_image(data_dir, monkeypatch):
    class AllBroken(Damaged):
        def __getitem__(self, index):
            return self.source[index] | {"image": b"no image"}

    load = loader_lib.load_source
    monkeypatch.setattr(loader_lib, "load_source", lambda *a, **k: AllBroken(load(*a, **k)))
    with pytest.raises(ValueError, match="no image can be used; example 0 .*not an image"):
        evaluate(data_dir)


def test_fewer_than_five_classes(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        folder = tmp_path / "images" / "test" / label
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    data_dir = str(tmp_path / "data")
    (tmp_path / "images" / "test").rename(tmp_path / "images" / "train")
    prepare_folder(tmp_path / "images", name="animals", data_dir=data_dir, progress=False)
    options = {"num_classes": 3, "batch_size": 8, "split": "train"}
    results = evaluate(data_dir, "animals", **options)
    right = wanted(*decoded(read(data_dir, "animals", "train")), num_classes=3)
    assert results["count"] == 12 and results["top5"] == 1
    assert results["top1"] == pytest.approx(right["top1"], abs=1e-12)
    assert results["loss"] == pytest.approx(right["loss"], rel=1e-6)


class AlwaysZero(nnx.Module):
    """Says of every image, and of padding too, that it is a zero; then a one, a two, …"""

    def __call__(self, images):
        return jnp.tile(-jnp.arange(10.0), (len(images), 1))


def test_padding_is_neither_right_nor_wrong(data_dir):
    recipe = {"name": "none", "size": (8, 8)}
    options = {"dataset": "digits", "data_dir": data_dir, "augment": recipe, "batch_size": 400}
    results = Classification(**options).run(Functional.of(AlwaysZero()), put=lambda batch: batch)
    labels = np.array([record["label"] for record in read(data_dir)])
    assert results["top1"] == pytest.approx((labels == 0).mean())
    assert results["top5"] == pytest.approx((labels < 5).mean())
    log_sum = np.log(np.exp(-np.arange(10.0)).sum())
    assert results["loss"] == pytest.approx((labels + log_sum).mean(), rel=1e-6)


@pytest.mark.parametrize("change", [lambda mask: mask & False, lambda mask: mask | True])
def test_an_example_that_is_lost_or_counted_twice_is_an_error(data_dir, change):
    recipe = {"name": "none", "size": (8, 8)}
    options = {"dataset": "digits", "data_dir": data_dir, "augment": recipe, "batch_size": 400}

    def put(batch):
        return batch | {"mask": change(batch["mask"])}

    with pytest.raises(ValueError, match=r"counted (0|400) \+ 0 rejected of 360"):
        Classification(**options).run(Functional.of(model()), put=put)


def test_it_can_be_stopped_at_every_batch(data_dir):
    class Stop(Exception):
        pass

    calls = []

    def check_stop():
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    recipe = {"name": "none", "size": (8, 8)}
    options = {"dataset": "digits", "data_dir": data_dir, "augment": recipe, "batch_size": 120}
    with pytest.raises(Stop):
        Classification(**options).run(
            Functional.of(model()), put=lambda batch: batch, check_stop=check_stop
        )


def test_it_is_found_by_name():
    assert EVALS["classification"] is Classification
