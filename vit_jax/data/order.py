"""Which example stands where in the endless stream, and its random choices: arithmetic, no state.

Both are functions of (seed, position) in integers only, so they are the same on any machine, for
any number of hosts and workers, and after any restart.
"""

from functools import cached_property, lru_cache

import numpy as np

_MASK = 2**64 - 1
_ROUNDS = 6
_MIN_BITS = 6  # on fewer bits so few rounds favour some permutations, by a chi-square test
# What a seed is mixed with first, so that the order and the random choices have nothing in common.
_ORDER_TAG = 0x6F72646572  # 'order'
_AUGMENT_TAG = 0x6175676D656E74  # 'augment'


def global_order(position: int, *, num_examples: int, seed: int) -> int:
    """The example at `position` (0, 1, 2, …) of the stream; every epoch is a permutation of all.

    Epoch e is positions e·N to (e+1)·N - 1 for N = `num_examples`. Its permutation is a Feistel
    network (Luby and Rackoff 1988) keyed by (seed, e) on the smallest power of two that holds N,
    applied again while the result is not below N (cycle walking, Black and Rogaway 2002). So any
    position is found by itself, in microseconds and without a table.
    """
    epoch, index = divmod(position, num_examples)
    keys = _round_keys(seed, epoch)
    bits = max((num_examples - 1).bit_length(), _MIN_BITS)
    while True:
        index = _feistel(index, keys, bits)
        if index < num_examples:
            return index


ORDERS = {"global": global_order}


class ExampleRng:
    """Every random choice about the example at `position`: Philox with a key, once one is drawn."""

    def __init__(self, position: int, *, seed: int):
        self._position, self._seed = position, seed

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""
        return self._generator.random()

    @cached_property
    def _generator(self) -> np.random.Generator:
        key = np.array([_mix(self._seed ^ _AUGMENT_TAG), self._position], np.uint64)
        return np.random.Generator(np.random.Philox(_Key(key)))


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands Philox its key. `Philox(key=…)` is the same, but asks the system for entropy first."""

    def __init__(self, key: np.ndarray):
        self.key = key

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return self.key


def _feistel(index: int, keys: tuple[int, ...], bits: int) -> int:
    """A permutation of 0 … 2^bits - 1: each half in turn is xored with a hash of the other."""
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits - low_bits) - 1
    high, low = index >> low_bits, index & low_mask
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        high ^= _mix(low + even) & high_mask
        low ^= _mix(high + odd) & low_mask
    return high << low_bits | low


@lru_cache(maxsize=256)  # one batch lies in one epoch, or in a few
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    state = _mix(_mix(seed ^ _ORDER_TAG) + epoch)
    return tuple(_mix(state + number) for number in range(_ROUNDS))


def _mix(value: int) -> int:
    """A 64-bit hash: one step of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
