"""Tests that import bitsandbytes and torchao, which test_libraries.py gives to a process of their own."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("bitsandbytes") and find_spec("torchao") else ["*"]
