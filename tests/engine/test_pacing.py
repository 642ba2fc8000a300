"""The pacer against a simulated device that runs steps in order, each as long as its work takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.engine.pacing import StepPacer


class Simulation:
    """A server's loop on a clock of its own: plan, launch, take in the step before."""

    def __init__(self, launch_seconds: float, noise: float, seed: int):
        self.pacer = StepPacer()
        self.launch_seconds = launch_seconds
        self.noise = noise
        self.rng = random.Random(seed)
        self.now = 0.0
        self.device_free = 0.0  # when the device is done with all that was launched
        self.idle = 0.0
        self.ends: list[float] = []  # of steps launched and not taken in
        self.waits: list[float] = []  # from planning a step to its start: what a request that comes now loses

    def seconds(self, decodes: int, prompt_tokens: int) -> float:
        step = 4e-3 + decodes * 15e-6 + prompt_tokens * 20e-6
        return step * self.rng.uniform(1 - self.noise, 1 + self.noise)

    def turn(self, decodes: int, prompt_tokens: int) -> None:
        self.now = max(self.now, self.pacer.plan_at())
        began = self.now
        self.now += self.launch_seconds * self.rng.uniform(0.7, 1.0)
        self.pacer.launched(began, self.now, decodes, prompt_tokens)
        starts = max(self.now, self.device_free)
        if self.ends:
            self.idle += starts - self.device_free
        self.waits.append(starts - began)
        self.device_free = starts + self.seconds(decodes, prompt_tokens)
        self.ends.append(self.device_free)
        if len(self.ends) == 2:
            self.now = max(self.now, self.ends.pop(0))
            self.pacer.finished(self.now)


@pytest.mark.parametrize(("decodes", "launch_seconds"), [(1, 3e-4), (40, 8e-4), (256, 2e-3)])
def test_steady_decode_is_planned_late_and_the_device_never_waits(
    decodes: int, launch_seconds: float
) -> None:
    loop = Simulation(launch_seconds, 0.01, decodes)
    for _ in range(500):
        loop.turn(decodes, 0)
    assert loop.idle == 0.0
    late = loop.waits[50:]
    assert sum(late) / len(late) < 0.45 * loop.seconds(decodes, 0) + launch_seconds


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.0, 0.04), share=st.floats(0.0, 0.6))
def test_the_device_hardly_waits_in_a_mix_of_prompts_and_decodes(
    seed: int, noise: float, share: float
) -> None:
    loop = Simulation(1e-3, noise, seed)
    rows = 30
    for _ in range(400):
        rows = max(0, rows + loop.rng.randrange(-3, 4))
        prompt = loop.rng.randrange(1, 1000) if loop.rng.random() < share or not rows else 0
        loop.turn(rows, prompt)
    assert loop.idle < 0.02 * loop.now


def test_nothing_is_waited_for_before_steps_were_timed() -> None:
    pacer = StepPacer()
    assert pacer.plan_at() == 0.0
    pacer.launched(0.0, 0.001, 4, 0)
    assert pacer.plan_at() == 0.0


def test_a_launch_that_took_long_is_allowed_for() -> None:
    loop = Simulation(5e-4, 0.0, 1)
    for _ in range(50):
        loop.turn(8, 0)
    before = loop.pacer.plan_at()
    loop.pacer.launched(loop.now, loop.now + 3e-3, 8, 0)
    loop.pacer.finished(loop.now + 3e-3)
    assert 0 < loop.pacer.plan_at() - loop.now < 4e-3 + 8 * 15e-6
    assert before > 0


@given(gone=st.integers(1, 60))
def test_fewer_rows_are_expected_to_take_less(gone: int) -> None:
    """Many streams may end at once."""
    loop = Simulation(5e-4, 0.0, gone)
    for _ in range(30):
        loop.turn(64, 0)
    for _ in range(30):
        loop.turn(64 - gone, 0)
    assert loop.idle < 1e-3
