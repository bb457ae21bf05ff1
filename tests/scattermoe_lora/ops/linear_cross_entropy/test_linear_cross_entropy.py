"""Cross entropy from hidden states, against the float64 reference. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

import re
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import INTERPRETED, TRITON, assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("bfloat16")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The Triton kernels do not take it.
if not TRITON:
    TOLERANCE[torch.float64] = 1e-12

# Tokens, hidden size, vocabulary, rank: one of each; no multiple of any block; more words than a block has, and rows
# that a GPU reads 16 bytes at a time.
AWKWARD = [(1, 16, 1, 1), (13, 33, 37, 3), (7, 48, 300, 8)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped and smoothed": {"softcap": 2.0, "label_smoothing": 0.1},
    "weighted": {"class_weight": True, "token_weight": True, "label_smoothing": 0.2, "z_loss": 0.1},
    "sum": {"reduction": "sum", "logit_scale": 0.3, "softcap": 3.0},
    "by items": {"num_items_in_batch": 7, "z_loss": 0.05},
    "by token": {"reduction": "none", "token_weight": True},
}
HEADS = {"frozen": (), "trained": ("weight",), "bias": ("weight", "bias"), "lora": ("lora_a", "lora_b")}


@pytest.fixture(autouse=True)
def small_blocks(submodule, monkeypatch) -> None:
    """Blocks so small that a few dozen tokens and words need several."""
    cpu = submodule("ops.linear_cross_entropy.cpu")
    monkeypatch.setattr(cpu, "_TOKENS", 5)
    monkeypatch.setattr(cpu, "_VOCABULARY", 7)
    total = submodule("ops.linear_cross_entropy.cpu_total")
    monkeypatch.setattr(total, "_LEAST_TOKENS", 3)
    for name in ("_LOGITS_BYTES", "_TRAINED_BYTES", "_SUMMED_BYTES"):
        monkeypatch.setattr(total, name, 1)
    if INTERPRETED:
        gpu = submodule("ops.linear_cross_entropy.gpu")
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(gpu, "tile", lambda *_: blocks)
        # Two tiles of words, for most of the shapes below.
        monkeypatch.setattr(gpu, "_PART_BYTES", 64 * 4 * 13)
        total = submodule("ops.linear_cross_entropy.gpu_total")
        monkeypatch.setattr(total, "_LOGITS_BYTES", 1)
        monkeypatch.setattr(total, "_MULTIPLE", 3)
        monkeypatch.setattr(total, "LAUNCH", {"BLOCK_N": 32, "num_warps": 1, "num_stages": 1})


@pytest.fixture
def reference(submodule):
    return submodule("ops.linear_cross_entropy.reference").linear_cross_entropy


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, options: dict[str, Any], trained: tuple[str, ...]
) -> tuple[torch.Tensor, dict[str, Any], list[torch.Tensor]]:
    """Labels, the other arguments, and those that need gradients; one token in three is ignored."""
    tokens, width, vocabulary, rank = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64).to(dtype)

    arguments = {"hidden": random(tokens, width), "weight": random(vocabulary, width) / 2, **options}
    if "bias" in trained:
        arguments["bias"] = random(vocabulary)
    if "lora_a" in trained:
        arguments |= {"lora_a": random(rank, width), "lora_b": random(vocabulary, rank) / 4, "scaling": 0.7}
    for name, count in (("class_weight", vocabulary), ("token_weight", tokens)):
        if name in options:
            arguments[name] = random(count).abs() + 0.1
    leaves = [arguments[name].requires_grad_() for name in ("hidden", *trained)]
    labels = torch.randint(vocabulary, (tokens,))
    labels[1::3] = -100
    return labels, arguments, leaves


def exact(reference: Any, labels: torch.Tensor, arguments: dict[str, Any], leaves: list[torch.Tensor]) -> Any:
    """The reference's three results in float64, and its leaves."""
    wide = {}
    twins = {}
    for name, value in arguments.items():
        wide[name] = value
        if isinstance(value, torch.Tensor):
            wide[name] = value.detach().double().requires_grad_(value.requires_grad)
            twins[id(value)] = wide[name]
    return reference(labels=labels, **wide), [twins[id(leaf)] for leaf in leaves]


