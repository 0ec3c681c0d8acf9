"""`config.init_from`: a new run's first parameters from weights of another model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_jax.checkpoint import STACKED, unstack
from vit_jax.interop.load import adapt, read_source
from vit_jax.interop.tables import Report
from vit_jax.models.vit import VisionTransformer
from vit_jax.tree import named_leaves


def start_from(
    path: epath.PathLike, params: Mapping[str, Any], backbone: VisionTransformer
) -> tuple[dict[str, Any], Report]:
    """A new run's parameters, with those of `path` in place of what was drawn.

    The backbone must be the same but for the resolution and the patch size, for which positions are
    resampled and patches resized. Pooling and head are taken where the shapes are the same, else
    they stay as drawn; nothing is passed over silently.

    Args:
      path: see `load`.
      params: {'backbone': …, 'objective': …} as a new run draws them, on the host or not.
      backbone: the new run's, for its sizes.

    Returns:
      The same tree, its leaves NumPy arrays, and what became of every array.

    Raises:
      ValueError: a backbone of another shape.
    """
    source = read_source(path, num_heads=backbone.num_heads)
    source = adapt(source, image_size=backbone.image_size, patch_size=backbone.patch_size)
    report = source.report
    drawn = named_leaves(params)
    wanted = {name: np.asarray(leaf) for name, leaf in unstack(drawn).items()}
    taken = {}
    for name, array in source.params.items():
        own = name if name.startswith("backbone/") else f"objective/{name}"
        if own in wanted and wanted[own].shape == array.shape:
            taken[own] = array
        elif own.startswith("backbone/") and own in wanted:
            raise ValueError(
                f"init_from={path}: {name} is {array.shape}, config.model makes it "
                f"{wanted[own].shape}; make the model like the weights ({source.spec.backbone})."
            )
        else:
            shape = wanted[own].shape if own in wanted else "nothing"
            report.unexpected.append(f"{name}: {array.shape} there, {shape} in this run")
    report.missing += [f"{name}: stays as drawn" for name in wanted if name not in taken]
    if lacking := [name for name in wanted if name.startswith("backbone/") and name not in taken]:
        raise ValueError(
            f"init_from={path} has nothing for {lacking[0]} and {len(lacking) - 1} more of the "
            f"backbone; make the model like the weights ({source.spec.backbone})."
        )
    leaves = _stacked({name: taken.get(name, array) for name, array in wanted.items()}, drawn)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values())), report


def _stacked(leaves: dict[str, np.ndarray], drawn: Mapping[str, Any]) -> dict[str, np.ndarray]:
    out = {}
    for name, leaf in drawn.items():
        if match := STACKED.match(name):
            parts = [leaves[f"{match[1]}/{i}/{match[2]}"] for i in range(leaf.shape[0])]
            out[name] = np.stack(parts)
        else:
            out[name] = leaves[name]
    return out
