import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import reference
from vit_jax.models.vit import make_vit
from vit_jax.objectives import OBJECTIVES
from vit_jax.objectives.supervised import Supervised
from vit_jax.preprocess import Preprocess

NUM_CLASSES = 5


class Both(nnx.Module):
    """A backbone and its objective."""

    def __init__(self, mixup=0.0, dtype="float32", drop_path=0.0, **options):
        rngs = nnx.Rngs(0)
        shape = {"image_size": 4, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12}
        self.vit = make_vit(
            variant="Ti/2", **shape, dtype=dtype, drop_path=drop_path, cls_token=True, rngs=rngs
        )
        given = {"num_classes": NUM_CLASSES, "preprocess": Preprocess(mixup=mixup)}
        self.method = Supervised(backbone=self.vit, **given, **options, rngs=rngs)


@functools.cache
def both(**options):
    return reference.made(lambda: Both(**options))


def batch(size=8):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 4, 4, 3), np.uint8),
        "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
        "mask": np.arange(size) % 3 != 1,
    }


def evaluate(module, batch, train=False, seed=0):
    """Loss, output, and the gradients of all parameters."""
    graphdef, params = nnx.split(module)
    keys = jax.random.split(jax.random.key(seed), len(batch["mask"]))
    step = _gradient(graphdef, nnx.to_pure_dict(params), batch, keys, train=train)
    return jax.tree.map(np.asarray, step)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def _gradient(graphdef, params, batch, keys, *, train):
    def loss(params):
        module = nnx.merge(graphdef, params)
        return module.method(module.vit, batch, step=0, key=keys, train=train)

    (value, output), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, output, grads


def logits(module, batch):
    """In float64, from the encoder on."""
    tokens = reference.encoder(module.vit, batch["image"] / 127.5 - 1.0)
    return reference.logits(module.method.head, tokens[:, 1:].mean(axis=1))


def wanted_losses(name, logits, targets):
    if name == "softmax":
        log_sum = np.log(np.exp(logits).sum(-1, keepdims=True))
        return -(targets * (logits - log_sum)).sum(-1)
    p = 1 / (1 + np.exp(-logits))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_metrics(loss, smoothing):
    module, x = both(loss=loss, label_smoothing=smoothing), batch()
    value, output, _ = evaluate(module, x)
    targets = np.eye(NUM_CLASSES)[x["label"]]
    targets = (1 - smoothing) * targets + smoothing / NUM_CLASSES
    found = logits(module, x)
    losses = wanted_losses(loss, found, targets)[x["mask"]]
    assert value == pytest.approx(losses.mean(), rel=1e-4)
    total, count = output.metrics["loss"]
    assert total == pytest.approx(losses.sum(), rel=1e-4) and count == x["mask"].sum() == 5
    right, count = output.metrics["accuracy"]
    assert right == (found.argmax(-1) == x["label"])[x["mask"]].sum() and count == 5
    assert output.aux == ()


def test_metrics_add_over_parts_of_a_batch():
    module, x = both(label_smoothing=0.1), batch()
    _, whole, _ = evaluate(module, x)
    parts = [evaluate(module, {k: v[i : i + 4] for k, v in x.items()})[1] for i in (0, 4)]
    for name, pair in whole.metrics.items():
        added = np.sum([part.metrics[name] for part in parts], axis=0)
        np.testing.assert_allclose(added, pair, rtol=1e-6)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_masked_examples_influence_neither_loss_nor_gradient(mixup):
    module, x = both(mixup=mixup), batch()
    other = dict(x)
    other["image"] = np.where(x["mask"][:, None, None, None], x["image"], 255 - x["image"])
    other["label"] = np.where(x["mask"], x["label"], (x["label"] + 1) % NUM_CLASSES)
    one, two = (evaluate(module, each, train=True) for each in (x, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient():
    value, output, grads = evaluate(both(), batch() | {"mask": np.zeros(8, bool)})
    assert value == 0 and output.metrics["loss"] == (0, 0)
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


def test_mixup_and_drop_path_are_for_training():
    module = both(mixup=0.4, drop_path=0.5)
    cases = [(train, seed) for train in (False, True) for seed in (0, 1)]
    losses = [float(evaluate(module, batch(), train, seed)[0]) for train, seed in cases]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_first_loss_is_that_of_a_guess(loss):
    module = reference.initialised(lambda: Both(loss=loss))
    value, _, _ = evaluate(module, batch())
    if loss == "softmax":
        assert value == pytest.approx(math.log(NUM_CLASSES), rel=1e-5)
    else:  # every class starts at odds of one to NUM_CLASSES
        np.testing.assert_allclose(module.method.head.fc.bias[...], -math.log(NUM_CLASSES))
        p = 1 / (1 + NUM_CLASSES)
        wanted = -math.log(p) - (NUM_CLASSES - 1) * math.log(1 - p)
        assert value == pytest.approx(wanted, rel=1e-5)


def test_loss_and_logits_are_float32_in_half_precision():
    module, x = both(dtype="bfloat16"), batch()
    value, output, grads = evaluate(module, x)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((value, output, grads))}
    assert kinds == {np.dtype("float32")}
    full, _, _ = evaluate(both(), x)
    assert 0 < abs(value - full) < 0.05 * abs(full)
    graphdef, params = nnx.split(module)
    traced = jax.make_jaxpr(functools.partial(_gradient, graphdef, train=False))(
        nnx.to_pure_dict(params), x, jax.random.split(jax.random.key(0), 8)
    )
    for eqn, _ in reference.equations(traced.jaxpr):
        if eqn.primitive.name in ("exp", "log", "log1p", "logistic", "rsqrt"):
            assert eqn.invars[0].aval.dtype == jnp.float32, eqn


@pytest.mark.parametrize(("pool", "hidden_dim"), [("cls", 0), ("gap", 6), ("map", 0)])
def test_the_model_of_an_evaluation_has_the_same_logits(pool, hidden_dim):
    module, x = both(pool=pool, hidden_dim=hidden_dim), batch()
    model = module.method.model(module.vit)
    found = np.asarray(jax.jit(lambda images: model(images))(x["image"]))
    assert found.shape == (8, NUM_CLASSES) and found.dtype == np.float32
    losses = wanted_losses("softmax", found.astype(np.float64), np.eye(NUM_CLASSES)[x["label"]])
    assert evaluate(module, x)[0] == pytest.approx(losses[x["mask"]].mean(), rel=1e-4)
    normalised = (x["image"] / 127.5 - 1.0).astype(np.float32)
    again = np.asarray(jax.jit(lambda images: model(images))(normalised))
    np.testing.assert_allclose(again, found, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hinge"}, "loss='hinge' is unknown; choose one of 'softmax', 'sigmoid'"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"pool": "max"}, "pool='max' is unknown"),
    ],
)
def test_bad_values_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        nnx.eval_shape(lambda: Both(**options))


def test_it_is_found_by_name():
    assert OBJECTIVES["supervised"] is Supervised
