"""When a server should launch the next step: late, so that a request that has just come is still in it.

A device that never waits has its next step queued before the running one ends. Queued at once, that step shuts out every
request that comes while the running one lasts: such a request waits for two steps before its own. Queued just before the
running one ends, it waits for one. So the loop listens for requests meanwhile, for as long as the running step is sure to
last. A guess too short costs nothing but that chance; a guess too long leaves the device idle: all guesses err on the short
side.
"""

from __future__ import annotations

from collections import deque

_REMEMBERED = 8  # steps of a kind, the latest
_MARGIN_S = 0.4e-3  # for a thread that wakes late
_MARGIN_SHARE = 0.04  # of the step: steps of a kind differ by so much


class StepPacer:
    """Times steps, and says when the next one is to be planned. Times are ``time.perf_counter()`` seconds."""

    def __init__(self) -> None:
        self._decode_seconds: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # and rows
        self._prompt_seconds: deque[tuple[float, int]] = deque(
            maxlen=_REMEMBERED
        )  # beside the decodes; and tokens
        self._launch_seconds: deque[float] = deque(maxlen=2 * _REMEMBERED)
        self._in_flight: deque[tuple[float, int, int]] = deque()  # when launched, decodes, prompt tokens
        self._last_end = 0.0

    def launched(self, began: float, ended: float, num_decodes: int, num_prompt_tokens: int) -> None:
        """A step was planned and launched between ``began`` and ``ended``."""
        self._launch_seconds.append(ended - began)
        self._in_flight.append((ended, num_decodes, num_prompt_tokens))

    def finished(self, now: float) -> None:
        """The oldest step in flight has ended."""
        launched, decodes, prompt_tokens = self._in_flight.popleft()
        if (
            launched < self._last_end
        ):  # else the device was idle before it, and part of its time was the launch
            seconds = now - self._last_end
            if not prompt_tokens:
                self._decode_seconds.append((seconds, decodes))
            elif self._decode_seconds:
                self._prompt_seconds.append((max(0.0, seconds - self._decodes(decodes)), prompt_tokens))
        self._last_end = now

    def plan_at(self) -> float:
        """When the next step is to be planned; 0.0 for at once."""
        if len(self._in_flight) != 1 or len(self._decode_seconds) < _REMEMBERED:
            return 0.0
        launched, decodes, prompt_tokens = self._in_flight[0]
        lasts = self._decodes(decodes) + self._prompt(prompt_tokens)
        begins = max(launched, self._last_end)
        return begins + lasts * (1 - _MARGIN_SHARE) - max(self._launch_seconds) - _MARGIN_S

    def _prompt(self, tokens: int) -> float:
        """Prompts of ``tokens`` add at least so much to a step: as much as fewer did, or their share of what more did."""
        return min(
            (seconds * min(1.0, tokens / timed) for seconds, timed in self._prompt_seconds), default=0.0
        )

    def _decodes(self, rows: int) -> float:
        """A step of ``rows`` decodes and nothing else lasts at least so long."""
        # Fewer rows than were timed take less; not in proportion, for the weights are read all the same.
        return min(seconds * min(1.0, (1 + rows / timed) / 2) for seconds, timed in self._decode_seconds)
