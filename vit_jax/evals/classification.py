"""Accuracy, loss and calibration on a labelled split, every example counted once."""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax.data.loader import HOST_ONLY
from vit_jax.evals.base import Evaluation, Put, Reader, Scores, Value
from vit_jax.evals.intervals import bootstrap, pack_bits
from vit_jax.features import Features
from vit_jax.functional import Functional
from vit_jax.losses import softmax_cross_entropy

NUM_BINS = 15
NUM_MISTAKES = 24


@dataclasses.dataclass(kw_only=True, eq=False)
class Classification(Evaluation):
    """Top-1, top-5, softmax cross-entropy and calibration of the model's own head.

    Args:
      subset: which of the head's classes compete; the other logits are masked. () for all, which
        must then be the dataset's. 'dataset' or a list: classes by name, among them all of the
        dataset's (ImageNet-A, -R, -O). A mapping from each of the dataset's classes to the head's
        that count as right for it (ObjectNet).
      labels: a JSON file of the classes of each example that count as right (ReaL, Beyer et al.
        2020): an object by file name without folder and ending (where these repeat, by the whole
        name as the dataset has it), or a list in the order of those names; classes by name or by
        number. Examples without any are left out.
      class_names: of the head; () takes the dataset's.

    The other arguments are `Evaluation`'s.

    Raises:
      ValueError: classes that do not match; they are named.
    """

    FILES = ("labels",)

    subset: str | Sequence[str] | Mapping[str, Sequence[str]] = ()
    labels: str = ""
    class_names: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        self.wants = {self.split: ("logits",)}
        classes = self.info.class_names
        self._head = tuple(self.class_names) or classes
        self._competing, self._right = matched(self._head, classes, self.subset, self.dataset)
        self._labels = read_labels(self.labels) if self.labels else None

    def run(
        self,
        model: Functional,
        *,
        put: Put,
        check_stop: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Evaluates `model(images) -> logits` in a training loop; see `Evaluation`.

        Returns:
          top1, top5 (shares of the counted examples), loss (nats), count, rejected (unreadable
          images, which count as neither right nor wrong); with `subset` or `labels` the values of
          `measure`.

        Raises:
          ValueError: an example was lost or counted twice.
        """
        if self.subset or self.labels:
            return super().run(model, put=put, check_stop=check_stop)
        sums, pending = np.zeros(5), None
        with self.loader(self.split) as loader:
            for batch in loader:
                check_stop()
                arrays = {key: value for key, value in batch.items() if key not in HOST_ONLY}
                arrays["rejected"] = batch["error"] != ""
                dispatched = _batch_sums(*model, put(arrays))
                if pending is not None:  # fetched while the next batch is computed
                    sums += np.asarray(pending, np.float64)
                pending = dispatched
            total = len(loader.source)
        sums += np.asarray(pending, np.float64)
        top1, top5, loss, count, rejected = sums
        if int(count + rejected) != total:
            raise ValueError(
                f"evaluation counted {count:.0f} + {rejected:.0f} rejected of {total}."
            )
        means = {"top1": top1, "top5": top5, "loss": loss}
        means = {name: float(value / max(count, 1)) for name, value in means.items()}
        return means | {"count": int(count), "rejected": int(rejected)}

    def measure(self, reader: Reader) -> Scores:
        """top1, top5, loss, ece, class_mean (of the classes' accuracies); each with an interval.

        With several right classes an example's loss is that of their joint probability.

        Artefacts: 'reliability' (bins with confidence, accuracy, count), 'per_class' (class, top1,
        count), 'confusion' (class_names, and [true, predicted, count] cells that are not zero),
        'mistakes' (the most confident ones: index, label, predicted, confidence), 'correct' (see
        `pack_bits`), 'rejected'.
        """
        features = self.read(reader, self.split)
        right, kept = self._targets(features)
        logits = np.asarray(features.values["logits"])[kept]
        if not len(logits):
            raise ValueError("no example is left: none has a class that counts as right.")
        if logits.shape[1] != len(self._head):
            raise ValueError(
                f"the model's head has {logits.shape[1]} classes, not {len(self._head)}; give its "
                "class names, or use knn, fewshot or linear_probe."
            )
        label, index = features.label[kept], features.index[kept]
        found = score_logits(logits, right, self._competing)
        columns = np.stack([found.top1, found.top5, found.loss], axis=1)
        values = _means(columns, found, label, len(self.info.class_names))
        artefacts = self._artefacts(found, label, index) | {"rejected": features.rejected}
        return Scores(values, artefacts)

    def _targets(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """[kept, head's classes] bool: what is right for each; and which examples are kept."""
        if self._labels is None:
            return self._right[features.label], np.ones(len(features.label), bool)
        chosen = self._labels_of(features)
        right = np.zeros((len(features.label), len(self._head)), bool)
        numbers = {name: number for number, name in enumerate(self._head)}
        for row, classes in enumerate(chosen):
            right[row, [_number(each, numbers) for each in classes]] = True
        kept = right.any(axis=1)
        return right[kept], kept

    def _labels_of(self, features: Features) -> list[Sequence[Any]]:
        with self.loader(self.split) as loader:
            source = loader.source
            names = example_names([source[index] for index in range(len(source))])
        table = self._labels
        if isinstance(table, list):
            if len(table) != len(names):
                raise ValueError(f"labels has {len(table)} entries for {len(names)} examples.")
            table = dict(zip(sorted(names), table, strict=True))
        if missing := [names[index] for index in features.index if names[index] not in table]:
            raise ValueError(
                f"labels lacks {len(missing)} examples, the first: {missing[0]!r} (names without "
                "folder and ending, or whole ones where those repeat)."
            )
        return [table[names[index]] for index in features.index]

    def _artefacts(self, found: "Scored", label: np.ndarray, index: np.ndarray) -> dict[str, Any]:
        names = self._head
        pairs, counts = np.unique(np.stack([label, found.predicted]), axis=1, return_counts=True)
        cells = np.concatenate([pairs, counts[None]]).T.tolist()
        wrong = np.flatnonzero(~found.top1)
        worst = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:NUM_MISTAKES]
        accuracy, counted = _by_class(found.top1, label, len(self.info.class_names))
        return {
            "reliability": reliability(found.confidence, found.top1),
            "per_class": [
                {"class": name, "top1": float(share) if count else None, "count": int(count)}
                for name, share, count in zip(self.info.class_names, accuracy, counted, strict=True)
            ],
            "confusion": {
                "class_names": list(self.info.class_names),
                "predicted_names": list(names),
                "cells": cells,
            },
            "mistakes": [
                {
                    "index": int(index[row]),
                    "label": self.info.class_names[label[row]],
                    "predicted": names[found.predicted[row]],
                    "confidence": float(found.confidence[row]),
                }
                for row in worst
            ],
            "correct": pack_bits(found.top1, index),
        }


class Scored:
    """Of each example: right at 1 and at 5 (bool), loss in nats, the prediction, its probability.

    Args:
      logits: [examples, classes].
      right: [examples, classes] bool.
      competing: [classes] bool, the others are masked.
    """

    def __init__(self, logits: np.ndarray, right: np.ndarray, competing: np.ndarray):
        scores = np.where(competing, logits.astype(np.float64), -np.inf)
        best = _best(scores, min(5, int(competing.sum())))
        hits = np.take_along_axis(right & competing, best, axis=1)
        self.top1, self.top5, self.predicted = hits[:, 0], hits.any(axis=1), best[:, 0]
        shifted = scores - scores.max(axis=1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=1))
        wanted = np.where(right, shifted, -np.inf)
        own = wanted.max(axis=1)  # the joint probability of all that are right
        with np.errstate(divide="ignore"):
            joint = own + np.log(np.exp(wanted - own[:, None]).sum(axis=1))
        self.loss = total - joint
        self.confidence = np.exp(-total)


def _best(scores: np.ndarray, number: int) -> np.ndarray:
    """The highest, [examples, number], ties by lowest index; far quicker than sorting all."""
    left, rows, found = scores.copy(), np.arange(len(scores)), []
    for _ in range(number):
        found.append(left.argmax(axis=1))
        left[rows, found[-1]] = -np.inf
    return np.stack(found, axis=1)


def score_logits(logits: np.ndarray, right: np.ndarray, competing: np.ndarray) -> Scored:
    """Ranks and losses in float64, in pieces that fit in memory; see `Scored`."""
    at_once = max((1 << 24) // logits.shape[1], 1)
    parts = [
        Scored(logits[start : start + at_once], right[start : start + at_once], competing)
        for start in range(0, len(logits), at_once)
    ]
    whole = parts[0]
    for name in vars(whole):
        setattr(whole, name, np.concatenate([getattr(part, name) for part in parts]))
    return whole


def calibration_columns(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[examples, bins]: confidence - correct in the example's bin; |mean| summed is the ECE."""
    columns = np.zeros((len(confidence), NUM_BINS))
    columns[np.arange(len(confidence)), bin_of(confidence)] = confidence - correct
    return columns


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Which bin (b/15, (b+1)/15] holds each confidence (Guo et al. 2017, section 2)."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """The reliability curve: of each bin its ends, mean confidence, accuracy and count."""
    bins, rows = bin_of(confidence), []
    for number in range(NUM_BINS):
        inside = bins == number
        count = int(inside.sum())
        row = {"low": number / NUM_BINS, "high": (number + 1) / NUM_BINS, "count": count}
        row["confidence"] = float(confidence[inside].mean()) if count else None
        row["accuracy"] = float(correct[inside].mean()) if count else None
        rows.append(row)
    return rows


def _means(columns: np.ndarray, found: Scored, label: np.ndarray, num_classes: int) -> list[Value]:
    count = len(label)
    finite = np.isfinite(columns[:, 2])
    columns[:, 2] = np.where(finite, columns[:, 2], 0.0)
    columns = np.concatenate([columns, calibration_columns(found.confidence, found.top1)], axis=1)

    def statistic(means: np.ndarray) -> np.ndarray:
        ece = np.abs(means[:, 3:]).sum(axis=1, keepdims=True)
        return np.concatenate([means[:, :3], ece], axis=1)

    point = statistic(columns.mean(axis=0, keepdims=True))[0]
    low, high = bootstrap(columns, statistic)
    names = ("top1", "top5", "loss", "ece")
    values = [
        Value(name, float(x), count, float(a), float(b))
        for name, x, a, b in zip(names, point, low, high, strict=True)
    ]
    if not finite.all():
        values[2] = Value("loss", float("nan"), count)
    accuracy, counted = _by_class(found.top1, label, num_classes)
    return values + [Value("class_mean", float(accuracy[counted > 0].mean()), count)]


def _by_class(correct: np.ndarray, label: np.ndarray, num_classes: int) -> tuple:
    counts = np.bincount(label, minlength=num_classes)
    hits = np.bincount(label, weights=correct, minlength=num_classes)
    return hits / np.maximum(counts, 1), counts


def matched(
    head: Sequence[str],
    classes: Sequence[str],
    subset: str | Sequence[str] | Mapping[str, Sequence[str]],
    dataset: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the head's classes compete, [head] bool, and are right for a label, [labels, head].

    Raises:
      ValueError: names that the head, or the subset, does not have.
    """
    if isinstance(subset, str) and subset and subset != "dataset":
        raise ValueError(f"subset={subset!r} must be 'dataset', a list or a mapping of classes.")
    if not subset:
        if tuple(head) != tuple(classes):
            raise ValueError(_differ(head, classes, dataset))
        subset = list(classes)
    if subset == "dataset":
        subset = list(classes)
    groups = subset if isinstance(subset, Mapping) else {name: [name] for name in subset}
    repeated = [name for name, count in collections.Counter(head).items() if count > 1]
    if repeated:
        raise ValueError(
            f"the model's head has {_some(repeated)} more than once, so its classes cannot be told "
            "by name; give each a name of its own."
        )
    numbers = {name: number for number, name in enumerate(head)}
    unknown = [name for group in groups.values() for name in group if name not in numbers]
    absent = [name for name in classes if name not in groups]
    for what, names in (("the model's head lacks", unknown), ("subset lacks", absent)):
        if names:
            raise ValueError(f"{what} {_some(names)}; dataset={dataset!r} needs them by name.")
    right = np.zeros((len(classes), len(head)), bool)
    for label, name in enumerate(classes):
        right[label, [numbers[each] for each in groups[name]]] = True
    competing = np.zeros(len(head), bool)
    competing[[numbers[name] for group in groups.values() for name in group]] = True
    return competing, right


def _differ(head: Sequence[str], classes: Sequence[str], dataset: str) -> str:
    lacking = [name for name in classes if name not in set(head)]
    more = [name for name in head if name not in set(classes)]
    said = f"dataset={dataset!r} has other classes than the training data"
    if not lacking and not more:
        return f"{said}, or has them in another order; set subset='dataset' to go by the names."
    parts = [f"the head lacks {_some(lacking)}"] if lacking else []
    parts += [f"the dataset lacks {_some(more)}"] if more else []
    way = "use knn, fewshot or linear_probe" if lacking else "set subset='dataset' to mask the rest"
    return f"{said}: {', '.join(parts)}; {way}."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def read_labels(path: str) -> dict[str, list] | list[list]:
    """A file of several right classes an example, see `Classification`.

    Raises:
      FileNotFoundError, ValueError: not there, or not that.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"labels={path!r} does not exist; give a JSON file.")
    try:
        table = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"labels={path!r} is no JSON file ({error}).") from error
    rows = table.values() if isinstance(table, dict) else table
    if not isinstance(table, (dict, list)) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"labels={path!r} must hold, for each example, a list of classes.")
    return table


def _number(name: Any, numbers: Mapping[str, int]) -> int:
    number = numbers.get(name) if isinstance(name, str) else name
    if number is not None and type(number) is not int:
        raise ValueError(f"labels names the class {name!r}; give a class's name or its number.")
    if number is None or not 0 <= number < len(numbers):
        raise ValueError(f"labels names the class {name!r}, which the model's head lacks.")
    return number


def example_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What each example of a split is called in a table of labels.

    The file's name without folder and ending, or, where these repeat, the whole name as the record
    has it; of a record without one, its place in the split.

    Raises:
      ValueError: whole names repeat as well.
    """
    whole = []
    for index, record in enumerate(records):
        name = record.get("filename", record.get("file_name", b""))
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        whole.append(name or f"{index:012}")
    stems = [re.sub(r"\.\w+$", "", name.rpartition("/")[2]) or name for name in whole]
    for names in (stems, whole):
        (name, count), *_ = collections.Counter(names).most_common(1)
        if count == 1:
            return names
    raise ValueError(
        f"labels cannot be told apart by name: {count} examples of the split are called {name!r}; "
        "prepare the dataset from files of different names."
    )


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(build, variables, batch) -> jax.Array:
    """[5] float32: correct at 1, at 5, loss, count over the valid examples; count of rejected."""
    logits, mask = build(variables)(batch["image"]), batch["mask"]
    num_classes = logits.shape[-1]
    _, best = jax.lax.top_k(logits, min(5, num_classes))  # [batch, 5], ties by lowest index
    hits = (best == batch["label"][:, None]) & mask[:, None]
    losses = softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], num_classes))
    parts = hits[:, 0], hits.any(1), jnp.where(mask, losses, 0.0), mask, batch["rejected"]
    return jnp.stack([part.sum(dtype=jnp.float32) for part in parts])
