"""What the tests of the nbd layer share."""

from __future__ import annotations

from hypothesis import settings

# A deadline measures the machine: others may be using it. pytest-timeout bounds each test as a whole.
settings.register_profile("homeloop", deadline=None)
settings.load_profile("homeloop")
