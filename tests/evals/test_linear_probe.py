import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vit_jax.evals import linear_probe as lp

SETTINGS = [(lr, decay) for lr in (0.01, 0.1, 1.0) for decay in (0.0, 1e-3, 1e-1)]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 600).astype(np.int32)
    wide = rng.standard_normal((5, 20))[label] + 1.5 * rng.standard_normal((600, 20))
    return [wide.astype(np.float32), wide[:, :8].astype(np.float32)], label


def train(choices, label, settings=SETTINGS, num_steps=60):
    standard = [lp.Standard.of(x)(x) for x in choices]
    options = {"num_steps": num_steps, "batch_size": 64, "seed": 0}
    return lp.train_probes(lp.stacked(standard), label, 5, settings=settings, **options), standard


def test_each_of_the_grid_is_as_if_trained_alone(data):
    choices, label = data
    together, _ = train(choices, label)
    for choice, x in enumerate(choices):
        for number, setting in enumerate(SETTINGS):
            alone, _ = train([x], label, [setting])
            width = x.shape[1]
            mine = together.weights[choice, number]
            np.testing.assert_allclose(mine[:width], alone.weights[0, 0], atol=1e-5)
            np.testing.assert_array_equal(mine[width:], 0)
            np.testing.assert_allclose(together.bias[choice, number], alone.bias[0, 0], atol=1e-5)


def test_it_is_to_the_bit_where_training_is_not_stable():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 48)) @ (rng.standard_normal((48, 48)) * 0.9 ** np.arange(48))
    label = (x[:, :5] + rng.standard_normal((600, 5))).argmax(axis=1).astype(np.int32)
    grid = [(rate, decay) for rate in (0.1, 1.0, 30.0) for decay in (0.0, 1e-2, 1e-1)]
    together, _ = train([x], label, grid)
    assert np.abs(together.weights[0, -3:]).max() > 10
    for number in (0, 4, 6, 8):
        alone, _ = train([x], label, [grid[number]])
        np.testing.assert_array_equal(together.weights[0, number], alone.weights[0, 0])
        np.testing.assert_array_equal(together.bias[0, number], alone.bias[0, 0])


def test_one_step_is_gradient_descent_by_hand(data):
    (x, _), label = data
    probes, (x, _) = train([x, x], label, [(0.5, 0.2)], num_steps=2)
    weights, bias = np.zeros((20, 5)), np.zeros(5)
    speed = [np.zeros_like(weights), np.zeros_like(bias)]
    for step, rows in enumerate(lp.batches(600, 2, 64, 0)):
        inputs = x[rows].astype(np.float64)
        logits = inputs @ weights + bias
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        error = (share - np.eye(5)[label[rows]]) / 64
        speed[0] = 0.9 * speed[0] + inputs.T @ error + 0.2 * weights
        speed[1] = 0.9 * speed[1] + error.sum(0)
        rate = 0.5 * (1 + np.cos(np.pi * step / 2)) / 2
        weights, bias = weights - rate * speed[0], bias - rate * speed[1]
    np.testing.assert_allclose(probes.weights[1, 0], weights, atol=1e-6)
    np.testing.assert_allclose(probes.bias[0, 0], bias, atol=1e-6)


def test_trained_long_it_is_the_minimum_that_scikit_learn_finds(data):
    choices, label = data
    decay = 0.05
    probes, (x, _) = train(choices, label, [(0.3, decay)], num_steps=2000)
    other = LogisticRegression(C=1 / (decay * len(label)), tol=1e-8, max_iter=1000).fit(x, label)

    def loss(weights, bias):
        logits = x.astype(np.float64) @ weights + bias
        data = np.log(np.exp(logits).sum(1)) - logits[np.arange(600), label]
        return data.mean() + 0.5 * decay * (weights**2).sum()

    best = loss(other.coef_.T, other.intercept_)
    assert best <= loss(probes.weights[0, 0], probes.bias[0, 0]) < best * 1.002


def test_batches_go_through_everything_in_each_epoch():
    order = lp.batches(100, 10, 20, 3)
    assert order.shape == (10, 20)
    for epoch in order.reshape(2, 100):
        assert sorted(epoch) == list(range(100))


def test_hits_are_counted_for_each_setting(data):
    choices, label = data
    probes, standard = train(choices, label)
    for choice, x in enumerate(standard):
        found = lp.hits(probes, choice, x, label)
        for number in range(len(SETTINGS)):
            weights = probes.weights[choice, number, : x.shape[1]]
            predicted = (x @ weights + probes.bias[choice, number]).argmax(1)
            assert (found[number] == (predicted == label)).mean() > 0.99
    assert found.mean() > 0.3


def test_constant_columns_become_zero():
    x = np.stack([np.full(9, 5.0), np.arange(9.0)], axis=1).astype(np.float32)
    z = lp.Standard.of(x)(x)
    np.testing.assert_array_equal(z[:, 0], 0)
    assert z[:, 1].std() == pytest.approx(1)
