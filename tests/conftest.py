"""How Hypothesis searches: the same examples on every run in CI, new ones elsewhere, and no deadline on either."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A first call compiles kernels and a test machine is shared: how long an example takes says nothing about the code.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "local"))
