"""What evaluations read of a model, computed once for each example, and kept on disk.

Names of features:

- 'logits': of the head;
- 'pooled': what the head reads (without a head, the model's answer);
- 'cls', 'gap': the class token and the mean of the patches after the final norm;
- 'cls_gap': both side by side;
- 'last_4': of each of the last 4 (or any number of) blocks the class token after the final norm,
  side by side (Caron et al. 2021, appendix F.2); without a class token the mean of the patches.
"""

import functools
import hashlib
import json
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.functional import Functional
from vit_jax.models.model import Model

FORMAT = 1  # of what is on disk; another one is another place

Put = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Features(NamedTuple):
    """Of the readable examples of a split, in the split's order.

    Attributes:
      values: name -> [examples, …] float32.
      label: [examples] int32.
      index: [examples] int64, their places in the split.
      rejected: how many examples could not be read.
    """

    values: dict[str, np.ndarray]
    label: np.ndarray
    index: np.ndarray
    rejected: int


def extract(
    model: Functional,
    loader: Any,
    names: Sequence[str],
    *,
    put: Put,
    check_stop: Callable[[], None] = lambda: None,
) -> Features:
    """Runs the model over a split once, at the speed of its forward pass.

    Args:
      model: its parameters on the devices.
      loader: every example once, `make_eval_loader`'s or an evaluation's; closed at the end.
      names: of the features, see above.
      put: places a host batch on the devices.
      check_stop: called at every batch; may raise to give up.

    Raises:
      ValueError: the model has no such feature, or an example was lost.
    """
    check_names(model.module(), names)
    run = functools.partial(_batch, tuple(names), *model)
    parts, pending = [], None
    with loader:
        total = len(loader.source)
        for batch in loader:
            check_stop()
            arrays = {key: batch[key] for key in ("image", "label", "mask")}
            arrays |= {"index": batch["index"].astype(np.int32), "rejected": batch["error"] != ""}
            dispatched = run(put(arrays))
            if pending is not None:  # fetched while the next batch is computed
                parts.append(_fetch(pending))
            pending = dispatched
    parts.append(_fetch(pending))
    rejected = sum(int(part.pop("rejected").sum()) for part in parts)
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    label, index = joined.pop("label"), joined.pop("index").astype(np.int64)
    if len(np.unique(index)) + rejected != total or len(index) + rejected != total:
        raise ValueError(f"evaluation counted {len(index)} + {rejected} rejected of {total}.")
    return Features(joined, label, index, rejected)


def check_names(model: Model, names: Sequence[str]) -> None:
    """Raises ValueError for a feature that the model does not have."""
    for name in names:
        last, _, number = name.rpartition("_")
        depth = model.backbone.depth
        if last == "last" and number.isdigit():
            if not 1 <= int(number) <= depth:
                raise ValueError(f"feature {name!r} wants {number} blocks of {depth}.")
        elif name not in ("logits", "pooled", "cls", "gap", "cls_gap"):
            raise ValueError(
                f"feature {name!r} is unknown; use logits, pooled, cls, gap, cls_gap or last_N."
            )
        if name == "logits" and model.head is None:
            raise ValueError("the model has no head, so no logits; use knn, fewshot, linear_probe.")
        if name in ("cls", "cls_gap") and model.backbone.cls_token is None:
            raise ValueError(f"feature {name!r} needs a model with a class token; use 'gap'.")


def _fetch(batch: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    if jax.process_count() > 1:
        batch = multihost_utils.process_allgather(batch, tiled=True)
    host = {key: np.asarray(value) for key, value in batch.items()}
    mask, rejected = host.pop("mask"), host.pop("rejected")
    return {key: value[mask] for key, value in host.items()} | {"rejected": rejected}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch(names, build, variables, batch) -> dict[str, jax.Array]:
    """The named features of a batch, and all but the images as it is."""
    model = build(variables)
    kept = {key: value for key, value in batch.items() if key != "image"}
    if set(names) <= {"logits"}:
        return kept | {"logits": model(batch["image"])}
    counts = [int(name.removeprefix("last_")) for name in names if name.startswith("last_")]
    backbone = model.backbone
    embedded = backbone.embed(model.preprocess(batch["image"]))
    layers = tuple(range(-max(counts, default=0), 0))
    found = backbone.encode(embedded, layers=layers)
    tokens, outputs = found if layers else (found, [])
    pooled = model.pool(tokens)
    values = {}
    for name in names:
        if name == "logits":
            values[name] = model.head(pooled)
        elif name == "pooled":
            values[name] = pooled.reshape(len(pooled), -1)
        elif name.startswith("last_"):
            blocks = outputs[len(outputs) - int(name.removeprefix("last_")) :]
            values[name] = jnp.concatenate([_summary(backbone, x) for x in blocks], axis=-1)
        else:
            parts = {"cls": tokens[:, 0], "gap": _gap(backbone, tokens)}
            values[name] = jnp.concatenate([parts[part] for part in name.split("_")], axis=-1)
    return kept | {name: value.astype(jnp.float32) for name, value in values.items()}


def _gap(backbone, tokens: jax.Array) -> jax.Array:
    return tokens[:, backbone.num_prefix_tokens :].mean(axis=1, dtype=jnp.float32)


def _summary(backbone, tokens: jax.Array) -> jax.Array:
    x = tokens if backbone.norm is None else backbone.norm(tokens)
    return _gap(backbone, x) if backbone.cls_token is None else x[:, 0].astype(jnp.float32)


def feature_key(checkpoint: str, dataset: str, split: str, augment: Mapping[str, Any]) -> str:
    """The name of a feature set: a digest of all that its numbers depend on.

    Args:
      checkpoint, dataset: fingerprints.
      split: of the dataset.
      augment: the evaluation's recipe, its size too.
    """
    what = [FORMAT, checkpoint, dataset, split, dict(augment)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


class FeatureCache:
    """Feature sets on disk: a folder each, whole or not there; read by memory map."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def load(self, key: str, names: Sequence[str]) -> Features | None:
        """The set, if it is there with all these names, undamaged."""
        folder = self.folder / key
        paths = {name: folder / f"{name}.npy" for name in names}
        if not all(path.exists() for path in paths.values()) or not folder.exists():
            return None
        try:
            values = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
            label, index = (np.load(folder / f"{name}.npy") for name in ("label", "index"))
            rejected = json.loads((folder / "meta.json").read_text())["rejected"]
        except (ValueError, EOFError, OSError):  # cut short, by a full disk or a copy
            return None
        return Features(values, label, index, rejected)

    def drop_damaged(self, key: str) -> None:
        """Removes a set of which a file cannot be read; whoever calls keeps others away."""
        if self.load(key, sorted(self.names(key))) is None:
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def names(self, key: str) -> set[str]:
        """The features that a set has by now."""
        found = {path.stem for path in (self.folder / key).glob("*.npy")}
        return found - {"label", "index"}

    def save(self, key: str, features: Features) -> None:
        """Keeps a set; what another process kept meanwhile under the same key is the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        beside.mkdir()
        try:
            arrays = {**features.values, "label": features.label, "index": features.index}
            for name, array in arrays.items():
                np.save(beside / f"{name}.npy", array)
            (beside / "meta.json").write_text(json.dumps({"rejected": features.rejected}))
            target = self.folder / key
            if not target.exists():
                try:
                    beside.rename(target)
                    return
                except OSError:  # another process was quicker
                    pass
            for name in features.values:
                (beside / f"{name}.npy").replace(target / f"{name}.npy")
        finally:
            shutil.rmtree(beside, ignore_errors=True)
