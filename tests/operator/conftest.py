"""The helpers beside the tests are imported by name: a package called ``operator`` would shadow the standard library's."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# A machine that is busy with other things makes no test wrong.
settings.register_profile("operator", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("operator")
