"""Names that the Kernel Hub gives to files, directories and branches, and those that a build reserves for itself."""

from __future__ import annotations

import re

# A built tree: build/torch-<backend>/, and one that every backend can load.
VARIANT_PREFIX = "torch-"
UNIVERSAL = "universal"
METADATA = "metadata.json"
SIGNATURE = f"{METADATA}.sigstore"
# Each variant's module that knows its op namespace; the build generates it.
OPS_MODULE = "_ops.py"

# A repository on the Hub.
REPO_TYPE = "kernel"
MAIN = "main"
CARD = "README.md"
STATUS = "kernel-status.toml"
YANKED = "kernel-yanked.toml"
# The one way to write each number: `v01` is a branch like any other.
VERSION_BRANCH = re.compile(r"v(0|[1-9][0-9]{0,9})")
