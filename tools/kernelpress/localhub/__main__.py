"""``python -m kernelpress.localhub``: run the Hub without the rest of kernelpress."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernelpress.errors import HubError

from .server import serve


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernelpress.localhub", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=Path(".hub"), help="directory of the Hub (default: .hub)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="ORG", help="a trusted kernel publisher"
    )
    parser.add_argument("--open", action="store_true", help="take writes without a token, on loopback only")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    options = parser.parse_args()
    try:
        serve(
            options.root,
            options.host,
            options.port,
            options.trust,
            open_writes=options.open,
            verbose=options.verbose,
        )
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
