"""Config files: finding, validating, comparing and recording them."""

import fnmatch
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vit_jax.spelling import nearest

TOP_LEVEL = {
    *("seed", "total_steps", "batch_size", "log_every", "eval_every", "save_every"),
    *("model", "objective", "preprocess", "augment", "data", "optimizer", "mesh", "train", "evals"),
}
OPTIONAL = {"init_from"}  # weights that a new run starts from, see vit_jax/interop/start.py

# What may change between two starts on one workdir: it alters when and how fast, never what.
CHANGEABLE = (
    *("log_every", "eval_every", "save_every", "mesh", "train.keep", "train.keep_best"),
    *("train.spmd", "train.accumulate", "train.offload_opt_state"),
    *("train.max_skips", "train.wandb", "data.data_dir", "data.num_workers", "data.num_threads"),
    *("data.prefetch", "data.strict", "evals.*.data_dir", "evals.*.batch_size"),
    *("evals.*.num_workers", "evals.*.strict"),
)


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses a config's argument, 'variant=S/16,epochs=90,debug', by the types of the defaults.

    A bare word turns on the bool of that name, or, where there is none, is an error.

    Raises:
      ValueError: an unknown name (the nearest is named) or a value of the wrong type.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise ValueError(
                f"config argument {name!r} is unknown{nearest(name, defaults)}; "
                f"choose from {', '.join(defaults)}."
            )
        kind = type(defaults[name])
        if not equals and kind is not bool:
            raise ValueError(f"config argument {name!r} needs a value of {kind.__name__}.")
        values[name] = _parse_value(name, text if equals else "true", kind)
    return ConfigDict(values)


def _parse_value(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"config argument {name}={text!r} must be true or false.")
        return text.lower() in ("true", "1")
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"config argument {name}={text!r} must be of {kind.__name__}.") from error


