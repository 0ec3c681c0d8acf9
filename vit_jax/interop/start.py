"""`config.init_from`: a new run's first parameters from weights of another model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_jax.checkpoint import STACKED, unstack
from vit_jax.interop.load import Source, adapt, read_source
from vit_jax.interop.spec import arguments_of
from vit_jax.interop.tables import Report
from vit_jax.models.vit import VisionTransformer
from vit_jax.preprocess import Preprocess
from vit_jax.tree import named_leaves


def start_from(
    path: epath.PathLike,
    params: Mapping[str, Any],
    backbone: VisionTransformer,
    preprocess: Preprocess,
) -> tuple[Any, Report]:
    """A new run's parameters, with those of `path` in place of what was drawn.

    The backbone must be the same but for resolution and patch size: positions are resampled,
    patches resized. Pooling and head are taken where their shapes are the same; else they stay as
    drawn. The report tells of every array.

    Args:
      path: see `load`.
      params: {'backbone': …, 'objective': …} as the run draws them.
      backbone: the run's.
      preprocess: the run's.

    Returns:
      The same tree, its leaves NumPy arrays, and the report.

    Raises:
      ValueError: a backbone that computes something else.
    """
    source = read_source(path, num_heads=backbone.num_heads)
    source = adapt(source, image_size=backbone.image_size, patch_size=backbone.patch_size)
    _check_same(path, source, arguments_of(backbone))
    report = source.report
    if (source.spec.mean, source.spec.std) != (tuple(preprocess.mean), tuple(preprocess.std)):
        report.notes.append(
            f"the weights want mean {source.spec.mean} and std {source.spec.std}, this run has "
            f"{tuple(preprocess.mean)} and {tuple(preprocess.std)}"
        )
    drawn = named_leaves(params)
    leaves = {name: np.asarray(leaf) for name, leaf in unstack(drawn).items()}
    kept = set(leaves)
    for name, array in source.params.items():
        own = name if name.startswith("backbone/") else f"objective/{name}"
        if own in leaves and leaves[own].shape == array.shape:
            leaves[own] = array
            kept.discard(own)
        else:
            here = leaves[own].shape if own in leaves else "nothing"
            report.unexpected.append(f"{name}: {array.shape} there, {here} in this run")
    report.missing += [f"{name}: stays as drawn" for name in leaves if name in kept]
    stacked = [_leaf(name, leaf, leaves) for name, leaf in drawn.items()]
    return jax.tree.unflatten(jax.tree.structure(params), stacked), report


def _check_same(path: epath.PathLike, source: Source, wanted: Mapping[str, Any]) -> None:
    found = source.spec.backbone
    if wrong := [f"{key}={found[key]!r}" for key in wanted if found[key] != wanted[key]]:
        wanted = ", ".join(wrong)
        raise ValueError(
            f"init_from={path} is another backbone than config.model: set {wanted} there."
        )


def _leaf(name: str, leaf: Any, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """A leaf of the run's tree; of scanned blocks all layers."""
    if not (match := STACKED.match(name)):
        return leaves[name]
    return np.stack([leaves[f"{match[1]}/{i}/{match[2]}"] for i in range(leaf.shape[0])])
