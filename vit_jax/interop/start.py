"""`config.init_from`: a new run's first parameters from weights of another model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_jax.checkpoint import STACKED, unstack
from vit_jax.interop.load import Source, adapt, read_source
from vit_jax.interop.spec import backbone_arguments
from vit_jax.interop.tables import Report
from vit_jax.models.model import Model
from vit_jax.tree import named_leaves

LOGITS = ("head/fc/", "head/fc_dist/")  # what belongs to the classes


def start_from(
    path: epath.PathLike,
    params: Mapping[str, Any],
    model: Model,
    *,
    class_names: Sequence[str] = (),
) -> tuple[dict[str, Any], Report]:
    """A new run's parameters, with those of `path` in place of what was drawn.

    The backbone must be the same but for the resolution and the patch size, for which positions are
    resampled and patches resized. Pooling and head are taken where the shapes are the same, the
    logits' layer also only for the same classes; else they stay as drawn. Nothing is passed over
    silently.

    Args:
      path: see `load`.
      params: {'backbone': …, 'objective': …} as a new run draws them, on the host or not.
      model: the new run's, for its sizes.
      class_names: of the new run, in the order of its logits.

    Returns:
      The same tree, its leaves NumPy arrays, and what became of every array.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no weights, or a backbone of another shape.
    """
    backbone = model.backbone
    hints = {"num_heads": backbone.num_heads, "image_size": backbone.image_size}
    source = read_source(path, **hints)
    _compare(path, source, model)
    source = adapt(source, image_size=backbone.image_size, patch_size=backbone.patch_size)
    report, theirs = source.report, source.spec.class_names
    other_classes = bool(theirs and class_names) and tuple(theirs) != tuple(class_names)
    drawn = named_leaves(params)
    wanted = {name: np.asarray(leaf) for name, leaf in unstack(drawn).items()}
    taken = {}
    for name, array in source.params.items():
        own = name if name.startswith("backbone/") else f"objective/{name}"
        if name.startswith(LOGITS) and other_classes:
            report.unexpected.append(f"{name}: its classes are others than the run's")
        elif own in wanted and wanted[own].shape == array.shape:
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


def _compare(path: epath.PathLike, source: Source, model: Model) -> None:
    """What no array's shape tells: other heads are refused, the rest is noted."""
    theirs, ours = source.spec.backbone, backbone_arguments(model.backbone)
    if theirs["num_heads"] != ours["num_heads"]:
        raise ValueError(
            f"init_from={path} has num_heads={theirs['num_heads']}, config.model has "
            f"{ours['num_heads']}; make them the same."
        )
    for key in ("activation", "norm", "norm_eps", "pos_embed", "parallel"):
        if theirs[key] != ours[key]:
            source.report.notes.append(f"{key}={theirs[key]!r} there, {ours[key]!r} in this run")
    for key in ("mean", "std"):
        there, here = getattr(source.spec, key), getattr(model.preprocess, key)
        if not np.allclose(there, here):
            said = [" ".join(f"{x:.4f}" for x in values) for values in (there, here)]
            source.report.notes.append(
                f"normalised with {key} {said[0]} there, {said[1]} in this run"
            )


def _stacked(leaves: dict[str, np.ndarray], drawn: Mapping[str, Any]) -> dict[str, np.ndarray]:
    out = {}
    for name, leaf in drawn.items():
        if match := STACKED.match(name):
            parts = [leaves[f"{match[1]}/{i}/{match[2]}"] for i in range(leaf.shape[0])]
            out[name] = np.stack(parts)
        else:
            out[name] = leaves[name]
    return out
