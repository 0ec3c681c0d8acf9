"""Names of activations' axes, by which whoever runs a model may split them over devices.

A model says what an axis is: 'batch', 'heads' (attention's), 'hidden' (an MLP's channels), 'dim'
(the residual stream's), 'draws' (random numbers that every device is to draw for itself), or None
for one that may lie anyhow. It also says where it starts to use its parameters. What becomes of
that is said outside, within `splitting`; elsewhere the names do nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Splitting(Protocol):
    """How named axes are split over devices."""

    def num_parts(self, axis: str) -> int:
        """Into how many parts an axis is split, 1 for none."""

    def split(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """x, its axes split by their names."""

    def gather(self, params: Any, prefix: str, dtype: DTypeLike) -> Any:
        """Parameters, no longer split as between steps; only those that were are of `dtype`."""


_splitting: contextvars.ContextVar[Splitting | None] = contextvars.ContextVar(
    "splitting", default=None
)


@contextlib.contextmanager
def splitting(how: Splitting) -> Iterator[None]:
    """Models that are traced inside are split so."""
    token = _splitting.set(how)
    try:
        yield
    finally:
        _splitting.reset(token)


def named(x: jax.Array, *axes: str | None) -> jax.Array:
    """x itself; `axes` name its axes, from the first on, the rest have no name."""
    how = _splitting.get()
    return x if how is None else how.split(x, axes + (None,) * (x.ndim - len(axes)))


def num_parts(axis: str) -> int:
    """Into how many parts an axis will be split; 1 unless somebody splits it."""
    how = _splitting.get()
    return 1 if how is None else how.num_parts(axis)


def gathered(params: Any, prefix: str, dtype: DTypeLike = jnp.float32) -> Any:
    """Parameters as products want them, no longer split to save memory; gradients go back.

    Args:
      params: a tree of arrays.
      prefix: of their names, such as 'blocks/0/'.
      dtype: of the products, in which matrices travel.
    """
    how = _splitting.get()
    return params if how is None else how.gather(params, prefix, dtype)
