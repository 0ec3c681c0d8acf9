"""Every evaluation in a training loop."""

import jax
import numpy as np
import pytest

from tests.evals.test_classification import model
from vit_jax.data.sources import Source
from vit_jax.evals import EVALS, base
from vit_jax.evaluation import evaluate, summary
from vit_jax.features import FeatureCache, Features
from vit_jax.functional import Functional
from vit_jax.sharding import make_mesh

OPTIONS = {
    "classification": {"subset": "dataset"},
    "knn": {"k": (5, 20)},
    "linear_probe": {"features": ("gap", "last_1"), "num_steps": 20},
    "fewshot": {"shots": (5,)},
    "attention": {"num_images": 3},
}


@pytest.mark.parametrize("name", EVALS)
def test_it_runs_in_a_training_loop(data_dir, name):
    options = {"dataset": "digits", "data_dir": data_dir, "batch_size": 360}
    options |= {"augment": {"name": "none", "size": (8, 8)}}
    evaluation = EVALS[name](**options, **OPTIONS[name])
    mesh = make_mesh(devices=jax.devices()[:2])
    results = evaluate({"test": evaluation}, Functional.of(model()), mesh)
    assert all(isinstance(value, (int, float)) for value in results.values())
    if name == "attention":
        assert results["test/count"] == 3 and 0 <= results["test/distance_layer0"] < 8
    else:
        assert results["test/count"] == 360 and 0 < results["test/top1"] < 1
        assert summary(results).startswith("test accuracy ")
    # Of a metric of other examples than the first, theirs.
    counts = {"linear_probe": {"test/held_out_top1_count": 144}}.get(name, {})
    assert {key: results[key] for key in results if key.endswith("_count")} == counts


@pytest.mark.parametrize("kept", [True, False])
def test_a_small_split_is_decoded_once(data_dir, monkeypatch, kept):
    monkeypatch.setattr(base, "KEPT_BYTES", 1 << 28 if kept else 1)
    options = {"dataset": "digits", "data_dir": data_dir, "batch_size": 100}
    evaluation = EVALS["knn"](**options, augment={"name": "none", "size": (8, 8)})
    reads = []
    read = Source.__getitems__
    spy = lambda source, indices: reads.extend(indices) or read(source, indices)  # noqa: E731
    monkeypatch.setattr(Source, "__getitems__", spy)
    passes = []
    for _ in range(2):
        with evaluation.loader("test") as loader:
            passes.append(list(loader))
    assert len(reads) == 360 if kept else len(reads) == 720
    for one, two in zip(*passes, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])


def test_features_that_were_cut_short_are_not_there(tmp_path):
    cache = FeatureCache(tmp_path)
    values = np.arange(80, dtype=np.float32).reshape(20, 4)
    whole = Features({"pooled": values, "logits": values}, np.zeros(20), np.arange(20), 0)
    for name in ("pooled.npy", "label.npy", "meta.json"):
        for size in (0, 30):
            cache.save("key", whole)
            cache.drop_damaged("key")  # nothing is
            np.testing.assert_array_equal(cache.load("key", ["pooled"]).values["pooled"], values)
            path = tmp_path / "key" / name
            path.write_bytes(path.read_bytes()[: min(size, len(path.read_bytes()) - 1)])
            assert cache.load("key", ["pooled"]) is None
            cache.drop_damaged("key")
            assert not (tmp_path / "key").exists()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("knn", {"k": 10}, "k=10 must be a list of different integers of at least 1"),
        ("knn", {"k": (10, 2.5)}, "k=.10, 2.5. must be"),
        ("knn", {"k": (10, 10)}, "list of different integers"),
        ("knn", {"temperature": float("nan")}, "temperature=.nan. must be .* above 0"),
        ("knn", {"bank_split": "trian"}, "has no split 'trian'"),
        ("linear_probe", {"features": "gap"}, "features='gap' must be a list of names"),
        ("linear_probe", {"learning_rates": (0.1, float("nan"))}, "learning_rates=.* must be"),
        ("linear_probe", {"weight_decays": (-1.0,)}, "weight_decays=.* of at least 0"),
        ("linear_probe", {"num_steps": 0}, "num_steps=.0. must be"),
        ("linear_probe", {"train_split": "trian"}, "has no split 'trian'"),
        ("fewshot", {"shots": (2.5,)}, "shots=.* must be a list of different integers"),
        ("fewshot", {"l2": (float("inf"),)}, "l2=.* must be"),
        ("fewshot", {"num_held_out": -1}, "num_held_out=.-1. must be"),
        ("fewshot", {"train_split": "trian"}, "has no split 'trian'"),
    ],
)
def test_settings_that_cannot_be_meant_are_said_at_once(data_dir, name, settings, words):
    options = {"dataset": "digits", "data_dir": data_dir, "batch_size": 100}
    options |= {"augment": {"name": "none", "size": (8, 8)}}
    with pytest.raises(ValueError, match=words):
        EVALS[name](**options, **settings)
