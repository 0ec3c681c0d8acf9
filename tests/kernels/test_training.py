"""Training with the kernels follows training without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax.data.sources import DatasetInfo
from vit_jax.models import layers
from vit_jax.train import make_parts, train_step

CLASSES = ("0", "1", "2", "3")


def losses(num_steps=50, **model):
    """Of each step on fresh random images whose brightness tells the class."""
    config = ConfigDict(
        {
            "seed": 0,
            "total_steps": num_steps,
            "model": {
                **{"variant": "Ti/8", "image_size": 32, "dim": 64, "depth": 2, "num_heads": 2},
                **{"mlp_dim": 128, "cls_token": True, "pos_embed": "sincos2d"},
                **model,
            },
            "objective": {"name": "supervised"},
            "preprocess": {},
            "optimizer": {  # as in the recipe of S/16
                **{"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
                **{"schedule": "cosine", "warmup_steps": 10, "clip_norm": 1.0},
            },
            "train": {},
        }
    )
    info = DatasetInfo("levels", None, {"train": 1}, CLASSES, "", None, None)
    parts, init = make_parts(config, info)
    step = jax.jit(functools.partial(train_step, parts), donate_argnums=0)
    state, found, rng = jax.jit(init)(), [], np.random.default_rng(0)
    for _ in range(num_steps):
        label = rng.integers(0, len(CLASSES), 8).astype(np.int32)
        noise = rng.integers(0, 128, (8, 32, 32, 3))
        image = (noise + 32 * label[:, None, None, None]).astype(np.uint8)
        batch = {"image": image, "label": label, "mask": np.ones(8, bool)}
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.fixture(scope="module")
def without():
    """The losses of XLA's own products, GELU computed wherever it is wanted, blocks in a loop."""
    found = losses(attention="xla")
    assert found[-5:].mean() < 0.8 * found[:5].mean()  # it learns
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["interpret", "interpret_gpu"])
def test_fifty_steps_with_the_kernels_are_those_without(without, kernel):
    np.testing.assert_allclose(losses(attention=kernel), without, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_fifty_steps_as_on_a_wide_tpu_are_those_without(without, monkeypatch, scan):
    """The kernel, and GELUs and their derivatives computed once and kept."""
    kept = []
    once = layers._activate_once
    monkeypatch.setattr(layers, "device_kind", lambda: layers.WIDE_TPUS[0])
    monkeypatch.setattr(layers, "_activate_once", lambda *x: kept.append(x) or once(*x))
    found = losses(attention="interpret", scan=scan)
    assert kept
    np.testing.assert_allclose(found, without, rtol=1e-3)
