"""Training sweeps: the same recipe with other leaves, by grid or by chance."""

import collections
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.config import plain
from vit_jax.sweep.checkpoints import digest

RANGE = {"low", "high", "log"}
TRIES = 100  # draws for each run that is wanted, repeated ones among them


def variations(
    leaves: Mapping[str, Any], *, samples: int = 0, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """name -> {'optimizer.learning_rate': 3e-4, …} for each run.

    Args:
      leaves: nested as the config is; each leaf a list of choices, or, with `samples`, a range
        {'low': 1e-4, 'high': 1e-2, 'log': True}.
      samples: how many runs are drawn, each leaf on its own, no run twice; 0 takes every
        combination.
      seed: of the draw.

    Raises:
      ValueError: a leaf that is neither, or that repeats a choice; a range without `samples`; too
        many `samples`.
    """
    if samples < 0:
        raise ValueError(f"training.samples={samples} must be 0 (every combination) or more.")
    choices = dict(_choices("", plain(leaves)))
    if not samples:
        for key, values in choices.items():
            if isinstance(values, dict):
                raise ValueError(
                    f"training.leaves.{key} is a range; set training.samples, or list values."
                )
        combined = itertools.product(*choices.values())
        runs = [dict(zip(choices, values, strict=True)) for values in combined]
    else:
        runs = _draw_runs(np.random.default_rng(seed), choices, samples)
    varied = [key for key in choices if len({repr(run[key]) for run in runs}) > 1]
    names = [_name(run, varied) for run in runs]
    # Values that differ only in what a folder's name cannot hold: 'a/b' and 'a_b'.
    twice = {name for name, count in collections.Counter(names).items() if count > 1}
    return {
        f"{name}-{digest(run)[:8]}" if name in twice else name: run
        for name, run in zip(names, runs, strict=True)
    }


def _choices(prefix: str, values: Mapping[str, Any]):
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and not set(value) <= RANGE:
            yield from _choices(f"{name}.", value)
        elif isinstance(value, dict) and {"low", "high"} <= set(value):
            if not value["low"] <= value["high"] or (value.get("log") and value["low"] <= 0):
                raise ValueError(f"training.leaves.{name}={value} is no range.")
            yield name, value
        elif isinstance(value, list) and value:
            if len({repr(choice) for choice in value}) < len(value):
                raise ValueError(
                    f"training.leaves.{name}={value} repeats a choice: each is one run; for "
                    "several runs of one recipe list values of `seed`."
                )
            yield name, value
        else:
            raise ValueError(
                f"training.leaves.{name}={value!r} must be a list of choices or a range."
            )


def _draw_runs(
    rng: np.random.Generator, choices: Mapping[str, Any], samples: int
) -> list[dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = {}
    for _ in range(TRIES * samples):
        run = {key: _draw(rng, values) for key, values in choices.items()}
        runs.setdefault(repr(run), run)
        if len(runs) == samples:
            return list(runs.values())
    raise ValueError(
        f"training.samples={samples} is more than the {len(runs)} different runs that were found "
        f"in {TRIES * samples} draws; set fewer, or 0 for every combination of lists."
    )


def _draw(rng: np.random.Generator, values: Any) -> Any:
    if isinstance(values, list):
        return values[int(rng.integers(len(values)))]
    low, high = values["low"], values["high"]
    if values.get("log"):
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        drawn = rng.uniform(low, high)
    if isinstance(low, int) and isinstance(high, int):
        return int(min(max(round(drawn), low), high))
    return float(f"{drawn:.4g}")  # what stands in the run's name


def _name(run: Mapping[str, Any], varied: list[str]) -> str:
    parts = [f"{key.rpartition('.')[2]}={run[key]}" for key in varied]
    name = ",".join(parts).replace("/", "_").replace(" ", "") or "run"
    # Leaves of the same last name, and long ones, still give each run a folder of its own.
    clash = len({key.rpartition(".")[2] for key in varied}) < len(varied)
    return f"{name[:80]}-{digest(run)[:8]}" if clash or len(name) > 80 else name
