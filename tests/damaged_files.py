"""Files with a few bytes changed, left out or put in."""

import numpy as np


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(changed)))
        kind = rng.integers(4)
        if kind == 0:
            changed[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[place] = int(rng.integers(256))
        elif kind == 2:
            del changed[place : place + int(rng.integers(1, 50))]
        else:
            changed[place:place] = rng.bytes(int(rng.integers(1, 50)))
    return bytes(changed)
