"""What holds for all tests of the agent."""

from __future__ import annotations

from hypothesis import settings

# Hypothesis' own deadline of 200 ms would have a slow machine fail them.
settings.register_profile("farshore", deadline=None)
settings.load_profile("farshore")
