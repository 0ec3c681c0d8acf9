"""A config's evaluations: built, run on a model in training, or on a checkpoint."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.checkpoint import Checkpoints
from vit_jax.data.feed import Feed
from vit_jax.data.sources import DatasetInfo, dataset_info
from vit_jax.evals import EVALS
from vit_jax.feeding import make_feed, pad_batch, put_batch
from vit_jax.functional import Functional
from vit_jax.sharding import make_mesh
from vit_jax.train import abstract_state, make_parts


def make_evals(config: ConfigDict, info: DatasetInfo, feed: Feed) -> dict[str, Any]:
    """The config's evaluations by the names that it gives them, for a model trained on `info`."""
    evals = {}
    for key, section in config.evals.items():
        if key in ("train", "speed") or "/" in key:
            raise ValueError(f"evals.{key}: metrics of that name are taken; call it otherwise.")
        evaluation, options = config_lib.choose(f"evals.{key}", EVALS, section)
        derived = {"class_names": info.class_names, "feed": feed}
        evals[key] = config_lib.call(f"evals.{key}", evaluation, options, **derived)
    return evals


def fingerprints(info: DatasetInfo, evals: Mapping[str, Any]) -> dict[str, str]:
    """Of every dataset that a run reads, by its section of the config."""
    return {"data": info.fingerprint} | {f"evals.{k}": e.info.fingerprint for k, e in evals.items()}


def evaluate(
    evals: Mapping[str, Any],
    model: Functional,
    mesh: jax.sharding.Mesh,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{'test/top1': …} of all evaluations; check_stop is called at every batch."""

    def put(batch):
        return put_batch(pad_batch(batch, mesh), mesh)

    with jax.set_mesh(mesh):  # kernels choose by it
        return {
            f"{key}/{name}": value
            for key, evaluation in evals.items()
            for name, value in evaluation.run(model, put=put, check_stop=check_stop).items()
        }


def summary(results: Mapping[str, float]) -> str:
    """'test accuracy 98.33% (354 of 360), loss 0.06' for each evaluation that has a top1."""
    parts = []
    for key in dict.fromkeys(key.split("/")[0] for key in results):
        if f"{key}/top1" in results:
            top1, count = results[f"{key}/top1"], int(results[f"{key}/count"])
            text = f"{key} accuracy {top1:.2%} ({round(top1 * count)} of {count})"
            if f"{key}/loss" in results:
                loss = results[f"{key}/loss"]  # null in the file if it was not finite
                text += f", loss {float('nan') if loss is None else loss:.4f}"
            parts.append(text)
    return "; ".join(parts)


def evaluate_checkpoint(
    config: ConfigDict, workdir: epath.Path, *, step: int | None = None
) -> tuple[int, dict[str, float]]:
    """Runs a config's evaluations on a checkpoint, the newest by default, on this machine.

    Returns:
      The checkpoint's step, and metrics as `evaluate` gives them.

    Raises:
      FileNotFoundError: no checkpoint there; those that are there are listed.
      ValueError: the checkpoint does not fit the config or the dataset.
    """
    mesh = config_lib.call("mesh", make_mesh, config.mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    with contextlib.closing(checkpoints):
        steps = checkpoints.steps()
        if not steps or step not in (None, *steps):
            found = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"no checkpoint {step or ''} in {workdir}; there are: {found}.")
        step = steps[-1] if step is None else step
        info = dataset_info(config.data.name, data_dir=config.data.data_dir)
        evals = make_evals(config, info, make_feed(mesh))
        parts, init = make_parts(config, info)
        abstract = abstract_state(init, mesh)
        state, meta = checkpoints.restore(step, abstract, without=parts.not_of_model(abstract))
        for key, now in fingerprints(info, evals).items():
            if meta["fingerprints"].get(key, now) != now:
                raise ValueError(
                    f"the dataset of {key} is not the one of the run {workdir} (other "
                    "fingerprint); prepare that one again, or train anew."
                )
    return step, evaluate(evals, parts.model(state), mesh)
