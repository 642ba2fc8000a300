"""Settings for the whole suite."""

from __future__ import annotations

from hypothesis import settings

# Wall-clock deadlines fail on a busy machine and prove nothing there.
settings.register_profile("kubeinfer", deadline=None)
settings.load_profile("kubeinfer")
