"""Attention gives what float64 PyTorch gives, on shapes that no block divides, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers import TRITON

# The interpreter multiplies float32 and float16; native code float64, too, where a wrong formula cannot hide.
EXACT = torch.float32 if TRITON else torch.float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Lengths of each sequence, heads, head size and mask."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None


CASES = {
    "one token": Case((1,), (1,), causal=True),
    "decoding": Case((1,), (45,), head_dim=64, causal=True),
    "decoding in a window": Case((1,), (45,), head_dim=64, causal=True, window=(7, 7)),
    "full": Case((21,), (21,), heads=3, kv_heads=3, head_dim=40),
    "causal": Case((37,), (37,), heads=4, kv_heads=2, head_dim=40, causal=True),
    "8 heads on one": Case((19,), (19,), heads=8, kv_heads=1, causal=True, scale=1.0),
    "window of one": Case((33,), (33,), causal=True, window=(0, -1)),
    "window of two": Case((33,), (33,), causal=True, window=(1, 1)),
    "window wider than the keys": Case((33,), (33,), causal=True, window=(100, 100)),
    "window to both sides": Case((50,), (50,), window=(9, 3)),
    "window to the right": Case((35,), (35,), window=(-1, 4)),
    "window that sees nothing": Case((40,), (5,), window=(3, 0)),
    "more keys, causal": Case((18,), (50,), causal=True),
    "more keys in a window": Case((18,), (50,), causal=True, window=(11, 0)),
    "more queries, causal": Case((50,), (18,), causal=True),
    "more queries in a window": Case((50,), (18,), window=(6, 5)),
    "softcap": Case((34,), (34,), head_dim=24, causal=True, softcap=2.0, scale=0.7),
    "softcap in a window": Case((34,), (34,), causal=True, window=(12, 0), softcap=5.0),
    "head of 256": Case((35,), (35,), heads=2, kv_heads=1, head_dim=256, causal=True, window=(17, 0)),
    "head of 512": Case((19,), (19,), heads=2, kv_heads=1, head_dim=512, causal=True),
    "head of 20": Case((21,), (21,), heads=4, kv_heads=2, head_dim=20, causal=True, window=(9, 0)),
    "head of 1": Case((13,), (13,), head_dim=1, softcap=2.0),
    "packed heads of 13": Case((5, 1, 33), (5, 1, 33), head_dim=13, causal=True),
    "head of 320": Case((17,), (33,), heads=1, kv_heads=1, head_dim=320, causal=True),
    "packed": Case((5, 1, 33, 12), (5, 1, 33, 12), heads=4, kv_heads=2, causal=True),
    "packed in a window": Case((20, 3, 41), (20, 3, 41), causal=True, window=(8, 8), head_dim=40),
    "packed, no queries or no keys": Case((4, 0, 9, 3), (4, 7, 0, 5), causal=True),
    "packed, lengths that differ": Case((4, 17, 9), (30, 2, 9), heads=4, kv_heads=2, window=(10, 2)),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random q, k, v and a gradient of the result, all sequences one behind the other."""
    queries, keys = sum(case.queries), sum(case.keys)
    q, do = (torch.randn(queries, case.heads, case.head_dim, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(keys, case.kv_heads, case.head_dim, dtype=torch.float64) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v, do))


def boundaries(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(kernel, case: Case, q, k, v, **options) -> torch.Tensor:
    """The public function: the dense one for one sequence, else the packed one."""
    options = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "softmax_scale": case.scale,
        **options,
    }
    if len(case.queries) == 1:
        k4 = k.unsqueeze(0)
        return kernel.flash_attn_func(
            q.unsqueeze(0), k4, k4 if v is k else v.unsqueeze(0), **options
        ).squeeze(0)
    lengths = (boundaries(case.queries), boundaries(case.keys), max(case.queries), max(case.keys))
    return kernel.flash_attn_varlen_func(q, k, v, *lengths, **options)


def assert_near(got, exact, tolerance: float) -> None:
    """Errors relative to the largest value, or to 1: the gradient of a softmax over one key is 0."""
    for name, g, e in zip(("out", "dq", "dk", "dv"), got, exact, strict=False):
        assert g.shape == e.shape
        error = (g.detach().double() - e.detach().double()).abs().max() / e.detach().abs().max().clamp(min=1)
        assert error < tolerance, f"{name}: error {error:.2e}"


