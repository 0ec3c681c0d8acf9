"""The flag --config=FILE[:arg] and the overrides --config.a.b=value."""

import inspect
import pathlib
import runpy
from collections.abc import Callable, Iterable, Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

import vit_jax
from vit_jax.commands.flags import parse
from vit_jax.config import flatten, plain, recipe_path
from vit_jax.sharding import make_mesh
from vit_jax.spelling import nearest
from vit_jax.train import TrainOptions

PACKAGE = epath.Path(vit_jax.__file__).parent
# An installed package carries the recipes inside, a checkout has them beside it.
RECIPE_FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
SWEEP_FOLDERS = tuple(folder / "sweeps" for folder in RECIPE_FOLDERS)


def load_config(text: str) -> ConfigDict:
    """The config of 'configs/digits.py:debug', or of 'digits:debug' by the recipe's name.

    Raises:
      FileNotFoundError: no such file or recipe.
      ValueError: the file does not define get_config, or does not take the argument.
    """
    config = _load(text, RECIPE_FOLDERS)
    _complete(config)
    return config


def load_sweep(text: str) -> ConfigDict:
    """The same for the file of a sweep: 'configs/sweeps/digits.py', or 'digits' by name."""
    return _load(text, SWEEP_FOLDERS)


def _load(text: str, folders: Iterable[epath.Path]) -> ConfigDict:
    name, _, arg = text.partition(":")
    path = recipe_path(name, folders)
    try:
        get_config = runpy.run_path(str(pathlib.Path(path))).get("get_config")
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}.") from error
    if get_config is None:
        raise ValueError(f"{path} defines no get_config(arg='').")
    config = get_config(arg)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {path} gives a {type(config).__name__}, not a ConfigDict.")
    return config


def _complete(config: ConfigDict) -> None:
    """Gives a recipe what says where and how it runs, so that it can be overridden in all."""
    with config.unlocked():
        if "init_from" not in config:
            config.init_from = ""  # any recipe can start from weights
        mesh = {k: v.default for k, v in inspect.signature(make_mesh).parameters.items()}
        del mesh["devices"]
        config.mesh = mesh | plain(config.get("mesh", {}))
        options = {k: getattr(TrainOptions, k) for k in ("spmd", "accumulate", "offload_opt_state")}
        config.train = options | plain(config.get("train", {}))


def parse_with_config(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    *,
    usage: str,
    load: Callable[[str], ConfigDict] = load_config,
) -> tuple[flags.FlagValues, ConfigDict]:
    """Parses flags, --config and its overrides.

    Args:
      argv: without the command's name.
      define: defines the other flags.
      usage: for --help.
      load: reads what --config names.

    Returns:
      The flags, and the config with the overrides in it.

    Raises:
      ValueError: no --config, an unknown key (the nearest is named), or a value of a wrong type.
    """
    text, rest = take_config(list(argv))
    if text is None:
        parse(rest, define, usage=usage)  # answers --help
        raise ValueError("--config is missing: give a file or a recipe, like --config=digits.")
    config = load(text)
    known = flatten(config)
    for argument in rest:
        key = argument.lstrip("-").split("=", 1)[0]
        if argument.startswith("-") and key.startswith("config.") and key[7:] not in known:
            raise ValueError(f"--{key}: the config has no such key{nearest(key[7:], known)}.")

    def define_all(values: flags.FlagValues) -> None:
        define(values)
        arguments = ["vit-jax", *rest]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)

    values, positional = parse(rest, define_all, usage=usage)
    if positional:
        raise ValueError(f"argument {positional[0]!r} is unknown; flags start with --.")
    return values, values.config


def take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """What --config names (None without it), and the other arguments."""
    for index, argument in enumerate(argv):
        if argument in ("--config", "-config") and index + 1 < len(argv):
            return argv[index + 1], argv[:index] + argv[index + 2 :]
        if argument.startswith(("--config=", "-config=")):
            return argument.split("=", 1)[1], argv[:index] + argv[index + 1 :]
    return None, argv
