"""Models as compiled functions take them: taking a module apart costs milliseconds each time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx


class Functional(NamedTuple):
    """A model, taken apart.

    Attributes:
      build: variables -> model; static (it can be hashed, at once), and called while compiling.
      variables: a tree of arrays.
    """

    build: Callable[[Any], nnx.Module]
    variables: Any

    @classmethod
    def of(cls, model: nnx.Module) -> "Functional":
        """Takes a module apart."""
        graphdef, state = nnx.split(model)
        return cls(Merge(graphdef), nnx.to_pure_dict(state))

    def module(self) -> nnx.Module:
        """Puts it together."""
        return self.build(self.variables)


@dataclasses.dataclass(frozen=True)
class Merge:
    """What `Functional.of` builds a module by; equal for equal graphdefs."""

    graphdef: nnx.GraphDef

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.graphdef)  # takes a third of a millisecond, and jit asks at every call

    def __call__(self, variables: Any) -> nnx.Module:
        """The module with these variables."""
        return nnx.merge(self.graphdef, variables)