def gradients(results: Any, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of a sum in which every element of every result has another factor."""
    generator = torch.Generator().manual_seed(1)
    total = 0
    for result in results:
        factors = torch.randn(result.shape, generator=generator, dtype=torch.float64, device="cpu")
        total = total + (result.double() * factors.to(result.device)).sum()
    return torch.autograd.grad(total, leaves)


# Every option and every head, most of them with two of the other.
PAIRS = [
    *(("plain", head) for head in HEADS),
    ("capped and smoothed", "frozen"),
    ("capped and smoothed", "lora"),
    ("weighted", "bias"),
    ("weighted", "lora"),
    ("sum", "frozen"),
    ("by items", "trained"),
    ("by token", "frozen"),
    ("by token", "bias"),
]


@pytest.mark.parametrize(("name", "head"), PAIRS)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_results_and_gradients_match_the_reference(kernel, reference, shape, name, head) -> None:
    for dtype, more in [*((dtype, False) for dtype in TOLERANCE), (torch.float32, True)]:
        labels, arguments, leaves = problem(shape, dtype, OPTIONS[name], HEADS[head])
        got = kernel.linear_cross_entropy(
            labels=labels, **arguments, return_log_probs=True, return_entropy=more
        )
        results = [result for result in got if result is not None]
        assert len(results) == 2 + more
        assert {result.dtype for result in results} == {torch.promote_types(dtype, torch.float32)}
        wanted, twins = exact(reference, labels, arguments, leaves)
        wanted = wanted[: len(results)]
        own = gradients(results, leaves)
        assert [t.dtype for t in own] == [dtype] * len(leaves)
        assert_close(results, wanted, TOLERANCE[dtype])
        # With one word there is nothing to choose: all gradients are zero, and there is nothing to be relative to.
        if shape[2] > 1:
            assert_close(own, gradients(wanted, twins), TOLERANCE[dtype])


@pytest.mark.parametrize("head", ["frozen", "lora"])
def test_a_weight_that_is_decoded_by_rows_gives_the_same_and_is_not_kept(
    kernel, submodule, monkeypatch, head
) -> None:
    decoded = submodule("ops.linear_cross_entropy.decoded")
    options = {"softcap": 2.0, "label_smoothing": 0.1, "class_weight": True, "z_loss": 0.1}
    labels, arguments, leaves = problem((13, 32, 37, 3), torch.float32, options, HEADS[head])
    weight = arguments.pop("weight")
    monkeypatch.setattr(decoded, "_PART_BYTES", 5 * 32 * 4)
    alive: list[Any] = []

    def decode(start: int, stop: int) -> torch.Tensor:
        alive.append(weakref.ref(part := weight[start:stop].clone()))
        return part

    quantized = kernel.DecodedWeight((37, 32), torch.float32, weight.device, decode)
    more = {"return_log_probs": True, "return_entropy": True}
    expected = kernel.linear_cross_entropy(weight=weight, labels=labels, **arguments, **more)
    got = kernel.linear_cross_entropy(weight=quantized, labels=labels, **arguments, **more)
    assert len(alive) == 8
    assert not any(part() is not None for part in alive)
    assert_close(got, expected, 2e-5)
    assert_close(gradients(got, leaves), gradients(expected, leaves), 2e-5)
    wrong = kernel.DecodedWeight((37, 32), torch.float64, weight.device, decode)
    with pytest.raises(
        ValueError, match=r"weight: expected dtype of hidden, torch\.float32, got torch\.float64"
    ):
        kernel.linear_cross_entropy(weight=wrong, labels=labels, **arguments)
    wrong = kernel.DecodedWeight((37, 32), torch.float32, weight.device, lambda *_: weight)
    message = r"weight: expected decode\(0, 5\) to return \[5, 32\] of torch\.float32, got \[37, 32\]"
    with pytest.raises(ValueError, match=message):
        kernel.linear_cross_entropy(weight=wrong, labels=labels, **arguments)


@pytest.mark.parametrize("head", ["frozen", "lora"])
def test_statistics_of_tokens_are_those_of_the_logits(kernel, submodule, monkeypatch, head) -> None:
    folder = "ops.linear_cross_entropy"
    monkeypatch.setattr(submodule(f"{folder}.decoded"), "_PART_BYTES", 5 * 32 * 4)
    settings = submodule(f"{folder}.arguments").Settings(0.5, 2.0, True, True, True, False)
    _, arguments, leaves = problem((13, 32, 37, 3), torch.float32, {"bias": torch.zeros(37)}, HEADS[head])
    arguments.pop("scaling", None)
    logits = submodule(f"{folder}.reference").logits(**arguments, softcap=2.0, logit_scale=0.5)
    top, log_p = logits.max(dim=-1), logits.log_softmax(-1)
    labels = top.indices.clone()
    labels[::2] = (labels[::2] + 1) % 37
    entropy, log_probs = -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = gradients([log_probs, entropy], leaves)
    weight = arguments.pop("weight")
    decoded = kernel.DecodedWeight((37, 32), torch.float32, weight.device, lambda *part: weight[slice(*part)])
    hidden = arguments.pop("hidden")
    for own in (weight, decoded):
        got = submodule(f"{folder}.api").token_statistics(hidden, own, labels, settings, **arguments)
        assert torch.equal(got.label_logit >= got.peak, labels == top.indices)
        assert not got.peak.requires_grad
        values = [got.peak, got.logit_sum, got.entropy, got.lse]
        assert_close(values, [top.values, logits.sum(-1), entropy, logits.logsumexp(-1)], 2e-5)
        own_log_probs = got.label_logit - got.lse
        assert_close(gradients([own_log_probs, got.entropy], leaves), expected, 2e-5)


def test_loss_alone_has_the_same_bits_every_time_and_no_matter_what_else_is_asked_for(kernel) -> None:
    labels, arguments, leaves = problem((13, 33, 37, 3), torch.float32, {"softcap": 3.0}, ("weight",))
    runs = []
    for asked in ({}, {}, {"return_log_probs": True}, {"return_log_probs": True, "return_entropy": True}):
        result = kernel.linear_cross_entropy(labels=labels, **arguments, **asked)
        loss = result.loss if asked else result
        runs.append([loss, *torch.autograd.grad(loss, leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("trained", [(), ("weight",)])
def test_error_of_bfloat16_is_no_larger_than_that_of_the_logits_in_memory(kernel, reference, trained) -> None:
    labels, arguments, leaves = problem((64, 256, 300, 1), torch.bfloat16, {}, trained)
    arguments["weight"].data /= 8
    ours = kernel.linear_cross_entropy(labels=labels, **arguments)
    plain = F.cross_entropy(F.linear(arguments["hidden"], arguments["weight"]).float(), labels)
    wanted, twins = exact(reference, labels, arguments, leaves)
    right = torch.autograd.grad(wanted[0], twins)
    errors = []
    for loss in (ours, plain):
        own = torch.autograd.grad(loss, leaves)
        errors.append([float((g.double() - e).norm() / e.norm()) for g, e in zip(own, right, strict=True)])
    assert abs(ours - wanted[0]) <= abs(plain - wanted[0]) + 1e-5
    assert all(mine <= 1.05 * other for mine, other in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [(), ("weight", "bias"), ("lora_a", "lora_b")])
def test_all_ignored_and_no_tokens_give_zeros(kernel, reduction, trained) -> None:
    for tokens in (5, 0):
        labels, arguments, leaves = problem(
            (tokens, 16, 9, 2), torch.float32, {"reduction": reduction}, trained
        )
        result = kernel.linear_cross_entropy(
            labels=torch.full_like(labels, -100), **arguments, return_log_probs=True, return_entropy=True
        )
        values = [*result, *torch.autograd.grad(result.loss.sum(), leaves)]
        assert all(torch.equal(value, torch.zeros_like(value)) for value in values)


def test_shapes_strides_and_integers_of_any_kind(kernel) -> None:
    labels, arguments, _ = problem((12, 16, 9, 2), torch.float32, {"reduction": "none"}, ())
    hidden, weight = (arguments.pop(name).detach() for name in ("hidden", "weight"))
    expected = kernel.linear_cross_entropy(hidden, weight, labels, **arguments)
    strided = torch.empty(4, 3, 16, 2)[..., 0].copy_(hidden.view(4, 3, 16))
    got = kernel.linear_cross_entropy(
        strided, weight.t().contiguous().t(), labels.view(4, 3).int(), **arguments
    )
    assert torch.equal(got.view(-1), expected)
    one = kernel.linear_cross_entropy(hidden[0], weight, labels[0], **arguments)
    assert torch.equal(one, expected[0])


def test_autocast_reads_the_weight_in_its_dtype(kernel, bfloat16) -> None:
    labels, arguments, leaves = problem((13, 32, 37, 1), torch.float32, {}, ("weight",))
    with torch.autocast(labels.device.type, bfloat16):
        loss = kernel.linear_cross_entropy(labels=labels, **arguments)
        same = {name: value.detach().to(bfloat16) for name, value in arguments.items()}
        expected = kernel.linear_cross_entropy(labels=labels, **same)
    assert torch.equal(loss, expected)
    assert [t.dtype for t in torch.autograd.grad(loss, leaves)] == [torch.float32] * 2


def test_checkpointing_gives_the_same_bits(kernel) -> None:
    labels, arguments, leaves = problem((13, 32, 37, 1), torch.float32, {}, ("weight",))
    results = []
    checkpointed = partial(checkpoint, kernel.linear_cross_entropy, use_reentrant=False)
    for run in (kernel.linear_cross_entropy, checkpointed):
        loss = run(labels=labels, **arguments)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("head", ["bias", "lora"])
def test_second_backward_of_any_factor_gives_the_same_gradients(kernel, reference, head) -> None:
    labels, arguments, leaves = problem((13, 33, 37, 3), torch.float32, OPTIONS["weighted"], HEADS[head])
    leaves.append(arguments["token_weight"].requires_grad_())
    loss = kernel.linear_cross_entropy(labels=labels, **arguments)
    runs = [
        torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True) for factor in (1, 1, -8.0)
    ]
    wanted, twins = exact(reference, labels, arguments, leaves)
    assert_close(runs[0], torch.autograd.grad(wanted[0], twins), 2e-5)
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(-8 * first, third)


def test_float16_neither_loses_small_gradients_nor_overflows_in_sums_that_are_divided_later(
    kernel, reference
) -> None:
    options = {"num_items_in_batch": 3_000_000}
    labels, arguments, leaves = problem((13, 32, 37, 1), torch.float16, options, ("weight",))
    # As a gradient scaler does. A word's share of the gradient is 1e-8 before, which float16 does not have.
    scale = 2.0**21
    loss = kernel.linear_cross_entropy(labels=labels, **arguments) * scale
    wanted, twins = exact(reference, labels, arguments, leaves)
    assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted[0] * scale, twins), 2e-3)
    hidden = torch.full((13, 16), 8000.0, dtype=torch.float16)
    weight = torch.zeros(37, 16, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(13, dtype=torch.long)
    (gradient,) = torch.autograd.grad(kernel.linear_cross_entropy(hidden, weight, labels), [weight])
    expected = torch.full((37, 16), 8000 / 37, dtype=torch.float64)
    expected[0] -= 8000
    assert_close([gradient], [expected], 2e-3)


if not INTERPRETED:

    @pytest.mark.parametrize("trained", [(), ("weight", "bias"), ("lora_a", "lora_b")])
    def test_operators_keep_torchs_contract_and_compile_to_one_graph(kernel, submodule, trained) -> None:
        labels, arguments, leaves = problem((13, 32, 37, 2), torch.float32, {"softcap": 3.0}, trained)
        compiled = torch.compile(
            kernel.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True
        )
        for asked in ({}, {"return_entropy": True, "label_smoothing": 0.1}):
            results = []
            for run in (compiled, kernel.linear_cross_entropy):
                result = run(labels=labels, **arguments, **asked)
                loss = result.loss + result.entropy.sum() if asked else result
                results.append([loss, *torch.autograd.grad(loss, leaves)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        folder = "ops.linear_cross_entropy"
        op = submodule(f"{folder}.op").linear_cross_entropy_forward
        total = submodule(f"{folder}.total").linear_cross_entropy_total
        factors = [torch.rand(13, requires_grad=True), None, None]
        optional = [None, None, None]
        if "bias" in trained:
            optional[0] = arguments["bias"]
        if "lora_a" in trained:
            optional[1:] = [torch.randn(13, 2, requires_grad=True), arguments["lora_b"]]
        for flags in ((False, False, False, not trained), (True, True, True, False)):
            torch.library.opcheck(
                op, (arguments["hidden"], arguments["weight"], *optional, labels, None, 0.5, 2.0, *flags)
            )
        operands = (arguments["hidden"], arguments["weight"], *optional, labels, None)
        needs = [t is not None and t.requires_grad for t in operands[:5]]
        torch.library.opcheck(total, (*operands, *factors, 0.5, 2.0, False, True, False, False, needs))

    @pytest.mark.parametrize("trained", [(), ("weight",)])
    def test_no_tensor_of_tokens_by_vocabulary_is_made(kernel, submodule, monkeypatch, trained) -> None:
        tokens, width, vocabulary = 40, 16, 700
        labels, arguments, leaves = problem((tokens, width, vocabulary, 1), torch.float32, {}, trained)
        sizes: list[int] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor):
                    sizes.append(result.untyped_storage().nbytes() // result.itemsize)
                return result

        # A mode sees an operator, and not what is done in it.
        cpu = submodule("ops.linear_cross_entropy.cpu")

        def watched(function: Any) -> Any:
            def run(*args: Any) -> Any:
                with Watch():
                    return function(*args)

            return run

        total = submodule("ops.linear_cross_entropy.cpu_total")
        for module, name in ((cpu, "forward"), (cpu, "backward"), (total, "forward")):
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
        torch.autograd.grad(kernel.linear_cross_entropy(labels=labels, **arguments), leaves)
        assert max(sizes) == vocabulary * width

    def test_derivatives_that_it_has_not_are_refused(kernel) -> None:
        labels, arguments, leaves = problem((5, 16, 9, 1), torch.float32, {}, ("weight",))
        loss = kernel.linear_cross_entropy(labels=labels, **arguments)
        (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.sum().backward()


FLOATS = "expected float64, float32, bfloat16 or float16"
HIDDEN, WEIGHT, LABELS = torch.zeros(2, 5, 8), torch.zeros(9, 8), torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": HIDDEN.long()}, f"hidden: {FLOATS}, got torch.int64"),
        ({"hidden": HIDDEN[..., :0]}, "hidden: expected [..., H], got [2, 5, 0]"),
        ({"weight": WEIGHT[:, :7]}, "weight: expected [V, 8], the width of hidden, got [9, 7]"),
        ({"weight": WEIGHT[:0]}, "weight: expected [V, 8], the width of hidden, got [0, 8]"),
        ({"weight": WEIGHT.half()}, "weight: expected dtype of hidden, torch.float32, got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, "weight: expected device of hidden, cpu, got meta"),
        ({"labels": LABELS[0]}, "labels: expected shape of hidden without its last dimension, [2, 5], got [5]"),
        ({"labels": LABELS.float()}, "labels: expected integers, got torch.float32"),
        ({"labels": LABELS.to("meta")}, "labels: expected device of hidden, cpu, got meta"),
        ({"labels": LABELS + 9}, "labels: expected values from 0 to 8, or ignore_index -100, got 9"),
        ({"labels": LABELS - 1}, "labels: expected values from 0 to 8, or ignore_index -100, got -1"),
        ({"bias": WEIGHT[0]}, "bias: expected shape [9], got [8]"),
        ({"class_weight": LABELS.new_ones(9)}, f"class_weight: {FLOATS}, got torch.int64"),
        ({"token_weight": torch.ones(5)}, "token_weight: expected shape [2, 5], got [5]"),
        ({"softcap": 0.0}, "softcap: expected a finite number above 0, or None, got 0.0"),
        ({"softcap": -1.0}, "softcap: expected a finite number above 0, or None, got -1.0"),
        ({"softcap": float("inf")}, "softcap: expected a finite number above 0, or None, got inf"),
        ({"z_loss": float("inf")}, "z_loss: expected a finite number, got inf"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a finite number, got nan"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number between 0 and 1, got 1.5"),
        ({"reduction": "max"}, "reduction: expected 'mean', 'sum' or 'none', got 'max'"),
        (
            {"reduction": "sum", "num_items_in_batch": 3},
            "reduction: expected 'mean' with num_items_in_batch, which says what to divide by, got 'sum'",
        ),
        ({"num_items_in_batch": -1}, "num_items_in_batch: expected a number of labels, 0 or more, got -1"),
        ({"num_items_in_batch": torch.ones(2)}, "num_items_in_batch: expected one number, got [2]"),
        ({"lora_a": torch.zeros(2, 8)}, "lora_a and lora_b are given together or not at all"),
        ({"lora_a": torch.zeros(2, 7), "lora_b": torch.zeros(9, 2)}, "lora_a: expected shape [2, 8], got [2, 7]"),
        ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(9, 0)}, "lora_a: expected [r, 8] with r >= 1, got [0, 8]"),
        ({"lora_a": torch.zeros(2, 8), "lora_b": torch.zeros(9, 3)}, "lora_b: expected shape [9, 2], got [9, 3]"),
    ],
)  # fmt: skip
def test_bad_input_names_argument_expected_and_got(kernel, changed, message) -> None:
    with pytest.raises(ValueError, match=re.escape(f"linear_cross_entropy: {message}")):
        kernel.linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **changed})
