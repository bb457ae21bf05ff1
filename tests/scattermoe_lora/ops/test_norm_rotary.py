"""RMSNorm with rotary embedding, against the float64 reference. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import INTERPRETED, TRITON, assert_close, error
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("bfloat16")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# The Triton kernels do not take it.
if not TRITON:
    TOLERANCE[torch.float64] = 1e-14

# batch, tokens, heads, head_dim, rotated columns, batch of cos and sin
AWKWARD = [
    (1, 1, 1, 16, 16, 1),
    (2, 5, 3, 512, 512, 2),
    (1, 7, 1, 80, 80, 1),
    (3, 4, 2, 96, 32, 1),
    (2, 3, 5, 18, 6, 2),
    (4, 2, 3, 256, 256, 1),
    (2, 3, 2, 36, 34, 1),
]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def leaves(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """``x``, ``weight``, ``cos``, ``sin`` and a gradient in attention's layout, ``[B, H, S, D]``."""
    batch, tokens, heads, head_dim, rotated, entries = shape
    x = random(batch, tokens, heads * head_dim, dtype=dtype).view(batch, tokens, heads, head_dim)
    angles = [random(entries, tokens, rotated, dtype=dtype) for _ in "cs"]
    grad = random(batch, heads, tokens, head_dim, dtype=dtype).transpose(1, 2)
    return [x.requires_grad_(), random(head_dim, dtype=dtype).requires_grad_(), *angles, grad]


def exact(
    reference: Any, x: torch.Tensor, weight: Any, cos: Any, sin: Any, grad: torch.Tensor
) -> list[torch.Tensor]:
    """Result and gradients in float64."""
    wide = [None if t is None else t.detach().double() for t in (x, weight, cos, sin)]
    inputs = [t.requires_grad_() for t in wide[:2] if t is not None]
    y = reference(*wide)
    return [y, *torch.autograd.grad(y, inputs, grad.double())]


