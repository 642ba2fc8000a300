"""The fixed workloads of the GPU table: lengths and random token ids, the same for every engine.

W1  1000 requests of lengths drawn like ShareGPT's       W2  512 x (256 in, 256 out)
W3  128 x (4096 in, 128 out)                             W4  1 x (128 in, 512 out), latency
W5  512 x (2048 shared prefix + 128 own in, 128 out)
"""

from __future__ import annotations

import math
import random

LOW, HIGH = 1000, 127000  # token ids: inside every vocabulary used, below all special tokens
SHARED_PREFIX = 2048
FIXED = {
    "W2": [(256, 256)] * 512,
    "W3": [(4096, 128)] * 128,
    "W4": [(128, 512)],
    "W5": [(SHARED_PREFIX + 128, 128)] * 512,
}


def sharegpt_like(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Log-normal (input, output) lengths under the filter that serving benchmarks put on ShareGPT: means 214 and 201."""
    rng = random.Random(f"sharegpt-like/{seed}")
    found: list[tuple[int, int]] = []
    while len(found) < count:
        length_in = int(rng.lognormvariate(math.log(150), 1.50))
        length_out = int(rng.lognormvariate(math.log(135), 0.95))
        if 4 <= length_in <= 1024 and length_out >= 4 and length_in + length_out <= 2048:
            found.append((length_in, length_out))
    return found


def lengths(name: str) -> list[tuple[int, int]]:
    """(input, output) tokens of each request of a workload."""
    return sharegpt_like(1000) if name == "W1" else FIXED[name]


def prompts(name: str, sizes: list[tuple[int, int]], seed: int) -> list[list[int]]:
    """Token ids for ``sizes``; another seed gives other tokens, so that a prefix cache helps within W5 only."""
    rng = random.Random(f"{name}/{seed}")
    ids = range(LOW, HIGH)
    shared = rng.choices(ids, k=SHARED_PREFIX) if name == "W5" else []
    return [shared + rng.choices(ids, k=size - len(shared)) for size, _ in sizes]
