"""Random numbers without a generator: a hash of (seed, step, position, sample id) gives them, on any rank, in any order.

The mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014), applied to each key word
in turn.
"""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Word = int | np.integer[Any] | NDArray[np.integer[Any]]
Hash = NDArray[np.uint64] | np.uint64  # a number for a number, an array for an array
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STEP = np.uint64(0x632BE59BD9B4E019)


def mix(words: Word) -> Hash:
    """A well-mixed 64-bit word for each input word; a bijection."""
    z = np.asarray(words).astype(np.uint64)
    with np.errstate(over="ignore"):
        z = z + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashes(purpose: str, *keys: Word) -> Hash:
    """One 64-bit word per broadcast combination of the integer keys; ``purpose`` separates independent streams."""
    word = mix(zlib.crc32(purpose.encode()))
    for key in keys:
        word = mix(word ^ mix(key))
    return word


def uniforms(words: Hash, count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1) for each word: [*words, count]."""
    with np.errstate(over="ignore"):
        counters = np.asarray(words)[..., None] + np.arange(1, count + 1, dtype=np.uint64) * _STEP
    draws = np.asarray(mix(counters) >> np.uint64(11))
    return draws.astype(np.float64) * 2.0**-53
