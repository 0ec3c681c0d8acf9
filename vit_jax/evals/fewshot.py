"""Ridge regression on a few examples of each class, in closed form."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax.evals.base import Evaluation, Reader, Scores, Value, check_numbers
from vit_jax.evals.intervals import bootstrap, pack_bits

BIAS = 100.0  # the constant feature: large, so that the ridge hardly shrinks the bias
L2 = tuple(2.0**i for i in range(-10, 20))


@dataclasses.dataclass(kw_only=True, eq=False)
class Fewshot(Evaluation):
    """Linear classifiers from 5, 10 or 25 examples a class, as big_vision measures them.

    Features are standardised by the examples' mean and deviation, a constant feature of 100 is the
    bias, targets are ±1 (Kolesnikov et al. 2020, BiT, section 3.3; the grid of L2 is big_vision's).
    The strength of the ridge is chosen on training examples that are not among the shots.

    Args:
      train_split: where the shots come from.
      feature: see `vit_jax/features.py`.
      shots: examples a class, each number a result of its own.
      l2: strengths tried.
      num_held_out: at most so many of the other training examples choose the strength.
      seed: of the choice of examples.

    The other arguments are `Evaluation`'s.
    """

    train_split: str = "train"
    feature: str = "pooled"
    shots: Sequence[int] = (5, 10, 25)
    l2: Sequence[float] = L2
    num_held_out: int = 10_000
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_numbers("shots", self.shots, least=1, whole=True)
        check_numbers("l2", self.l2, above=True)
        for name in ("num_held_out", "seed"):
            check_numbers(name, [getattr(self, name)], whole=True)
        self.check_split(self.train_split)
        self.wants = dict.fromkeys((self.train_split, self.split), (self.feature,))

    def measure(self, reader: Reader) -> Scores:
        """top1_5shot, …, and top1: that of the most shots.

        Artefacts: 'fewshot' (shots, l2, the held-out accuracy of each strength, how many examples
        were there), 'correct' (of the most shots, see `pack_bits`).
        """
        train = self.read(reader, self.train_split)
        test = self.read(reader, self.split)
        x, num_classes = np.asarray(train.values[self.feature]), len(self.info.class_names)
        order = np.random.default_rng(self.seed).permutation(len(train.label))
        values, rows, correct = [], [], None
        for shots in sorted(self.shots):
            chosen, others = choose_shots(train.label, order, shots, num_classes)
            others = others[: self.num_held_out]
            held_out = others if len(others) else chosen
            ridge = Ridge(x[chosen], train.label[chosen], num_classes)
            tried = [ridge.accuracy(x[held_out], train.label[held_out], l2) for l2 in self.l2]
            best = self.l2[int(np.argmax(tried))]
            correct = ridge.predict(test.values[self.feature], best) == test.label
            low, high = bootstrap(correct[:, None], lambda means: means)
            number = float(correct.mean()), len(correct), float(low[0]), float(high[0])
            values.append(Value(f"top1_{shots}shot", *number))
            rows.append({"shots": shots, "l2": best, "examples": len(chosen), "held_out": tried})
        values.insert(0, values[-1]._replace(metric="top1"))
        return Scores(values, {"fewshot": rows, "correct": pack_bits(correct, test.index)})


def choose_shots(
    label: np.ndarray, order: np.ndarray, shots: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `shots` of each class in `order`, and all others; so more shots hold the fewer.

    Raises:
      ValueError: a class has fewer.
    """
    shuffled = label[order]
    # The place of each among its class: sorted by class, its distance from the class's first.
    by_class = np.argsort(shuffled, kind="stable")
    counts = np.bincount(shuffled, minlength=num_classes)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(label), int)
    rank[by_class] = np.arange(len(label)) - first
    if counts.min() < shots:
        raise ValueError(
            f"{shots} shots of class {int(counts.argmin())}, which has {counts.min()}; set fewer."
        )
    return order[rank < shots], order[rank >= shots]


class Ridge:
    """Ridge regression onto ±1 targets, for any strength from one decomposition.

    Solves (XᵀX + λI) W = XᵀY, in the smaller of the two spaces, in float64.

    Args:
      x: [examples, features].
      label: [examples].
      num_classes: of the targets.
    """

    def __init__(self, x: np.ndarray, label: np.ndarray, num_classes: int):
        x = np.asarray(x, np.float64)
        self._mean, self._std = x.mean(axis=0), x.std(axis=0) + 1e-5
        x = self._extend(x)
        y = 2.0 * np.eye(num_classes)[label] - 1.0
        if len(x) >= x.shape[1]:
            self._eigen, self._left = np.linalg.eigh(x.T @ x)
            self._right = self._left.T @ (x.T @ y)
        else:  # (XᵀX + λI)⁻¹ Xᵀ = Xᵀ (XXᵀ + λI)⁻¹
            self._eigen, vectors = np.linalg.eigh(x @ x.T)
            self._left, self._right = x.T @ vectors, vectors.T @ y
        self._eigen = np.maximum(self._eigen, 0.0)

    def _extend(self, x: np.ndarray) -> np.ndarray:
        x = (np.asarray(x, np.float64) - self._mean) / self._std
        return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)

    def weights(self, l2: float) -> np.ndarray:
        """[features + 1, classes] for a strength; the last row belongs to the constant."""
        return self._left @ (self._right / (self._eigen + l2)[:, None])

    def predict(self, x: np.ndarray, l2: float) -> np.ndarray:
        """[examples, features] -> [examples] classes."""
        weights, predicted = self.weights(l2), []
        for start in range(0, len(x), 8192):
            predicted.append((self._extend(x[start : start + 8192]) @ weights).argmax(axis=1))
        return np.concatenate(predicted)

    def accuracy(self, x: np.ndarray, label: np.ndarray, l2: float) -> float:
        """Share of the examples that are told right."""
        return float((self.predict(x, l2) == label).mean())
