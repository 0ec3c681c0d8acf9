"""Weighted nearest neighbours, exact, on the device."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from vit_jax.evals.base import Evaluation, Reader, Scores, Value, check_numbers
from vit_jax.evals.intervals import bootstrap, pack_bits

QUERIES = 1024  # at once
BANK = 65536  # at once, of each device: what stands in memory is QUERIES × BANK similarities


@dataclasses.dataclass(kw_only=True, eq=False)
class Knn(Evaluation):
    """k nearest neighbours by cosine, votes weighted by exp(similarity / temperature).

    As DINO defines it (Caron et al. 2021, section 4.1; the weights of Wu et al. 2018, section 3.4).

    Args:
      bank_split: whose labelled examples vote.
      feature: see `vit_jax/features.py`.
      k: how many neighbours, each a result of its own.
      temperature: of the weights.

    The other arguments are `Evaluation`'s.
    """

    bank_split: str = "train"
    feature: str = "pooled"
    k: Sequence[int] = (10, 20, 100, 200)
    temperature: float = 0.07

    def __post_init__(self):
        super().__post_init__()
        check_numbers("k", self.k, least=1, whole=True)
        check_numbers("temperature", [self.temperature], above=True)
        self.check_split(self.bank_split)
        self.wants = {self.bank_split: (self.feature,), self.split: (self.feature,)}

    def measure(self, reader: Reader) -> Scores:
        """top1_k10, top5_k10, … for each k, and top1: that of the first k.

        Artefacts: 'bank' (its size), 'correct' (of the first k, see `pack_bits`).
        """
        bank = self.read(reader, self.bank_split)
        queries = self.read(reader, self.split)
        if max(self.k) > len(bank.label):
            raise ValueError(
                f"k={max(self.k)} neighbours of a bank of {len(bank.label)}; set a smaller k."
            )
        similarity, index = neighbours(
            queries.values[self.feature], bank.values[self.feature], max(self.k)
        )
        votes = bank.label[index]  # [queries, k]
        num_classes, values, first = len(self.info.class_names), [], None
        for k in self.k:
            best = vote(similarity[:, :k], votes[:, :k], num_classes, self.temperature)
            hits = best == queries.label[:, None]
            columns = np.stack([hits[:, 0], hits.any(axis=1)], axis=1)
            low, high = bootstrap(columns, lambda means: means)
            for at, name in enumerate(("top1", "top5")):
                number = float(columns[:, at].mean())
                interval = float(low[at]), float(high[at])
                values.append(Value(f"{name}_k{k}", number, len(hits), *interval))
            first = hits[:, 0] if first is None else first
        values.insert(0, values[0]._replace(metric="top1"))
        return Scores(values, {"bank": len(bank.label), "correct": pack_bits(first, queries.index)})


def vote(
    similarity: np.ndarray, labels: np.ndarray, num_classes: int, temperature: float
) -> np.ndarray:
    """The classes with the most weight, best first.

    Args:
      similarity, labels: [queries, k], of the neighbours.
      num_classes: of the dataset.
      temperature: of the weights.

    Returns:
      [queries, 5] classes, or all if there are fewer; ties by the lowest.
    """
    weights = np.exp(similarity.astype(np.float64) / temperature)
    # Each query's votes in bins of its own: no array of all classes times all neighbours.
    bins = labels + num_classes * np.arange(len(labels))[:, None]
    size = len(labels) * num_classes
    totals = np.bincount(bins.reshape(-1), weights.reshape(-1), minlength=size)
    totals = totals.reshape(len(labels), num_classes)
    found, rows = [], np.arange(len(labels))
    for _ in range(min(5, num_classes)):
        found.append(totals.argmax(axis=1))
        totals[rows, found[-1]] = -1.0
    return np.stack(found, axis=1)


def neighbours(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of the bank to each query, by cosine; exact up to float32.

    The bank is split over all devices; each goes over its part in chunks and keeps its best k.

    Args:
      queries: [queries, features].
      bank: [examples, features].
      k: at most the bank's size.

    Returns:
      [queries, k] similarities, highest first (ties by the lowest index), and indices.
    """
    devices = np.array(jax.local_devices())
    mesh = Mesh(devices, ("bank",), axis_types=(AxisType.Auto,))
    chunk = min(BANK, -(-len(bank) // len(devices)))
    missing = -len(bank) % (chunk * len(devices))
    rows = np.pad(np.asarray(bank, np.float32), ((0, missing), (0, 0)))
    at_once = min(QUERIES, len(queries))
    search = _make_search(mesh, k, chunk, len(bank))
    found = []
    with jax.set_mesh(mesh):  # whatever mesh the model was evaluated on
        place = jax.sharding.NamedSharding(mesh, PartitionSpec("bank"))
        rows = _unit_rows(jax.device_put(rows, place))
        for start in range(0, len(queries), at_once):
            part = np.asarray(queries[start : start + at_once], np.float32)
            padded = np.pad(part, ((0, at_once - len(part)), (0, 0)))  # one program for all
            found.append((len(part), search(_unit_rows(jnp.asarray(padded)), rows)))
    found = [(np.asarray(x)[:count], np.asarray(i)[:count]) for count, (x, i) in found]
    similarity, index = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return similarity, index


@functools.lru_cache(maxsize=8)
def _make_search(mesh: Mesh, k: int, chunk: int, size: int):
    """(queries, the bank's rows) -> similarities and indices, [queries, k]."""

    def best(similarity, index):
        top, at = jax.lax.top_k(similarity, min(k, similarity.shape[1]))
        return top, jnp.take_along_axis(index, at, axis=1)

    def local(queries, rows):  # one device's part of the bank
        first = jax.lax.axis_index("bank") * len(rows)
        chunks = rows.reshape(-1, chunk, rows.shape[1])

        def body(kept, part):
            number, part = part
            index = first + number * chunk + jnp.arange(chunk)
            # The similarities decide the order: no bfloat16 on accelerators.
            found = jnp.matmul(queries, part.T, precision=jax.lax.Precision.HIGHEST)
            found = jnp.where(index < size, found, -jnp.inf)
            found, index = best(found, jnp.broadcast_to(index, found.shape))
            joined = [
                jnp.concatenate(pair, axis=1) for pair in zip(kept, (found, index), strict=True)
            ]
            return best(*joined), None

        shape = len(queries), k
        start = jnp.full(shape, -jnp.inf), jnp.full(shape, size)
        kept, _ = jax.lax.scan(body, start, (jnp.arange(len(chunks)), chunks))
        parts = [jax.lax.all_gather(x, "bank", axis=1, tiled=True) for x in kept]
        return best(*parts)

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("bank")),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


@jax.jit
def _unit_rows(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
