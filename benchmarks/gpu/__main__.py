"""Runs ``gpu.run`` from a clone, with nothing installed."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [
        str(Path(__file__).resolve().parents[2] / name) for name in ("benchmarks", "torch-ext", "tools")
    ]
    from gpu.run import main

    main()
