"""A step's arrays in one buffer: each whole, each aligned."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kubeinfer.worker.packing import pack


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_every_array_is_whole_and_aligned(lengths: list[int]) -> None:
    arrays = {f"a{i}": np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(lengths)}
    buffer, packing = pack(arrays)
    for name, view in packing.views(torch.from_numpy(buffer)).items():
        assert view.tolist() == arrays[name].tolist()
        assert packing.places[name][0] * 4 % 128 == 0
    spans = sorted((start, start + length) for start, length in packing.places.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= packing.size == len(buffer)
