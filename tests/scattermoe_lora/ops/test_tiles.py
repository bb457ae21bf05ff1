"""Tile configurations: the data is whole, and lookups are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernelpress.compile.specs import TARGETS

BLOCKS = {
    "grouped_matmul": {"BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages"},
    "grouped_outer": {"BLOCK_P", "BLOCK_Q", "BLOCK_S", "num_warps", "num_stages"},
}


# Kernels that stand in for torch's where a table has a rule for them, and the limits that it sets.
OWN = {"sort_pairs": {"pairs", "experts"}, "sum_choices": {"n", "k"}}


@pytest.fixture(scope="session")
def tiles(submodule):
    return submodule("ops.tile_tables")


@pytest.fixture(scope="session")
def gpu(submodule):
    return submodule("ops.grouped_linear.gpu")


@pytest.mark.parametrize("operator", ["grouped_linear", "attention", "norm_rotary", "linear_cross_entropy"])
def test_there_is_a_table_for_every_target_and_a_default(tiles, submodule, operator) -> None:
    folder = submodule(f"ops.{operator}.gpu").TILES
    assert {path.name for path in folder.iterdir()} == {f"{device}.json" for device in (*TARGETS, "default")}
    assert set(tiles.DEVICES) == {*TARGETS, "default"}


def test_every_table_serves_every_shape_with_blocks_that_triton_multiplies(tiles, gpu) -> None:
    for device in tiles.DEVICES:
        table = tiles.load(gpu.TILES, device)
        assert set(BLOCKS) <= set(table.rules) <= {*BLOCKS, *OWN}
        for kernel in BLOCKS:
            rules = table.rules[kernel]
            for rule in rules:
                options = set(gpu.OPTIONS) if kernel == "grouped_matmul" else set()
                assert BLOCKS[kernel] <= set(rule.launch) <= BLOCKS[kernel] | options
                sides = [value for name, value in rule.launch.items() if name.startswith("BLOCK")]
                assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
            for itemsize in (2, 4):
                own = [rule for rule in rules if rule.bytes == itemsize]
                assert own[-1].limits == {"rows": None, "n": None, "k": None}
                # A rule behind one that serves all it serves would never be taken.
                for later, rule in enumerate(own):
                    assert not any(covers(earlier, rule) for earlier in own[:later])


def covers(rule, other) -> bool:
    """Tell whether a rule serves all sizes that another serves."""

    def span(limit) -> tuple[float, float]:
        return limit if isinstance(limit, tuple) else (0, float("inf") if limit is None else limit)

    spans = [(span(rule.limits[name]), span(other.limits[name])) for name in rule.limits]
    return all(own[0] <= others[0] and others[1] <= own[1] for own, others in spans)


def test_tables_take_only_options_that_their_architecture_has(tiles, gpu, submodule) -> None:
    targets = submodule("ops.grouped_linear.specs").OPTION_TARGETS
    assert set(targets) == set(gpu.OPTIONS)
    for device in tiles.DEVICES:
        for rule in tiles.load(gpu.TILES, device).rules["grouped_matmul"]:
            for option in set(rule.launch) & set(gpu.OPTIONS):
                assert set(TARGETS if device == "default" else (device,)) <= set(targets[option])


def test_rules_for_kernels_that_torch_has_too_limit_what_their_launchers_know(tiles, gpu) -> None:
    for device in tiles.DEVICES:
        for kernel, limits in OWN.items():
            for rule in tiles.load(gpu.TILES, device).rules.get(kernel, ()):
                assert set(rule.limits) <= limits
                assert {"BLOCK"} <= set(rule.launch) <= {"BLOCK", "num_warps"}


def test_torch_sorts_and_sums_where_a_table_has_no_rule(submodule, tiles, gpu, monkeypatch) -> None:
    pairs, like = submodule("ops.grouped_linear.pairs"), torch.empty(0, dtype=torch.float16)
    rule = tiles.Rule(2, {"n": 64, "k": None}, {"BLOCK": 16})
    assert pairs.own_launch("sum_choices", like, {"n": 64, "k": 8}) is None
    monkeypatch.setattr(tiles, "load", lambda folder, device: tiles.Table(None, {"sum_choices": (rule,)}))
    assert pairs.own_launch("sum_choices", like, {"n": 64, "k": 8}) is rule.launch
    assert pairs.own_launch("sum_choices", like, {"n": 65, "k": 8}) is None
    assert pairs.own_launch("sum_choices", like.float(), {"n": 64, "k": 8}) is None


@pytest.mark.parametrize(
    ("backend", "arch", "table"),
    [
        ("cuda", "80", "sm_80"),
        ("cuda", "87", "sm_86"),
        ("cuda", "103", "sm_100"),
        ("cuda", "121", "sm_120"),
        ("cuda", "75", "default"),
        ("cuda", "110", "default"),
        ("hip", "gfx942", "gfx942"),
        ("hip", "gfx1100", "default"),
        ("xpu", "12", "default"),
    ],
)
def test_a_device_takes_its_own_table_or_the_closest_older_of_its_generation(
    tiles, backend, arch, table
) -> None:
    assert tiles.closest(backend, arch) == table


@given(
    rows=st.floats(0, 1e6),
    n=st.integers(1, 30000),
    k=st.integers(1, 30000),
    dtype=st.sampled_from(["half", "float"]),
)
def test_the_first_rule_that_serves_a_shape_is_taken(tiles, gpu, rows, n, k, dtype) -> None:
    like = torch.empty(0, dtype=getattr(torch, dtype))
    for kernel in BLOCKS:
        rules = tiles.load(gpu.TILES, "default").rules[kernel]
        sizes = {"rows": rows, "n": n, "k": k}
        serving = [rule for rule in rules if rule.serves(like.itemsize, sizes)]
        assert gpu.tile(kernel, like, rows, n, k) is serving[0].launch
        assert all(limit is None or sizes[name] <= limit for name, limit in serving[0].limits.items())


@pytest.mark.parametrize(("n", "k"), [(2816, 1408), (16, 2816), (8, 2816), (2816, 1)])
def test_aligned_and_narrow_shapes_take_the_devices_table(tiles, gpu, monkeypatch, n, k) -> None:
    monkeypatch.setattr(tiles, "table_of", lambda device: "sm_90")
    for kernel in BLOCKS:
        launch = gpu.tile(kernel, torch.empty(0, dtype=torch.bfloat16), 512, n, k)
        assert launch in [rule.launch for rule in tiles.load(gpu.TILES, "sm_90").rules[kernel]]


@pytest.mark.parametrize(("n", "k"), [(2815, 1408), (2816, 1404)])
def test_shapes_that_are_not_aligned_take_the_default(tiles, gpu, monkeypatch, n, k) -> None:
    monkeypatch.setattr(tiles, "table_of", lambda device: "sm_90")
    launch = gpu.tile("grouped_matmul", torch.empty(0, dtype=torch.bfloat16), 512, n, k)
    assert launch in [rule.launch for rule in tiles.load(gpu.TILES, "default").rules["grouped_matmul"]]


def test_a_limit_may_have_two_ends_and_what_is_outside_takes_the_next_rule(tiles, gpu) -> None:
    wide = {"n": 2816, "k": 704}
    launches = {
        rows: tiles.find(gpu.TILES, "sm_90", "grouped_matmul", torch.bfloat16, {"rows": rows, **wide})
        for rows in (255, 256, 1024, 1025)
    }
    assert launches[255] == launches[1025] != launches[256] == launches[1024]


def test_a_dtype_without_a_kernel_is_refused(gpu) -> None:
    with pytest.raises(
        NotImplementedError, match=r"grouped_matmul: no Triton kernel for torch\.float64; use float32"
    ):
        gpu.tile("grouped_matmul", torch.empty(0, dtype=torch.float64), 1, 1, 1)


def test_every_tile_that_ships_is_compiled_ahead_of_time(tiles, gpu, submodule) -> None:
    compiled = {
        # What a descriptor describes is a constant, and no number.
        (
            spec.kernel.__name__,
            target,
            *{**constants, "TMA": bool(constants.get("TMA")), **spec.options}.items(),
        )
        for module in ("specs", "specs_small")
        for spec in submodule(f"ops.grouped_linear.{module}").COMPILE_SPECS
        for constants in [spec.constants]
        for target in spec.targets
    }
    for device in tiles.DEVICES:
        for target in TARGETS if device == "default" else (device,):
            for kernel, rules in tiles.load(gpu.TILES, device).rules.items():
                name = {"sort_pairs": "place_pairs"}.get(kernel, kernel)
                for rule in rules:
                    # The product's kernel does not know that another takes its place before a gate's backward.
                    launch = {(key, value) for key, value in rule.launch.items() if key != "GATE_BACKWARD"}
                    assert any(
                        entry[:2] == (f"{name}_kernel", target) and launch <= set(entry[2:])
                        for entry in compiled
                    ), f"{device} {kernel} {dict(rule.launch)} is not compiled for {target}"
