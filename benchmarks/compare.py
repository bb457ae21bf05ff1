"""One MoE layer with PEFT LoRA on both projections, forward and backward: ours against transformers + PEFT.

Every row is a process of its own, so that one implementation's memory is not another's. Prints a table of medians and
the floor of a step: its products at the dense rate, or its weights at memory's where that takes longer;
``--output`` also writes the figures as JSON, with the date, the device, the versions and the commit they belong to.

    python benchmarks/compare.py [--device cuda] [--shapes small,medium,large] [--implementations scattermoe,...]
    python benchmarks/compare.py --device cuda --wheels wheels      and axolotl's and Unsloth's layers (see peers.py)
    python benchmarks/compare.py --plot growth.png      time and memory against tokens and against experts
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peers
from layer import RANK, Shape, measure
from measuring import REPOSITORY, device_name, require, write

BASELINES = ("grouped_mm", "batched_mm", "eager")
OURS = ("scattermoe", *BASELINES)
IMPLEMENTATIONS = (*OURS, *peers.PEERS)
SHAPES = {
    "small": Shape(32, 512, 256, 4, 512, "float32"),
    "medium": Shape(64, 1024, 512, 4, 1024, "float32"),
    "large": Shape(128, 1408, 704, 8, 512, "bfloat16"),
    # Layers of Gemma 4 26B-A4B, Qwen3-30B-A3B and Mixtral 8x7B.
    "gemma4": Shape(128, 2816, 704, 8, 8192, "bfloat16"),
    "qwen3": Shape(128, 2048, 768, 8, 8192, "bfloat16"),
    "mixtral": Shape(8, 4096, 14336, 2, 8192, "bfloat16"),
}
DEFAULT_SHAPES = {"cpu": "small,medium,large", "cuda": "gemma4,qwen3,mixtral"}
# The peers are made for GPUs.
DEFAULT_IMPLEMENTATIONS = {"cpu": OURS, "cuda": IMPLEMENTATIONS}
# What --plot varies the small shape (on a GPU Gemma 4's layer) over.
GROWTH = {"tokens": (128, 256, 512, 1024, 2048), "experts": (8, 16, 32, 64, 128)}
GROWING = ("scattermoe", "grouped_mm")
# batched_mm copies the weights of every pair: 33 GB for the medium shape, 24 GB for the large one, more in backward.
TOO_LARGE = {(name, "batched_mm") for name in SHAPES if name != "small"}


class RowError(Exception):
    """A row of ours or of transformers' failed; what its process said."""


