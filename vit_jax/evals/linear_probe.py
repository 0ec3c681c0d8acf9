"""Linear classifiers on frozen features: a whole grid of them at once."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evals.base import Evaluation, Reader, Scores, Value, check_numbers
from vit_jax.evals.intervals import bootstrap, pack_bits

MOMENTUM = 0.9
COLUMNS = 40  # settings × classes of a product; a setting alone pays for so many, too


@dataclasses.dataclass(kw_only=True, eq=False)
class LinearProbe(Evaluation):
    """Softmax regression by SGD on features that are extracted once, for a grid of settings.

    Every feature choice × learning rate × weight decay is trained side by side in one program, on
    the same batches. The best on a held-out part of the training split is the one reported.
    Features are standardised by the training part's mean and deviation (as the batch norm in front
    of MAE's probe does, He et al. 2022, appendix A.1); weights start at zero; the learning rate
    falls by a cosine to zero; Nesterov's momentum is not used, plain momentum is 0.9.

    Args:
      train_split: what is trained on.
      held_out: share of it, drawn by `seed`, that chooses the setting.
      features: choices, see `vit_jax/features.py`.
      learning_rates: for the mean loss of a batch of standardised features.
      weight_decays: L2 penalties, 0.5 · decay · |weights|²; the bias has none.
      num_steps, probe_batch_size: of the training.
      seed: of the held-out part and of the batches.

    The other arguments are `Evaluation`'s.
    """

    train_split: str = "train"
    held_out: float = 0.1
    features: Sequence[str] = ("pooled",)
    learning_rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    weight_decays: Sequence[float] = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
    num_steps: int = 1000
    probe_batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be between 0 and 1.")
        if isinstance(self.features, str) or not self.features:
            raise ValueError(f"features={self.features!r} must be a list of names.")
        check_numbers("learning_rates", self.learning_rates, above=True)
        check_numbers("weight_decays", self.weight_decays)
        for name in ("num_steps", "probe_batch_size"):
            check_numbers(name, [getattr(self, name)], least=1, whole=True)
        check_numbers("seed", [self.seed], whole=True)
        self.check_split(self.train_split)
        self._grid = list(itertools.product(self.learning_rates, self.weight_decays))
        self.wants = dict.fromkeys((self.train_split, self.split), tuple(self.features))

    def measure(self, reader: Reader) -> Scores:
        """top1 on the scored split, and held_out_top1, of the chosen setting.

        Artefacts: 'linear_probe' (the whole grid with its held-out accuracies, and the chosen
        setting), 'correct' (see `pack_bits`).
        """
        train = self.read(reader, self.train_split)
        test = self.read(reader, self.split)
        num_classes = len(self.info.class_names)
        order = np.random.default_rng(self.seed).permutation(len(train.label))
        kept = max(int(len(order) * (1 - self.held_out)), 1)
        fitted, held_out = np.sort(order[:kept]), np.sort(order[kept:])
        if not len(held_out):
            raise ValueError(
                f"held_out={self.held_out} of {len(order)} examples is none; set more."
            )
        parts = [Standard.of(np.asarray(train.values[name])[fitted]) for name in self.features]
        x = stacked([part(train.values[name][fitted]) for part, name in self._zip(parts)])
        probes = train_probes(
            x,
            train.label[fitted],
            num_classes,
            settings=self._grid,
            num_steps=self.num_steps,
            batch_size=min(self.probe_batch_size, len(fitted)),
            seed=self.seed,
        )
        chosen_on = [part(train.values[name][held_out]) for part, name in self._zip(parts)]
        label = train.label[held_out]
        accuracy = np.stack([hits(probes, i, x, label).mean(-1) for i, x in enumerate(chosen_on)])
        choice, setting = np.unravel_index(accuracy.argmax(), accuracy.shape)
        x = parts[choice](test.values[self.features[choice]])
        correct = hits(probes, choice, x, test.label)[setting]
        return self._scores(accuracy, choice, setting, correct, test.index, len(held_out))

    def _zip(self, parts):
        return zip(parts, self.features, strict=True)

    def _scores(self, accuracy, choice, setting, correct, index, num_held_out) -> Scores:
        low, high = bootstrap(correct[:, None], lambda means: means)
        best = Value("top1", float(correct.mean()), len(correct), float(low[0]), float(high[0]))
        values = [best, Value("held_out_top1", float(accuracy.max()), num_held_out)]
        rows = [
            {"feature": name, "learning_rate": lr, "weight_decay": decay, "held_out": float(share)}
            for name, shares in zip(self.features, accuracy, strict=True)
            for (lr, decay), share in zip(self._grid, shares, strict=True)
        ]
        chosen = rows[choice * len(self._grid) + setting]
        artefacts = {"linear_probe": {"grid": rows, "chosen": chosen}}
        return Scores(values, artefacts | {"correct": pack_bits(correct, index)})


class Standard(NamedTuple):
    """Subtracts the mean and divides by the deviation, [features] each."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "Standard":
        """Of the columns of x; a constant column becomes zero."""
        std = x.std(axis=0, dtype=np.float64)
        return cls(x.mean(axis=0, dtype=np.float64), np.where(std > 1e-6, std, np.inf))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[examples, features] -> the same, float32."""
        return ((x - self.mean) / self.std).astype(np.float32)


class Probes(NamedTuple):
    """Linear classifiers for every feature choice and setting.

    Attributes:
      weights: [choices, settings, features, classes], zero behind a narrower choice's features.
      bias: [choices, settings, classes].
    """

    weights: np.ndarray
    bias: np.ndarray


def stacked(choices: Sequence[np.ndarray]) -> np.ndarray:
    """[examples, features] each -> [choices, examples, widest], zeros behind the narrower ones."""
    width = max(x.shape[1] for x in choices)
    return np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in choices])


def train_probes(
    x: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    *,
    settings: Sequence[tuple[float, float]],
    num_steps: int,
    batch_size: int,
    seed: int,
) -> Probes:
    """Trains all of them in one program; each is what it is if it is trained alone, to the bit.

    Args:
      x: [choices, examples, features] float32, standardised.
      label: [examples] int32.
      num_classes: of the labels.
      settings: (learning rate, weight decay) each.
      num_steps: of SGD.
      batch_size: examples a step, the same ones for all.
      seed: of their order.
    """
    rates, decays = (jnp.asarray(column, jnp.float32) for column in zip(*settings, strict=True))
    order = batches(len(label), num_steps, batch_size, seed)
    run = functools.partial(_train, num_classes)
    weights, bias = run(jnp.asarray(x), jnp.asarray(label), jnp.asarray(order), rates, decays)
    return Probes(np.asarray(weights), np.asarray(bias))


def batches(num_examples: int, num_steps: int, batch_size: int, seed: int) -> np.ndarray:
    """[steps, batch] int32: a new permutation for every epoch."""
    rng = np.random.default_rng(seed)
    epochs = -(-num_steps * batch_size // num_examples)
    order = np.concatenate([rng.permutation(num_examples) for _ in range(epochs)])
    return order[: num_steps * batch_size].reshape(num_steps, batch_size).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _train(num_classes, x, label, order, rates, decays):
    """([choices, settings, features, classes], [choices, settings, classes]), see `train_probes`.

    Settings go through the products in blocks of one size, however many there are: a product of
    another shape adds in another order, and at a rate where training is not stable the difference
    grows to any size. For the same reason examples come last, over which sums are not vectorised.
    """
    block = max(COLUMNS // num_classes, 1)
    missing = -len(rates) % block
    rates, decays = (jnp.pad(v, (0, missing)).reshape(-1, block, 1, 1) for v in (rates, decays))
    scale = 0.5 * (1 + jnp.cos(jnp.pi * jnp.arange(len(order)) / len(order)))

    def choice(x):  # [examples, features] of one choice of features
        def body(carry, now):
            rows, scale = now
            inputs = x[rows]
            targets = jax.nn.one_hot(label[rows], num_classes, axis=0)  # [classes, batch]
            step = functools.partial(_step, inputs=inputs, targets=targets, scale=scale)
            return jax.lax.map(lambda args: step(*args), (*carry, rates, decays)), None

        shape = len(rates), block, num_classes
        weights, bias = jnp.zeros((*shape, x.shape[1])), jnp.zeros((*shape, 1))
        start = (weights, bias), (weights, bias)
        ((weights, bias), _), _ = jax.lax.scan(body, start, (order, scale))
        count = len(rates) * block - missing
        weights = weights.reshape(-1, *weights.shape[2:])[:count].swapaxes(1, 2)
        return weights, bias.reshape(-1, num_classes)[:count]

    return jax.vmap(choice)(x)


def _step(params, velocity, rates, decays, *, inputs, targets, scale):
    """One step of SGD for a block: weights [block, classes, features], bias [block, classes, 1]."""
    weights, bias = params
    width, count = inputs.shape[1], inputs.shape[0]
    logits = jnp.einsum("cf,bf->cb", weights.reshape(-1, width), inputs)
    logits = logits.reshape(*weights.shape[:2], count) + bias
    error = (jax.nn.softmax(logits, axis=1) - targets) / count  # the loss's gradient by the logits
    grads = jnp.einsum("cb,bf->cf", error.reshape(-1, count), inputs).reshape(weights.shape)
    grads = grads + decays * weights, error.sum(axis=2, keepdims=True)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
    rate = scale * rates
    return jax.tree.map(lambda p, v: p - rate * v, params, velocity), velocity


def hits(probes: Probes, choice: int, x: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[settings, examples] bool: which examples each setting of a feature choice tells right."""
    weights, bias = probes.weights[choice][:, : x.shape[1]], probes.bias[choice]
    settings, width, classes = weights.shape
    flat = weights.transpose(1, 0, 2).reshape(width, settings * classes)
    parts = []
    for start in range(0, len(x), 8192):
        logits = x[start : start + 8192] @ flat
        logits = logits.reshape(-1, settings, classes) + bias
        parts.append(logits.argmax(axis=-1) == label[start : start + 8192, None])
    return np.concatenate(parts).T
