"""What happens to arrays when they are renamed: named, invertible pairs on NumPy arrays.

A row of a rename table joins n names of ours and m of theirs, one of the two counts being 1. Each
pair concatenates what is in several parts and splits it again into equal ones, so both directions
of every pair are exact: `backward(forward(theirs)) == theirs`, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Arrays = Sequence[np.ndarray]


class Pair(NamedTuple):
    """Both directions of a transform.

    Attributes:
      forward: (their arrays, number of ours) -> our arrays.
      backward: (our arrays, number of theirs, heads) -> their arrays.
    """

    forward: Callable[[Arrays, int], list[np.ndarray]]
    backward: Callable[[Arrays, int, int], list[np.ndarray]]


def _join(arrays: Arrays, axis: int) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


def _split(array: np.ndarray, parts: int, axis: int) -> list[np.ndarray]:
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"shape {array.shape} has too few axes")
    if array.shape[axis] % parts:
        raise ValueError(f"an axis of {array.shape[axis]} does not split into {parts} parts")
    return np.split(array, parts, axis)


def _flat_heads(array: np.ndarray) -> np.ndarray:
    """[…, heads, head_dim] -> […, heads * head_dim]."""
    if array.ndim < 2:
        raise ValueError(f"shape {array.shape} has no axis of heads")
    return array.reshape(*array.shape[:-2], -1)


def _with_heads(array: np.ndarray, heads: int) -> np.ndarray:
    return array.reshape(*array.shape[:-1], heads, -1)


def _squeeze(array: np.ndarray) -> np.ndarray:
    if array.shape[:1] != (1,):
        raise ValueError(f"shape {array.shape} should begin with 1")
    return array[0]


def _fold_proj(array: np.ndarray) -> np.ndarray:
    """[heads, head_dim, dim] -> [heads * head_dim, dim]."""
    if array.ndim != 3:
        raise ValueError(f"shape {array.shape} should be heads, head_dim, dim")
    return array.reshape(-1, array.shape[-1])


TRANSFORMS: dict[str, Pair] = {
    # As it is; several parts lie one behind the other on the last axis (biases).
    "same": Pair(
        lambda theirs, n: _split(_join(theirs, -1), n, -1),
        lambda ours, m, heads: _split(_join(ours, -1), m, -1),
    ),
    # torch's Linear keeps [out, in], here it is [in, out]; parts lie along out.
    "linear": Pair(
        lambda theirs, n: _split(_join(theirs, 0).T, n, 1),
        lambda ours, m, heads: _split(_join(ours, 1).T, m, 0),
    ),
    # torch's Conv2d keeps [out, in, height, width], here it is [height, width, in, out].
    "conv": Pair(
        lambda theirs, n: [theirs[0].transpose(2, 3, 1, 0)],
        lambda ours, m, heads: [ours[0].transpose(3, 2, 0, 1)],
    ),
    # Tokens and tables that have a batch axis of 1 there.
    "batch": Pair(
        lambda theirs, n: [_squeeze(theirs[0])],
        lambda ours, m, heads: [ours[0][None]],
    ),
    # Flax attention: kernels [in, heads, head_dim] and biases [heads, head_dim]; parts along out.
    "heads": Pair(
        lambda theirs, n: _split(_join([_flat_heads(x) for x in theirs], -1), n, -1),
        lambda ours, m, heads: [_with_heads(x, heads) for x in _split(_join(ours, -1), m, -1)],
    ),
    # Flax attention's output projection: [heads, head_dim, out].
    "heads_out": Pair(
        lambda theirs, n: [_fold_proj(theirs[0])],
        lambda ours, m, heads: [ours[0].reshape(heads, -1, ours[0].shape[-1])],
    ),
}
