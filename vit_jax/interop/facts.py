"""What a source tells besides its arrays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vit_jax.preprocess import HALF


@dataclasses.dataclass
class Facts:
    """What a source tells besides its arrays.

    Attributes:
      pool: `make_pool`'s name.
      known: `VisionTransformer`'s arguments, None where the source does not say.
      mean, std, crop_fraction, interpolation: of the preprocessing, see `Spec`.
      class_names: of the head, in order; empty if unknown.
      dropped: our name -> why the model does not use it.
      notes: what was assumed.
    """

    pool: str
    known: dict[str, Any]
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop_fraction: float | None = 0.875
    interpolation: str = "bilinear"
    class_names: tuple[str, ...] = ()
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def _is_whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least  # True is an int in Python, and none here


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list_of(value: Any, test: Any, *lengths: int) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(test, value))


def _is_size(value: Any) -> bool:
    return _is_whole(value) or _is_list_of(value, _is_whole, 2, 3)


def _is_resize(value: Any) -> bool:
    sides = value.values() if isinstance(value, Mapping) else [value]
    return bool(sides) and all(map(_is_whole, sides))


# What a value of somebody's JSON has to be, in words and as a test.
KINDS = {
    "an object": lambda x: isinstance(x, Mapping),
    "a text": lambda x: isinstance(x, str),
    "true or false": lambda x: isinstance(x, bool),
    "a whole number from 0": lambda x: _is_whole(x, 0),
    "a whole number from 1": _is_whole,
    "a number": _is_number,
    "a positive number": lambda x: _is_number(x) and x > 0,
    "three numbers": lambda x: _is_list_of(x, _is_number, 3),
    "three positive numbers": lambda x: _is_list_of(x, lambda y: _is_number(y) and y > 0, 3),
    "a size in pixels": _is_size,
    "height and width": lambda x: _is_list_of(x, _is_whole, 2),
    "a size or an object of sizes": _is_resize,
    "texts": lambda x: isinstance(x, list | tuple) and all(isinstance(y, str) for y in x),
}


@dataclasses.dataclass(frozen=True)
class Told:
    """A JSON object from elsewhere, whose values are looked at before they are used.

    Attributes:
      values: the object.
      file: its name, for messages.
    """

    values: Mapping[str, Any]
    file: str = "config.json"

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        """The value, or `default` where there is none or null.

        Raises:
          ValueError: it is no `kind`, which is one of KINDS.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not KINDS[kind](value):
            raise self.damaged(f"{key}={value!r} is not {kind}")
        return value

    def part(self, key: str) -> "Told":
        """The object under a key; an empty one where there is none."""
        return Told(self.get(key, "an object", {}), self.file)

    def damaged(self, why: str) -> ValueError:
        """The error, in one line."""
        return ValueError(f"its {self.file} is damaged ({why}); fetch it again.")


def pair(size: Any) -> tuple[int, int] | None:
    """224 or [224, 224] as (224, 224), of [3, 224, 224] the sides; None stays None."""
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))
