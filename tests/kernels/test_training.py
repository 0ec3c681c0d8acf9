"""Training with the kernels follows training without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax.data.sources import DatasetInfo
from vit_jax.train import make_parts, train_step

CLASSES = ("0", "1", "2", "3")


def losses(attention, num_steps=50):
    """Of each step on fresh random images whose brightness tells the class."""
    config = ConfigDict(
        {
            "seed": 0,
            "total_steps": num_steps,
            "model": {
                **{"variant": "Ti/8", "image_size": 32, "dim": 64, "depth": 2, "num_heads": 2},
                **{"mlp_dim": 128, "cls_token": True, "pos_embed": "sincos2d"},
                "attention": attention,
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


@pytest.mark.slow
def test_fifty_steps_with_the_kernels_are_those_without():
    without = losses("xla")
    assert without[-5:].mean() < 0.8 * without[:5].mean()  # it learns
    for kernel in ("interpret", "interpret_gpu"):
        np.testing.assert_allclose(losses(kernel), without, rtol=1e-3)
