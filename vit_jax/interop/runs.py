"""Models of our own training runs."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from vit_jax.checkpoint import Checkpoints
from vit_jax.config import TOP_LEVEL, load_run_config, parse_config
from vit_jax.data.sources import DatasetInfo
from vit_jax.interop.spec import params_of, spec_of
from vit_jax.interop.tables import Report


def read_run(workdir: epath.Path, *, step: int | None = None) -> tuple:
    """(spec, params, report) of a checkpoint: of the averaged parameters where there are any.

    Neither the dataset nor the devices of the run are needed.

    Raises:
      FileNotFoundError: no checkpoint, or not that one.
      ValueError: it does not fit its config.
    """
    config = load_run_config(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    with contextlib.closing(checkpoints):
        steps = checkpoints.steps()
        if not steps or step not in (None, *steps):
            found = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"no checkpoint {step or ''} in {workdir}; there are: {found}.")
        step = steps[-1] if step is None else step
        meta = checkpoints.meta(step)
        with _perhaps_newer(workdir / "config.json"):
            if missing := sorted(TOP_LEVEL - set(config)):
                raise ValueError(f"config lacks {', '.join(missing)}.")
            values = config.to_dict() | {"seed": 0}, meta["dataset"], meta["preprocess"]
            parts, abstract = _structure(*map(json.dumps, values))
        state, _ = checkpoints.restore(step, abstract, without=parts.not_of_model(abstract))
    model = parts.model(state).module()
    params = params_of(model)
    report = Report(layout=f"vit_jax checkpoint {step}", matched=len(params))
    spec = spec_of(model, tuple(meta["dataset"]["class_names"]))
    return dataclasses.replace(spec, **_resize(config.evals)), params, report


@functools.lru_cache(maxsize=8)
def _structure(config: str, dataset: str, preprocess: str) -> tuple:
    """(parts, shapes of the state) of a run: the same whatever its seed, and slow to trace."""
    from vit_jax.sharding import make_mesh
    from vit_jax.train import abstract_state, make_parts

    info = _info(json.loads(dataset), json.loads(preprocess))
    parts, init = make_parts(parse_config(config), info)
    mesh = make_mesh(devices=jax.local_devices()[:1])  # each process reads all
    return parts, abstract_state(init, mesh)


@contextlib.contextmanager
def _perhaps_newer(path: epath.Path) -> Iterator[None]:
    """What this version does not know of a run's config may be a newer one's: that is said."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{path}: {str(error).rstrip('.')}; if the run is of a newer vit_jax, upgrade: "
            "pip install -U vit-jax."
        ) from error


def _resize(evals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`Spec`'s words for the first evaluation's: the whole image, if it takes it as it is."""
    for evaluation in evals.values():
        augment = evaluation.get("augment", {})
        crops = {"resize_center_crop": augment.get("crop_fraction", 0.875), "stretch": None}
        return {
            "crop_fraction": crops.get(augment.get("name"), 1.0),
            "interpolation": augment.get("interpolation", "bilinear"),
        }
    return {}


def _info(dataset: Mapping[str, Any], preprocess: Mapping[str, Any]) -> DatasetInfo:
    """The dataset as the checkpoint remembers it."""
    return DatasetInfo(
        name=dataset["name"],
        path=epath.Path(dataset["name"]),
        splits=dataset["splits"],
        class_names=tuple(dataset["class_names"]),
        fingerprint=dataset["fingerprint"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )
