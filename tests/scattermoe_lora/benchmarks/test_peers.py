"""Rows of other projects in benchmarks/compare.py: the layers that they run compute what eager computes.

Each runs in a process of its own, since it replaces methods of PEFT and transformers for good.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
FACTORS = [f"experts.{where}lora_{factor}.default.weight" for where in ("base_layer.", "") for factor in "AB"]
RESULTS = ["output", *(f"gradient of {leaf}" for leaf in ("x", "weights", *FACTORS))]

# Prints how far each result is from eager's. That PEFT merges nothing is part of what a row stands for.
CHILD = """
import json, sys
from functools import partial
from pathlib import Path
{before}
import layer, peers
from peft.tuners.lora.layer import ParamWrapper

def refuse(*arguments, **options):
    raise AssertionError("PEFT merged the adapter")

def install(name, unpacked):
    chosen = peers.install(name, unpacked)
    assert callable(ParamWrapper._activate_lora)
    ParamWrapper._activate_lora = refuse
    {after}
    return chosen

_, errors = layer.differences(layer.TINY, partial(install, sys.argv[1], Path(sys.argv[2])), "cpu")
print(json.dumps(errors))
"""
# Tuning takes a GPU's clock. In the interpreter a loop's index is a plain int, which lacks the method that these
# kernels call on it.
INTERPRETER = """
import triton
tuned = triton.autotune
triton.autotune = lambda configs, **options: tuned(configs[:1], **options)
class Index(int):
    def to(self, dtype):
        return self
"""
INDICES = """
    for name in [each for each in sys.modules if "axolotl_scattermoe_lora" in each and ".kernels." in each]:
        sys.modules[name].range = lambda *bounds: map(Index, range(*bounds))
"""
# The backend that it chooses on a GPU; on a CPU, whose torch has the product too, it would loop over the experts.
GROUPED = """
    forward = sys.modules["unsloth_zoo.temporary_patches.moe_utils"].get_forward_moe_backend()
    forward.__globals__["_TORCH_GROUPED_MM_SUPPORTED"] = True
    forward.__globals__["select_moe_backend"].cache_clear()
    assert forward.__globals__["select_moe_backend"]() == "grouped_mm"
"""


@pytest.fixture(scope="module")
def script():
    """``script(name)``: one of the benchmarks' modules."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(BENCHMARKS)
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def unpacked(script, tmp_path_factory):
    """``unpacked(name)``: where a peer was prepared; skips where its wheels cannot be had."""
    peers = script("peers")
    known: dict[str, Path] = {}

    def fetch(name: str) -> Path:
        if name not in known:
            where = tmp_path_factory.mktemp(name)
            command = peers.how_to_get([name]).replace("--dest wheels", f"--quiet --dest {where}").split()
            process = subprocess.run(
                [sys.executable, "-m", *command], capture_output=True, text=True, timeout=600, check=False
            )
            if process.returncode:
                pytest.skip(f"{name} cannot be downloaded: {process.stderr.strip().splitlines()[-1:]}")
            known[name] = peers.prepare(name, peers.find_wheels(name, where), where / "unpacked")
        return known[name]

    return fetch


@pytest.mark.parametrize(
    ("name", "before", "after", "environment"),
    [
        ("axolotl", INTERPRETER, INDICES, {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1"}),
        ("unsloth", "", GROUPED, {}),
    ],
    ids=["axolotl", "unsloth"],
)
def test_a_peers_layer_computes_what_eager_computes_without_merging(
    unpacked, tmp_path, name, before, after, environment
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", CHILD.format(before=before, after=after.strip()), name, str(unpacked(name))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    errors = json.loads(process.stdout.splitlines()[-1])
    assert sorted(errors) == sorted(RESULTS)
    assert all(error < 1e-5 for error in errors.values()), errors


def test_a_peers_row_has_the_figures_of_the_others_and_its_wheels_versions(
    script, unpacked, tmp_path
) -> None:
    compare = script("compare")
    row = compare.run_child(script("layer").TINY, "unsloth", "cpu", tmp_path, unpacked("unsloth"))
    assert row["ms"] > 0
    assert 0 < row["share_of_dense_rate"] < 1
    requirements = script("peers").PEERS["unsloth"].requirements
    assert row["wheels"] == sorted(each.replace("==", "-") for each in requirements)


@pytest.mark.parametrize(
    ("factor", "said"), [(1.1, "output is 10% off"), (float("nan"), "output is nan% off")]
)
def test_a_peer_that_computes_something_else_than_eager_is_not_measured(
    script, tmp_path, monkeypatch, factor, said
) -> None:
    layer, peers = script("layer"), script("peers")
    right = Gemma4TextExperts.forward

    def install(unpacked: Path) -> str:
        wrong = lambda *arguments: factor * right(*arguments)  # noqa: E731
        monkeypatch.setattr(Gemma4TextExperts, "forward", wrong)
        return "eager"

    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer((), print, install))
    with pytest.raises(peers.PeerError, match=f"computes something else than eager: {said}"):
        layer.measure(layer.TINY, "wrong", "cpu", tmp_path)


def test_a_peer_that_cannot_be_loaded_says_what_its_process_said_last(script, tmp_path) -> None:
    compare = script("compare")
    with pytest.raises(script("peers").PeerError, match="No module named 'unsloth_zoo'"):
        compare.run_child(compare.SHAPES["small"], "unsloth", "cpu", tmp_path, tmp_path)


def test_a_peers_failure_leaves_the_other_rows_and_both_ratios(script, monkeypatch, capsys, tmp_path) -> None:
    compare = script("compare")
    ms = {"scattermoe": 10.0, "grouped_mm": 40.0, "eager": 80.0, "unsloth": 20.0}

    def run_child(shape, implementation, device, build, unpacked=None):
        assert (unpacked is not None) == (implementation in ("axolotl", "unsloth"))
        if implementation not in ms:
            raise script("peers").PeerError("no such GPU")
        size = 100 if implementation == "scattermoe" else 200
        row = {"ms": ms[implementation], "repeats": 7, "peak_bytes_above_weights": size}
        return {**row, "share_of_dense_rate": 0.5, "floor_ms": 0.5}

    monkeypatch.setattr(compare, "run_child", run_child)
    names = ["scattermoe", "axolotl", "grouped_mm", "eager", "unsloth"]
    folders = {"axolotl": tmp_path, "unsloth": tmp_path}
    kept = []
    assert not compare.compare(["small"], names, "cpu", tmp_path, folders, kept.append)
    assert list(kept[-1]["small"]) == list(ms)
    printed = capsys.readouterr().out.splitlines()
    assert "axolotl       failed: no such GPU" in printed
    assert [line.strip() for line in printed[-2:]] == [
        "4.00x the best of transformers + PEFT (grouped_mm), with 50% of its memory",
        "2.00x the best of all (unsloth), with 50% of its memory",
    ]


def test_without_their_wheels_peers_are_left_out_with_the_command_that_gets_them(
    script, tmp_path, capsys
) -> None:
    compare = script("compare")
    assert compare.prepare_peers(compare.IMPLEMENTATIONS, None, tmp_path) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("axolotl, unsloth: left out; `pip download --no-deps ")
    assert "axolotl==" in line
    assert "unsloth_zoo==" in line
    tmp_path.joinpath("axolotl-0.0.0-py3-none-any.whl").write_bytes(b"no archive")
    assert compare.prepare_peers(["axolotl"], tmp_path, tmp_path / "scratch") == {}
    assert capsys.readouterr().out.startswith("axolotl: left out: axolotl-0.0.0-py3-none-any.whl: ")