@pytest.fixture
def reference(submodule):
    return submodule("ops.norm_rotary.reference").rms_norm_rotary


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients_match_the_reference(kernel, reference, shape, dtype) -> None:
    x, weight, cos, sin, grad = leaves(shape, dtype)
    y = kernel.rms_norm_rotary(x, weight, cos, sin)
    got = [y, *torch.autograd.grad(y, (x, weight), grad)]
    assert all(t.dtype == dtype for t in got)
    assert y.is_contiguous()
    assert_close(got, exact(reference, x, weight, cos, sin, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head_dim", [16, 46, 512])
def test_norm_without_rotation_matches_the_reference(kernel, reference, weighted, head_dim) -> None:
    x, weight, _, _, grad = leaves((2, 5, 3, head_dim, 2, 1), torch.float32)
    w = weight if weighted else None
    y = kernel.rms_norm_rotary(x, w)
    got = [y, *torch.autograd.grad(y, (x, weight) if weighted else (x,), grad)]
    assert_close(got, exact(reference, x, w, None, None, grad), 1e-6)


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 3),
    half=st.integers(1, 40),
    rest=st.integers(0, 40),
    broadcast=st.booleans(),
    weighted=st.booleans(),
)
def test_any_shape(kernel, submodule, batch, tokens, heads, half, rest, broadcast, weighted) -> None:
    shape = (batch, tokens, heads, 2 * half + rest // 2 * 2, 2 * half, 1 if broadcast else batch)
    x, weight, cos, sin, grad = leaves(shape, torch.float32)
    w = weight if weighted else None
    y = kernel.rms_norm_rotary(x, w, cos, sin)
    got = [y, *torch.autograd.grad(y, (x, weight) if weighted else (x,), grad)]
    oracle = submodule("ops.norm_rotary.reference").rms_norm_rotary
    assert_close(got, exact(oracle, x, w, cos, sin, grad), 2e-6)


def test_blocks_and_chunks_meet(kernel, submodule, reference, monkeypatch) -> None:
    monkeypatch.setattr(submodule("ops.norm_rotary.cpu"), "_CHUNK_ELEMENTS", 100)
    if INTERPRETED:
        gpu = submodule("ops.norm_rotary.gpu")
        monkeypatch.setattr(gpu, "tile", lambda *_: {"ELEMENTS": 64, "num_warps": 4})
        monkeypatch.setattr(gpu, "_SUMMING_PROGRAMS", 3)
    for shape in ((2, 9, 3, 16, 16, 2), (7, 1, 2, 20, 8, 1), (3, 2, 1, 16, 4, 3)):
        x, weight, cos, sin, grad = leaves(shape, torch.float32)
        y = kernel.rms_norm_rotary(x, weight, cos, sin)
        got = [y, *torch.autograd.grad(y, (x, weight), grad)]
        assert_close(got, exact(reference, x, weight, cos, sin, grad), 2e-6)


LAUNCHES = [
    {"ELEMENTS": 64, "PRELOAD": 1},
    {"ELEMENTS": 64, "PROGRAMS": 3},
    {"ELEMENTS": 32, "BY_TOKEN": 1, "num_stages": 2},
    {"ELEMENTS": 128, "PRELOAD": 1, "PROGRAMS": 2, "num_stages": 3, "num_warps": 2},
    {"ELEMENTS": 16, "BY_TOKEN": 1, "PROGRAMS": 5, "num_warps": 1},
]
SHAPES = [(1, 1, 1, 16, 16, 1), (2, 9, 3, 16, 16, 2), (7, 1, 2, 20, 8, 1), (3, 5, 4, 48, 34, 1)]

if TRITON:

    @pytest.mark.parametrize(
        ("shape", "launch"),
        # Every shape with some of the launches, and every launch with some of the shapes.
        [
            (shape, launch)
            for i, shape in enumerate(SHAPES)
            for j, launch in enumerate(LAUNCHES)
            if (i + j) % 2
        ],
        ids=str,
    )
    def test_every_launch_matches_the_reference(
        kernel, submodule, reference, monkeypatch, shape, launch
    ) -> None:
        gpu = submodule("ops.norm_rotary.gpu")
        monkeypatch.setattr(gpu, "tile", lambda *_: {"num_warps": 4, **launch})
        x, weight, cos, sin, grad = leaves(shape, torch.float32)
        for w, c, s in ((weight, cos, sin), (None, cos, sin), (weight, None, None)):
            y = kernel.rms_norm_rotary(x, w, c, s)
            inputs = (x,) if w is None else (x, w)
            got = [y, *torch.autograd.grad(y, inputs, grad, retain_graph=True)]
            assert_close(got, exact(reference, x, w, c, s, grad), 2e-6)
            # Also without the sum that a program walks over many blocks for.
            assert torch.equal(torch.autograd.grad(y, x, grad)[0], got[1])

    @pytest.mark.parametrize("programs", [None, 1, 3])
    def test_the_launch_bounds_the_rows_of_sums(kernel, submodule, monkeypatch, programs) -> None:
        gpu = submodule("ops.norm_rotary.gpu")
        launch = {"ELEMENTS": 16, "num_warps": 4} | ({} if programs is None else {"PROGRAMS": programs})
        monkeypatch.setattr(gpu, "tile", lambda *_: launch)
        monkeypatch.setattr(gpu, "_multiprocessors", lambda device: 2)
        grids, launched = [], gpu.rotary_backward_kernel

        class Recorded:
            def __getitem__(self, grid):
                grids.append(grid)
                return launched[grid]

        monkeypatch.setattr(gpu, "rotary_backward_kernel", Recorded())
        x, weight, cos, sin, grad = leaves((1, 20, 1, 16, 16, 1), torch.float32)
        torch.autograd.grad(kernel.rms_norm_rotary(x, weight, cos, sin), (x, weight), grad)
        # One a row of 20; or so many for each of the two multiprocessors.
        assert grids == [(20 if programs is None else 2 * programs, 1, 1)]


def test_strided_and_expanded_inputs_are_read_in_place_or_copied(kernel) -> None:
    fused = random(2, 5, 64)
    for x in (
        fused[..., 16:48].view(2, 5, 2, 16),
        random(2, 2, 5, 16).transpose(1, 2),
        random(2, 5, 16, 2).mT,
    ):
        cos = random(5, 16).expand(2, 5, 16)
        sin = random(16, 5).t()[None]
        weight = random(32)[::2]
        plain = [
            t.clone(memory_format=torch.contiguous_format) for t in (x, weight, cos, sin.expand(2, 5, 16))
        ]
        assert torch.equal(
            kernel.rms_norm_rotary(x, weight, cos, sin.expand(2, 5, 16)), kernel.rms_norm_rotary(*plain)
        )
        shared = kernel.rms_norm_rotary(x, weight, cos[:1], sin)
        assert torch.equal(shared, kernel.rms_norm_rotary(*plain))


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 1, 1, 16), (1 << 31, 16, 16, 1)), ((1, 3, 1, 16), (0, 1 << 30, 16, 1))]
)
def test_rows_stand_beyond_two_to_the_31_elements(kernel, shape, strides) -> None:
    # 4 GB of addresses, of which a few pages are ever touched.
    far = torch.empty((1 << 31) + 64, dtype=torch.float16).as_strided(shape, strides).copy_(random(*shape))
    far_grad = (
        torch.empty((1 << 31) + 64, dtype=torch.float16).as_strided(shape, strides).copy_(random(*shape))
    )
    angles = random(1, shape[1], 16, dtype=torch.float16)
    results = []
    for x, grad in ((far, far_grad), (far.clone(), far_grad.clone())):
        x = x.detach().requires_grad_()
        y = kernel.rms_norm_rotary(x, None, angles, angles)
        results.append([y, *torch.autograd.grad(y, x, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def transformers_result(x: torch.Tensor, weight: Any, cos: Any, sin: Any, eps: float) -> torch.Tensor:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, apply_rotary_pos_emb

    norm = Gemma4RMSNorm(x.shape[-1], eps=eps, with_scale=weight is not None)
    weights = {} if weight is None else {"weight": weight}
    y = torch.func.functional_call(norm, weights, (x,))
    return y if cos is None else apply_rotary_pos_emb(y, cos, sin, unsqueeze_dim=2)


@pytest.mark.parametrize("dtype", [d for d in TOLERANCE if d != torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 512])
def test_it_rounds_where_transformers_rounds(kernel, dtype, head_dim) -> None:
    x, weight, cos, sin, _ = leaves((2, 9, 2, head_dim, head_dim, 1), dtype)
    # A global layer of Gemma 4 turns a quarter of the pairs: the other angles are zero.
    half = head_dim // 2
    for angles, constant in ((cos, 1), (sin, 0)):
        angles.view(1, 9, 2, half)[..., half // 4 :] = constant
    for w, c, s in ((weight, cos, sin), (weight, None, None), (None, None, None)):
        got, expected = kernel.rms_norm_rotary(x, w, c, s, 1e-3), transformers_result(x, w, c, s, 1e-3)
        if INTERPRETED:
            # The sum of squares is taken in another order: now and then the last bit differs.
            assert error(got, expected) < TOLERANCE[dtype]
            assert (got != expected).float().mean() < (1 if dtype == torch.float32 else 0.02)
        else:
            assert torch.equal(got, expected)


def test_gradients_in_half_precision_are_closer_than_those_of_the_single_operators(kernel, reference) -> None:
    x, weight, cos, sin, grad = leaves((2, 9, 2, 64, 64, 1), torch.bfloat16)
    errors = []
    for run in (kernel.rms_norm_rotary, transformers_result):
        gradients = torch.autograd.grad(run(x, weight, cos, sin, 1e-6), (x, weight), grad)
        pairs = zip(gradients, exact(reference, x, weight, cos, sin, grad)[1:], strict=True)
        errors.append([(got.double() - right).norm() / right.norm() for got, right in pairs])
    assert all(ours < 0.9 * theirs for ours, theirs in zip(*errors, strict=True)), errors


def test_angles_and_weights_in_float32_beside_half_precision(kernel) -> None:
    x, weight, cos, sin, grad = leaves((2, 5, 3, 32, 32, 1), torch.float16)
    cos, sin, wide = cos.float(), sin.float(), weight.detach().float().requires_grad_()
    y = kernel.rms_norm_rotary(x, wide, cos, sin)
    expected = transformers_result(x, wide, cos, sin, 1e-6)
    assert y.dtype == expected.dtype == torch.float32
    dx, dw = torch.autograd.grad(y, (x, wide), grad.float())
    assert (dx.dtype, dw.dtype) == (torch.float16, torch.float32)
    assert_close([y], [expected], 1e-3)


def test_autocast_does_not_reach_into_it(kernel) -> None:
    x, weight, cos, sin, grad = leaves((2, 5, 3, 32, 32, 1), torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            y = kernel.rms_norm_rotary(x, weight, cos, sin)
            results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_same_input_gives_the_same_bits(kernel) -> None:
    x, weight, cos, sin, grad = leaves((2, 40, 3, 32, 32, 1), torch.float32)
    first, second = (
        torch.autograd.grad(kernel.rms_norm_rotary(x, weight, cos, sin), (x, weight), grad) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_gradients_asked_for_are_computed(kernel) -> None:
    x, weight, cos, sin, grad = leaves(AWKWARD[1], torch.float32)
    frozen = kernel.rms_norm_rotary(x, weight.detach(), cos, sin)
    both = torch.autograd.grad(kernel.rms_norm_rotary(x, weight, cos, sin), (x, weight), grad)
    assert torch.equal(torch.autograd.grad(frozen, x, grad)[0], both[0])
    alone = torch.autograd.grad(kernel.rms_norm_rotary(x.detach(), weight, cos, sin), weight, grad)
    assert torch.equal(alone[0], both[1])


def test_backward_keeps_the_input_and_nothing_else_of_its_size(kernel) -> None:
    x, weight, cos, sin, _ = leaves(AWKWARD[1], torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        kernel.rms_norm_rotary(x, weight, cos, sin)
    assert [t.data_ptr() for t in saved if t.numel() >= x.numel()] == [x.data_ptr()]


class Largest(TorchDispatchMode):
    """The sizes of what operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = [t for t in args if isinstance(t, torch.Tensor)]
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        for t in results:
            if all(t.untyped_storage().data_ptr() != v.untyped_storage().data_ptr() for v in views):
                self.elements.append(t.numel())
        return out


def test_native_code_allocates_the_result_and_chunks(kernel, submodule, monkeypatch) -> None:
    cpu = submodule("ops.norm_rotary.cpu")
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 256)
    x, weight, cos, sin, grad = (t.detach() for t in leaves((2, 50, 4, 16, 16, 2), torch.bfloat16))
    operands = submodule("ops.norm_rotary.arguments").Operands(x, weight, cos, sin, 1e-6)
    for call in (
        lambda: cpu.forward(operands),
        lambda: cpu.backward(grad, operands, ["x", "weight"]),
    ):
        with Largest() as seen:
            call()
        assert sorted(seen.elements)[-1] == x.numel()
        assert sorted(seen.elements)[-2] <= 256


def test_rows_of_zeros_and_no_rows(kernel) -> None:
    x = torch.zeros(1, 2, 1, 16, requires_grad=True)
    y = kernel.rms_norm_rotary(x, eps=1e-6)
    assert y.eq(0).all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    for shape in ((0, 3, 2, 16), (2, 0, 2, 16), (2, 3, 0, 16)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.ones(16, requires_grad=True)
        angles = torch.zeros(1, shape[1], 16)
        y = kernel.rms_norm_rotary(x, weight, angles, angles)
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), weight)[0].tolist() == [0] * 16


def test_operators_pass_opcheck(kernel, submodule) -> None:
    op = submodule("ops.norm_rotary.op")
    x, weight, cos, sin, grad = leaves(AWKWARD[4], torch.float32)
    torch.library.opcheck(op.norm_rotary_forward, (x, weight, cos, sin, 1e-6))
    torch.library.opcheck(op.norm_rotary_forward, (x, None, None, None, 1e-6))
    plain = [t.detach() for t in (grad, x, weight, cos, sin)]
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(op.norm_rotary_backward, (*plain, 1e-6, needs))


if not TRITON:

    def test_gradients_pass_gradcheck(kernel) -> None:
        x, weight, cos, sin, _ = leaves((2, 3, 2, 12, 8, 1), torch.float64)
        assert torch.autograd.gradcheck(lambda x, w: kernel.rms_norm_rotary(x, w, cos, sin), (x, weight))

    def test_one_graph_serves_every_length(kernel) -> None:
        from torch._dynamo.backends.debugging import aot_eager

        graphs = []

        def counting(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return aot_eager(graph, inputs)

        torch._dynamo.reset()
        compiled = torch.compile(kernel.rms_norm_rotary, fullgraph=True, dynamic=True, backend=counting)
        counts = []
        for tokens in (5, 9, 33):
            x, weight, cos, sin, grad = leaves((2, tokens, 3, 16, 16, 2), torch.float32)
            results = []
            for run in (compiled, kernel.rms_norm_rotary):
                y = run(x, weight, cos, sin)
                results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            counts.append(len(graphs))
        assert counts == counts[:1] * 3

    @pytest.mark.parametrize("target", ["sm_120", "gfx942"])
    def test_largest_heads_compile_and_keep_their_values_in_registers(submodule, target) -> None:
        from kernelpress.compile import aot

        specs = [
            s
            for s in submodule("ops.norm_rotary.specs").COMPILE_SPECS
            if "512 rotated 512" in s.label and target in s.targets
        ]
        # Forward, backward and with the weight's gradient in two dtypes, and two for each of the optional launches.
        assert len(specs) == 2 * 3 + 3 * 2
        for compiled in (aot.compile_one(spec, target) for spec in specs):
            assert compiled.error is None
            assert compiled.spilled == 0
            assert compiled.registers > 0

    def test_every_rule_of_every_device_is_compiled(submodule) -> None:
        tables, gpu = submodule("ops.tile_tables"), submodule("ops.norm_rotary.gpu")
        specs = submodule("ops.norm_rotary.specs").COMPILE_SPECS

        def is_compiled(name: str, launch: Any, target: str) -> bool:
            for spec in specs:
                c = spec.constants
                expected = gpu.constants_of(launch, c["HEADS"], 2 * c["HALF"] + c["REST"], 2 * c["HALF"])
                if (spec.kernel.__name__, target in spec.targets) == (f"{name}_kernel", True) and (
                    expected.items() <= {**c, **spec.options}.items()
                ):
                    return True
            return False

        optional = {"PRELOAD", "BY_TOKEN", "num_stages"}
        keys = {"rotary_forward": optional, "rotary_backward": {*optional, "PROGRAMS"}}
        for device in tables.DEVICES:
            target = "gfx90a" if device == tables.DEFAULT else device
            rules = tables.load(gpu.TILES, device).rules
            assert set(rules) == set(keys)
            for name, own in rules.items():
                for rule in own:
                    assert set(rule.launch) - keys[name] == {"ELEMENTS", "num_warps"}
                    assert is_compiled(name, rule.launch, target), f"{device} {name} {dict(rule.launch)}"
                # The last of each element size serves every call.
                assert {rule.bytes: dict(rule.limits) for rule in own} == {2: {}, 4: {}}

    # On a GPU it is the second.
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["Forward", "Training"])
    def test_kernels_benchmark_runs_and_verifies_the_workload(kernel, monkeypatch, name, dtype) -> None:
        from kernels.cli.benchmark import discover_benchmark_classes, run_benchmark_class

        script = REPOSITORY / "benchmarks" / "benchmark_norm_rotary.py"
        classes = {each.__name__: each for each in discover_benchmark_classes(script, REPOSITORY)}
        assert set(classes) == {"Forward", "Training"}
        monkeypatch.setitem(classes[name].setup.__globals__["DTYPES"], "cpu", (dtype,))
        built = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
        (timing,) = run_benchmark_class(classes[name], 1, 0, str(built.parent), True, "local")[0].values()
        assert timing.verified is True


X, WEIGHT, COS = torch.zeros(2, 5, 3, 8), torch.zeros(8), torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0],), "x: expected [B, S, H, D], got [5, 3, 8]"),
        ((X.long(),), "x: expected float64, float32, bfloat16 or float16, got torch.int64"),
        ((X[..., :7],), "x: expected an even head_dim (its last dimension), got 7"),
        ((X[..., :0],), "x: expected an even head_dim (its last dimension), got 0"),
        ((X, WEIGHT[:7]), "weight: expected shape [8], got [7]"),
        ((X, WEIGHT.long()), "weight: expected float64, float32, bfloat16 or float16, got torch.int64"),
        ((X, WEIGHT.to("meta")), "weight: expected device of x, cpu, got meta"),
        ((X, WEIGHT, COS), "cos and sin are given together or not at all"),
        ((X, WEIGHT, None, COS), "cos and sin are given together or not at all"),
        ((X, WEIGHT, COS[0], COS), "cos: expected shape [2 or 1, 5, rot], got [5, 8]"),
        ((X, WEIGHT, COS[:, :4], COS), "cos: expected shape [2 or 1, 5, rot], got [2, 4, 8]"),
        ((X, WEIGHT, COS, torch.zeros(3, 5, 8)), "sin: expected shape [2 or 1, 5, rot], got [3, 5, 8]"),
        (
            (X, WEIGHT, COS[..., :3], COS[..., :3]),
            "cos: expected an even last dimension between 2 and head_dim 8, got 3",
        ),
        (
            (X, WEIGHT, torch.zeros(2, 5, 10), COS),
            "cos: expected an even last dimension between 2 and head_dim 8, got 10",
        ),
        ((X, WEIGHT, COS, COS[..., :6]), "sin: expected shape of cos, [2, 5, 8], got [2, 5, 6]"),
        ((X, WEIGHT, COS.half(), COS.half()), "cos: expected dtype of x, torch.float32, got torch.float16"),
        ((X.double(), WEIGHT, COS, COS), "cos: expected dtype of x, torch.float64, got torch.float32"),
        (
            (X.half(), WEIGHT, COS.bfloat16(), COS.bfloat16()),
            "cos: expected dtype of x, torch.float16 or float32, got torch.bfloat16",
        ),
        ((X.half(), WEIGHT, COS, COS.half()), "sin: expected dtype of cos, torch.float32, got torch.float16"),
        ((X, WEIGHT, COS, COS.to("meta")), "sin: expected device of x, cpu, got meta"),
        ((X, WEIGHT, COS.clone().requires_grad_(), COS), "cos gets no gradient; pass cos.detach()"),
    ],
)
def test_bad_input_names_argument_expected_and_got(kernel, arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(f"rms_norm_rotary: {message}")):
        kernel.rms_norm_rotary(*arguments)


if INTERPRETED:

    def test_float64_has_no_triton_kernel(kernel) -> None:
        with pytest.raises(NotImplementedError, match="float64 runs on the CPU only"):
            kernel.rms_norm_rotary(X.double())