@pytest.fixture
def expected(submodule):
    """``expected(case, q, k, v)``: the oracle in float64, sequence by sequence."""
    reference, window = (
        submodule("ops.attention.reference").attention,
        submodule("ops.attention.window").Window,
    )

    def compute(case: Case, q, k, v) -> torch.Tensor:
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        right = 0 if case.causal else case.window[1]
        outs = [
            reference(*sequence, scale, window(case.window[0], right), case.softcap)[0]
            for sequence in zip(q.split(case.queries), k.split(case.keys), v.split(case.keys), strict=True)
        ]
        return torch.cat(outs)

    return compute


def check(kernel, expected, case: Case, dtype: torch.dtype, shared: bool = False) -> None:
    *tensors, do = inputs(case, dtype)
    got_inputs = [x.clone().requires_grad_() for x in (tensors[:2] if shared else tensors)]
    exact_inputs = [x.detach().double().requires_grad_() for x in got_inputs]
    q, k, *rest = got_inputs
    got = attend(kernel, case, q, k, *(rest or [k]))
    assert got.dtype == dtype
    gradients = torch.autograd.grad(got, got_inputs, do)
    exact_q, exact_k, *rest = exact_inputs
    exact = expected(case, exact_q, exact_k, *(rest or [exact_k]))
    exact_gradients = torch.autograd.grad(exact, exact_inputs, do.double())
    assert_near([got, *gradients], [exact, *exact_gradients], TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_match_the_reference(kernel, expected, name) -> None:
    check(kernel, expected, CASES[name], EXACT)


@pytest.mark.parametrize(
    "name", ["decoding in a window", "8 heads on one", "packed", "softcap", "head of 512"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("bfloat16")
def test_every_dtype_is_summed_in_float32(kernel, expected, name, dtype) -> None:
    check(kernel, expected, CASES[name], dtype)


@pytest.mark.parametrize("name", ["softcap in a window", "packed", "head of 512", "head of 20"])
def test_values_that_are_the_keys_get_the_sum_of_both_gradients(kernel, expected, name) -> None:
    check(kernel, expected, CASES[name], EXACT, shared=True)


def test_query_that_sees_nothing_gets_zeros_and_gives_none(kernel) -> None:
    case = CASES["more queries, causal"]
    *tensors, do = inputs(case, torch.float32)
    q, k, v = (x.requires_grad_() for x in tensors)
    out = attend(kernel, case, q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
    blind = case.queries[0] - case.keys[0]
    assert not out[:blind].any()
    assert not dq[:blind].any()
    # Whatever gradient arrives at such a query leaves the others alone.
    do[:blind] = 1e30
    _, dk2, dv2 = torch.autograd.grad(out, (q, k, v), do)
    assert torch.equal(dk, dk2)
    assert torch.equal(dv, dv2)


@pytest.mark.parametrize("name", ["decoding", "packed, lengths that differ"])
def test_equal_calls_return_equal_bits(kernel, name) -> None:
    case = CASES[name]
    *tensors, do = inputs(case, torch.float32)
    tensors = [x.requires_grad_() for x in tensors]
    runs = []
    for deterministic in (False, True):
        out = attend(kernel, case, *tensors, deterministic=deterministic)
        runs.append((out, *torch.autograd.grad(out, tensors, do)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tensors_of_any_strides_are_read_where_they_stand(kernel, expected) -> None:
    case = CASES["causal"]
    *tensors, _ = inputs(case, EXACT)
    # As a cache holds them: heads before rows; and a slice of a fused projection.
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    sliced = [torch.cat([x, x], dim=-1)[..., : case.head_dim] for x in tensors]
    backwards = [x.mT.contiguous().mT for x in tensors]
    exact = expected(case, *(x.double() for x in tensors))
    for q, k, v in (by_head, sliced, backwards):
        assert_near([attend(kernel, case, q, k, v)], [exact], TOLERANCE[EXACT])


def test_boundaries_may_be_a_column_of_a_table(kernel, expected) -> None:
    case = CASES["packed"]
    q, k, v, _ = inputs(case, EXACT)
    exact = expected(case, q.double(), k.double(), v.double())
    starts = torch.stack([boundaries(case.queries), boundaries(case.keys)], dim=1)
    lengths = (starts[:, 0], starts[:, 1], max(case.queries), max(case.keys))
    out = kernel.flash_attn_varlen_func(
        q,
        k,
        v,
        *lengths,
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        softmax_scale=case.scale,
    )
    assert_near([out], [exact], TOLERANCE[EXACT])


@pytest.mark.parametrize("name", ["causal", "packed in a window", "window that sees nothing"])
def test_sink_is_a_key_of_its_own_score_and_no_value(kernel, submodule, name) -> None:
    check_sink(kernel, submodule, CASES[name])


def check_sink(kernel, submodule, case: Case) -> None:
    *tensors, do = inputs(case, EXACT)
    sink = torch.randn(case.heads, dtype=EXACT)
    tensors = [x.requires_grad_() for x in (*tensors, sink)]
    out = attend(kernel, case, *tensors[:3], s_aux=tensors[3])
    exact_inputs = [x.detach().double().requires_grad_() for x in tensors]
    q, k, v, exact_sink = exact_inputs
    exact = torch.cat(
        [
            with_sink(submodule, case, *sequence, exact_sink)
            for sequence in zip(q.split(case.queries), k.split(case.keys), v.split(case.keys), strict=True)
        ]
    )
    got = (out, *torch.autograd.grad(out, tensors, do))
    expected_results = (exact, *torch.autograd.grad(exact, exact_inputs, do.double()))
    assert_near(got, expected_results, TOLERANCE[EXACT])


# What a launch may add to its device's own, by kernel. Two passes are for heads of more than 256 columns.
KERNELS = ("attention_forward", "attention_dkdv", "attention_dq")
BACKWARD_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4}
OPTIONS = {
    "one loop": {key: {"ONE_LOOP": 1} for key in KERNELS},
    "two passes": {"attention_dkdv": {"PASSES": 2, "SPLIT": 0, "CHUNK": 16}},
    "two passes, split": {"attention_dkdv": {"PASSES": 2, "SPLIT": 1, "CHUNK": 512, "ONE_LOOP": 1}},
    "delta in dq": {"attention_dq": {"DELTA": 1}},
    "delta in dq, chunks": {"attention_dq": {"DELTA": 1, "CHUNK": 16, "ONE_LOOP": 1}},
    "16 keys": {"attention_dkdv": {**BACKWARD_BLOCKS, "SPLIT": 0}, "attention_dq": BACKWARD_BLOCKS},
    "16 queries": {
        key: {"BLOCK_M": 16, "BLOCK_N": 16} for key in ("attention_forward", "attention_dkdv", "attention_dq")
    },
    "tma": {key: {"TMA": 1, "CHUNK": 512} for key in KERNELS},
    "tma, chunks": {
        "attention_forward": {"TMA": 1, "CHUNK": 16, "ONE_LOOP": 1},
        "attention_dkdv": {"TMA": 1, "CHUNK": 16, "PASSES": 2, "SPLIT": 0},
        "attention_dq": {"TMA": 1, "CHUNK": 16, "DELTA": 1},
    },
}

if TRITON:

    @pytest.fixture(params=OPTIONS)
    def option(request, submodule, monkeypatch) -> None:
        """The device's own launches, each with the option added."""
        tables = submodule("ops.tile_tables")
        find = tables.find

        def with_option(folder, device, name, dtype, sizes):
            return {**find(folder, device, name, dtype, sizes), **OPTIONS[request.param].get(name, {})}

        monkeypatch.setattr(tables, "find", with_option)

    @pytest.mark.parametrize("option", [name for name in OPTIONS if name.startswith("tma")], indirect=True)
    def test_boxes_hold_rows_of_the_next_sequence_that_leave_no_trace(kernel, option) -> None:
        case = CASES["packed in a window"]
        *tensors, do = inputs(case, EXACT)
        results = []
        for poison in (0.0, float("nan")):
            poisoned = [x.clone() for x in (*tensors, do)]
            for x in poisoned:
                x[20:23] += poison
            leaves = [x.requires_grad_() for x in poisoned[:3]]
            out = attend(kernel, case, *leaves)
            gradients = torch.autograd.grad(out, leaves, poisoned[3])
            results.append([torch.cat([x[:20], x[23:]]) for x in (out, *gradients)])
        assert all(map(torch.equal, *results))

    @pytest.mark.usefixtures("option")
    @pytest.mark.parametrize(
        "name",
        [
            "one token",
            "causal",
            "more queries in a window",
            "softcap in a window",
            "head of 320",
            "head of 20",
            "packed in a window",
            "packed, no queries or no keys",
        ],
    )
    def test_every_option_of_a_launch_matches_the_reference(kernel, expected, name) -> None:
        check(kernel, expected, CASES[name], EXACT)

    @pytest.mark.usefixtures("option")
    def test_every_option_of_a_launch_serves_sinks_and_both_gradients(kernel, submodule, expected) -> None:
        check_sink(kernel, submodule, CASES["packed in a window"])
        check(kernel, expected, CASES["packed"], EXACT, shared=True)


@pytest.mark.parametrize(
    ("left", "right"), [(-1, -1), (-1, 0), (-1, 3), (0, 0), (5, 0), (17, 0), (4, 9), (6, -1)]
)
def test_blocks_hold_all_that_is_seen_and_mask_all_that_is_not(submodule, left, right) -> None:
    spans = submodule("ops.attention.kernels").spans.fn
    for own, other in ((1, 1), (19, 19), (23, 9), (9, 23), (4, 0)):
        for first in range(0, own, 4):
            last = min(first + 4, own)
            for block in (1, 4, 6):
                arguments = (first, last, own, other, left, right, left >= 0, right >= 0, block)
                begin, lead, full, blocks = spans(*arguments, False)
                # In one loop none of the same blocks is seen as a whole.
                assert spans(*arguments, True) == (begin, lead, lead, blocks)
                assert 0 <= lead <= full <= blocks
                starts = range(begin, begin + blocks * block, block)
                for i in range(first, last):
                    seen = [
                        j
                        for j in range(other)
                        if (left < 0 or j >= i + other - own - left)
                        and (right < 0 or j <= i + other - own + right)
                    ]
                    assert {j for start in starts for j in range(start, start + block)} >= set(seen)
                    whole = {j for start in starts[lead:full] for j in range(start, start + block)}
                    assert whole <= set(seen)


def with_sink(submodule, case: Case, q, k, v, sink) -> torch.Tensor:
    """Probabilities over the keys and the sink, of which the sink's are dropped."""
    geometry, reference = submodule("ops.attention.window"), submodule("ops.attention.reference")
    window = geometry.Window(case.window[0], 0 if case.causal else case.window[1])
    out, lse = reference.attention(q, k, v, case.head_dim**-0.5, window)
    stacked = torch.stack([lse, sink[:, None].expand_as(lse)])
    share = torch.exp(lse - stacked.logsumexp(dim=0))
    return out * share.T.unsqueeze(-1)


def test_boxes_serve_tensors_whose_rows_and_heads_stand_at_multiples_of_16_bytes(submodule) -> None:
    descriptors = submodule("ops.attention.descriptors")
    x = torch.zeros(2, 5, 3, 64, dtype=torch.float16)
    (described,), blocks = descriptors.sources(
        {"CHUNK": 32, "TMA": 1}, [descriptors.Tile(x.transpose(1, 2), 16, 32)], []
    )
    assert (list(described.shape), list(described.strides)) == ([2, 5, 3, 64], [960, 192, 64, 1])
    assert (described.block_shape, blocks["TMA"]) == ([1, 1, 16, 32], 1)
    packed = descriptors.describe(descriptors.Tile(x[0], 16, 64))
    assert (packed.strides[2:], packed.block_shape) == ([64, 192, 1], [1, 1, 1, 16, 64])
    without = (
        x[:, :, :1].expand(2, 5, 3, 64),
        torch.zeros(2, 5, 3, 68, dtype=torch.float16)[..., :64],
        x.flatten()[1 : 1 + 64].view(1, 1, 1, 64),
        x[:, :0],
    )
    for tensor in without:
        tiles = [descriptors.Tile(tensor, 16, 32)]
        arguments, blocks = descriptors.sources({"CHUNK": 32, "TMA": 1}, tiles, tiles)
        assert arguments[0] is tensor
        assert (arguments[1], blocks["TMA"]) == (None, 0)