def check_top_level(config: ConfigDict) -> None:
    """Raises ValueError for a section that nothing reads, or one that is missing."""
    for key in config:
        if key not in TOP_LEVEL | OPTIONAL:
            near = nearest(key, TOP_LEVEL | OPTIONAL)
            raise ValueError(f"config has an unknown key {key!r}{near}.")
    if missing := sorted(TOP_LEVEL - set(config)):
        raise ValueError(f"config lacks {', '.join(missing)}.")
    for key in ("total_steps", "batch_size", "log_every"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be at least 1.")


def call(section: str, function: Callable, values: Mapping[str, Any], **derived: Any) -> Any:
    """function(**values, **derived), after `check_keys`; of `derived` only what it takes."""
    parameters = check_keys(section, function, values, derived)
    derived = {key: value for key, value in derived.items() if key in parameters}
    return function(**plain(values), **derived)


def check_keys(
    section: str, function: Callable, values: Mapping[str, Any], derived: Iterable[str] = ()
) -> Mapping[str, inspect.Parameter]:
    """Checks a section's keys against a signature, and answers the signature's parameters.

    Args:
      section: name in the config, for messages.
      function: takes keyword arguments.
      values: the config section.
      derived: names of what the run adds; not to be set in the config.

    Raises:
      ValueError: a key that the function does not take (the nearest is named), or a missing one.
    """
    # Of a class, its __init__: the metaclass of NNX modules hides it.
    target = functools.partial(function.__init__, None) if isinstance(function, type) else function
    parameters = inspect.signature(target).parameters
    allowed = [name for name in parameters if name not in derived]
    for key in values:
        if key not in allowed:
            raise ValueError(f"config.{section} has an unknown key {key!r}{nearest(key, allowed)}.")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in values and name not in derived:
            raise ValueError(f"config.{section} lacks {name!r}.")
    return parameters


def choose(section: str, choices: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Any, dict]:
    """The choice that a section's 'name' makes, and the section's other values.

    Raises:
      ValueError: a name that is not among the choices; they are listed.
    """
    rest = dict(plain(values))
    name = rest.pop("name", None)
    if name not in choices:
        raise ValueError(
            f"config.{section}.name={name!r} is unknown{nearest(str(name), choices)}; "
            f"choose one of {', '.join(choices)}."
        )
    return choices[name], rest


def plain(values: Any) -> Any:
    """ConfigDicts and tuples as plain dicts and lists, as they are after a trip through JSON."""
    if isinstance(values, (ConfigDict, Mapping)):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return [plain(value) for value in values]
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in plain(values).items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that another config does not have."""
    text = json.dumps(flatten(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'key: old -> new' for each leaf that differs and may not change during a run."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _changeable(key)
    ]


def _changeable(key: str) -> bool:
    return any(fnmatch.fnmatch(key, p) or key.startswith(f"{p}.") for p in CHANGEABLE)


def save_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(json.dumps(plain(values), indent=2) + "\n")
    temporary.replace(path)


def load_run_config(workdir: epath.Path) -> ConfigDict:
    """The resolved config of a run.

    Raises:
      FileNotFoundError: no run was ever started there.
      ValueError: its config.json is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {workdir}: it has no config.json of a run.")
    try:
        return parse_config(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def parse_config(text: str) -> ConfigDict:
    """The config of a JSON object; raises ValueError where it is none."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no object")
    return ConfigDict(values)


def recipe_path(name: str, folders: Iterable[epath.Path]) -> str:
    """The file of a recipe given by path ('configs/digits.py') or by name ('digits').

    Raises:
      FileNotFoundError: neither; the known names are listed.
    """
    if epath.Path(name).is_file():
        return name
    known = {}
    for folder in folders:
        if folder.exists():
            known |= {path.stem: path for path in sorted(folder.glob("*.py"))}
    if name in known:
        return str(known[name])
    stem = epath.Path(name).stem
    raise FileNotFoundError(
        f"config {name!r} does not exist{nearest(stem, known)}; "
        f"give a path or one of {', '.join(sorted(known))}."
    )


def dataset_splits(name: str, *, data_dir: str) -> dict[str, int]:
    """Number of examples of each split of a dataset: what turns epochs into steps.

    A published dataset need not be prepared for that; training then asks for it.

    Raises:
      FileNotFoundError: the dataset is missing, with the command that makes it.
    """
    # A config without epochs need not wait for these.
    from vit_jax.data.published import published_splits
    from vit_jax.data.sources import dataset_info

    try:
        return dataset_info(name, data_dir=data_dir).splits
    except FileNotFoundError:
        splits = published_splits(name)
        if splits is None:
            raise
        return splits


# Where a dataset has several of them, the first is watched: a benchmark's test split is for the
# end, and some (ImageNet's among them) have no labels there.
EVAL_SPLITS = ("validation", "val", "valid", "test")


def train_and_eval_splits(
    name: str, *, data_dir: str, eval_split: str = "", percent: int = 10
) -> tuple[str, str, int]:
    """The split to train on, the one to evaluate on while training, and the first one's examples.

    Args:
      name: of the dataset.
      data_dir: where it lies.
      eval_split: what is wanted; '' takes the first of EVAL_SPLITS that is there.
      percent: of train that is held out where there is none. Records are stored in random order,
        so no class is lost.

    Raises:
      FileNotFoundError: see `dataset_splits`.
    """
    splits = dataset_splits(name, data_dir=data_dir)
    num_examples = splits.get("train", 1)  # the loader says what is missing
    there = [split for split in EVAL_SPLITS if split in splits]
    if eval_split or there:
        return "train", eval_split or there[0], num_examples
    kept = 100 - percent
    return f"train[:{kept}%]", f"train[{kept}%:]", num_examples * kept // 100


def weights_config(path: str, *, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """'model' (a section's values), 'pool', 'mean' and 'std' of weights that a run starts from.

    `image_size` helps where the weights do not tell it: oblong images in google's `.npz`.

    Raises:
      FileNotFoundError, ValueError: nothing there, or no weights; see `vit_jax.load`.
    """
    from vit_jax.interop.load import read_source  # only recipes that start from weights wait for it
    from vit_jax.interop.spec import config_of

    return config_of(read_source(path, image_size=image_size).spec)
