"""Flags of a command: absl flags on values of their own, and errors in one line."""

import difflib
from collections.abc import Callable, Sequence

from absl import flags


def parse(
    argv: Sequence[str], define: Callable[[flags.FlagValues], None], *, usage: str
) -> tuple[flags.FlagValues, list[str]]:
    """Parses a command's arguments; returns its flags and the other arguments, in order.

    Flags are known to this call alone, so commands cannot clash, and a notebook or test may call
    any number of them.

    Args:
      argv: the arguments, without the name of the command.
      define: defines the flags, as in `flags.DEFINE_string("name", …, flag_values=values)`.
      usage: the help text that stands above the list of flags.

    Raises SystemExit(0) after printing the help that `--help` asks for, and ValueError for an
    unknown or malformed flag.
    """
    values = flags.FlagValues()
    define(values)
    asked = argv[: list(argv).index("--")] if "--" in argv else argv
    if {"-h", "-help", "--help"} & set(asked):
        print(f"{usage}\n\nFlags:\n{values.get_help('  ')}")
        raise SystemExit(0)
    try:
        # The first argument of absl's own call is the program's name.
        positional = values(["vit-jax", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown(error.flagname, sorted(values))) from error
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from error
    return values, positional


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown flag --{name}; did you mean --{near[0]}?"
    return f"unknown flag --{name}; there are {', '.join('--' + each for each in known)}"


def parse_size(name: str, text: str | None) -> tuple[int, int] | None:
    """Height and width of '224' or '224x128'; None stays None."""
    if not text:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--{name}={text} must be in pixels, like 224 or 224x128.")
    return int(sides[0]), int(sides[-1])
