"""Run the Hub by itself: ``python -m`` and the name of this package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import HubError
from .server import serve


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    add = parser.add_argument
    add("--root", type=Path, default=Path(".hub"), help="directory of the Hub (default: .hub)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    add("--trust", action="append", default=[], metavar="ORG", help="a trusted kernel publisher")
    add(
        "--open",
        action="store_true",
        dest="open_writes",
        help="take writes without a token, on loopback only",
    )
    add("--verbose", action="store_true", help="log every request")
    try:
        serve(**vars(parser.parse_args()))
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
