"""Which slots of a batch a process reads."""

from typing import NamedTuple

import numpy as np


class Feed(NamedTuple):
    """What of each batch a process brings: the slots that its devices hold.

    Attributes:
      parts: numbers of the batch's parts, in order; with gaps on a TPU pod, whose meshes follow
        the torus and not the hosts, and the same for all processes that a `tensor` axis goes over.
      num_parts: in all, of the same size each.
    """

    parts: tuple[int, ...] = (0,)
    num_parts: int = 1

    def slots(self, batch_size: int) -> np.ndarray:
        """Which slots of a batch these parts are."""
        return np.arange(batch_size).reshape(self.num_parts, -1)[list(self.parts)].ravel()

    def whole(self, batch_size: int) -> int:
        """The least batch of at least this size that has as many slots in each part."""
        return -(-batch_size // self.num_parts) * self.num_parts


WHOLE = Feed()  # one process brings all
