"""Settings for the whole suite."""

from __future__ import annotations

import signal

from hypothesis import settings

# Wall-clock deadlines fail on a busy machine and prove nothing there.
settings.register_profile("kubeinfer", deadline=None)
settings.load_profile("kubeinfer")

# A shell's background job begins with Ctrl-C ignored, and so would all processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