def run_child(
    shape: Shape, implementation: str, device: str, build: Path, unpacked: Path | None = None
) -> dict[str, Any] | None:
    """The child's figures, or None where it was killed or its GPU's memory did not suffice.

    Raises:
        peers.PeerError: The child failed, on code that is neither ours nor transformers' (``unpacked`` is given).
        RowError: It failed on ours or transformers'.
    """
    environment = {**os.environ, "LOCAL_KERNELS": f"org/scattermoe-lora={build}"}
    command = [sys.executable, __file__, "--child", json.dumps(asdict(shape)), implementation, device]
    if unpacked is not None:
        command.append(str(unpacked))
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode == -signal.SIGKILL or "OutOfMemoryError" in process.stderr:
        return None
    if process.returncode and unpacked is not None:
        error_lines = process.stderr.strip().splitlines()
        raise peers.PeerError(error_lines[-1] if error_lines else f"exit status {process.returncode}")
    if process.returncode:
        raise RowError(f"{implementation} failed on {shape} ({process.returncode}):\n{process.stderr}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def prepare_peers(implementations: Sequence[str], wheels: Path | None, scratch: Path) -> dict[str, Path]:
    """Folders in which the peers among ``implementations`` were prepared; says which cannot be, and how they could."""
    peer_names = [name for name in implementations if name in peers.PEERS]
    ready: dict[str, Path] = {}
    missing = []
    for name in peer_names:
        try:
            wheel_paths = peers.find_wheels(name, wheels)
            if wheel_paths is None:
                missing.append(name)
            else:
                ready[name] = peers.prepare(name, wheel_paths, scratch)
        except peers.PeerError as error:
            print(f"{name}: left out: {error}", flush=True)
    if missing:
        print(
            f"{', '.join(missing)}: left out; `{peers.how_to_get(missing)}`, and --wheels wheels", flush=True
        )
    return ready


def compare(
    shapes: Sequence[str],
    implementations: Sequence[str],
    device: str,
    build: Path,
    unpacked: Mapping[str, Path],
    keep: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> list[RowError]:
    """Runs every row and prints it as it comes, and hands ``keep`` all there are; one that fails says so, and the
    others run.

    Returns:
        What failed of ours and transformers'; that a peer fails is no error.
    """
    results: dict[str, Any] = {}
    failed = []
    header = f"{'':<12}{'ms':>9}{'runs':>6}{'MB above weights':>18}{'of dense rate':>15}{'floor':>7}{'above it':>10}"
    print(device_name(device), flush=True)
    for name in shapes:
        print(f"\n{name}: {SHAPES[name]}, r={RANK}\n{header}", flush=True)
        rows = results.setdefault(name, {})
        for implementation in implementations:
            too_large = (name, implementation) in TOO_LARGE
            folder = unpacked.get(implementation)
            try:
                row = None if too_large else run_child(SHAPES[name], implementation, device, build, folder)
            except peers.PeerError as error:
                print(f"{implementation:<12}  failed: {error}", flush=True)
                continue
            except RowError as error:
                print(f"{implementation:<12}  failed", flush=True)
                failed.append(error)
                continue
            if row is None:
                print(f"{implementation:<12}  does not fit in memory", flush=True)
                continue
            rows[implementation] = row
            megabytes = row["peak_bytes_above_weights"] / 1e6
            print(
                f"{implementation:<12}{row['ms']:>9.1f}{row['repeats']:>6}{megabytes:>18.0f}"
                f"{row['share_of_dense_rate']:>15.0%}{row['floor_ms']:>7.1f}{row['ms'] / row['floor_ms']:>9.1f}x",
                flush=True,
            )
            keep(results)
        print_ratios(rows)
    return failed


def grow(device: str, build: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Figures against each of ``GROWTH``: ``{"tokens": {implementation: [row, ...]}, "experts": ...}``."""
    base = SHAPES["gemma4" if device == "cuda" else "small"]
    grown: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for dimension, sizes in GROWTH.items():
        for implementation in GROWING:
            rows = grown.setdefault(dimension, {}).setdefault(implementation, [])
            for size in sizes:
                row = run_child(replace(base, **{dimension: size}), implementation, device, build)
                if row is not None:
                    rows.append({dimension: size, **row})
                    print(f"{dimension} {size}: {implementation} {row['ms']:.1f} ms", flush=True)
    return grown


def print_ratios(rows: Mapping[str, Any]) -> None:
    """Ours against the best of transformers + PEFT, and where peers ran, against the best of all."""
    if "scattermoe" not in rows:
        return
    everyone = [name for name in rows if name != "scattermoe"]
    against = [("the best of transformers + PEFT", [name for name in everyone if name in BASELINES])]
    if any(name in peers.PEERS for name in everyone):
        against.append(("the best of all", everyone))
    ours = rows["scattermoe"]
    for rivals, names in against:
        if names:
            best = min(names, key=lambda name: rows[name]["ms"])
            memory = ours["peak_bytes_above_weights"] / rows[best]["peak_bytes_above_weights"]
            speed = rows[best]["ms"] / ours["ms"]
            print(f"{'':<12}{speed:>8.2f}x {rivals} ({best}), with {memory:.0%} of its memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEFAULT_SHAPES, default="cpu")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default {DEFAULT_SHAPES}")
    parser.add_argument("--implementations", help=f"of {', '.join(IMPLEMENTATIONS)}; on a GPU all")
    parser.add_argument("--wheels", type=Path, help="the folder that holds the wheels of axolotl and Unsloth")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument(
        "--plot", type=Path, help="instead draw time and memory against tokens and experts (PNG)"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        shape, implementation, device, *unpacked = arguments.child
        row = measure(Shape(**json.loads(shape)), implementation, device, *map(Path, unpacked))
        print(json.dumps(row))
        return
    shapes = (arguments.shapes or DEFAULT_SHAPES[arguments.device]).split(",")
    implementations = DEFAULT_IMPLEMENTATIONS[arguments.device]
    if arguments.implementations:
        implementations = tuple(arguments.implementations.split(","))
    for option, names, choices in (
        ("shapes", shapes, tuple(SHAPES)),
        ("implementations", implementations, IMPLEMENTATIONS),
    ):
        if unknown := set(names) - set(choices):
            parser.error(f"--{option}: {', '.join(sorted(unknown))}: none of {', '.join(choices)}")
    require(arguments.device)
    if arguments.wheels and not arguments.wheels.is_dir():
        parser.error(f"--wheels: {arguments.wheels} is no folder")
    if arguments.plot:
        try:
            from plot import draw
        except ImportError as error:
            parser.error(f"--plot: {error}; install matplotlib")

    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec

    def keep(results: Mapping[str, Any]) -> None:
        write(arguments.output, {"results": results})

    failed: Sequence[RowError] = ()
    with tempfile.TemporaryDirectory() as scratch:
        built = build(load_spec(REPOSITORY), Path(scratch, "build")).directory
        if arguments.plot:
            try:
                results = grow(arguments.device, built)
            except RowError as error:
                sys.exit(str(error))
            draw(results, arguments.plot)
            keep(results)
        else:
            unpacked = prepare_peers(implementations, arguments.wheels, Path(scratch))
            chosen = [name for name in implementations if name in OURS or name in unpacked]
            failed = compare(shapes, chosen, arguments.device, built, unpacked, keep)
    if failed:
        sys.exit("\n".join(map(str, failed)))


if __name__ == "__main__":
    main()
