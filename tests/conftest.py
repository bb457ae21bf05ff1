"""How hypothesis looks for examples: the same ones each time, so that a commit passes or fails wherever it is tested.

``make fuzz`` looks for new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

# Triton's interpreter runs each program in numpy, one after the other.
settings.register_profile(
    "random", max_examples=6 if os.environ.get("TRITON_INTERPRET") == "1" else 40, deadline=None
)
settings.register_profile("repeatable", settings.get_profile("random"), derandomize=True)
# Before the modules of tests, whose own settings begin with these; --hypothesis-profile comes later still.
settings.load_profile("repeatable")
