"""Attention's native CPU code: what serves a call, in how much memory, and how exact its sums are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from torch.utils._python_dispatch import TorchDispatchMode


class Weights(TorchDispatchMode):
    """Notes the layout of each matrix that oneDNN gets as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dense: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            weight = args[2] if func._overloadname == "binary" else args[1]
            self.dense.append(weight.is_contiguous() or weight.t().is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["columns", "columns, transposed"])
def test_a_weight_of_any_layout_is_laid_out_for_onednn(
    submodule, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    monkeypatch.setattr(cpu_matmul, "_LARGE", 1)
    right = torch.randn(48, 2, 32)[:, 0] if layout == "columns" else torch.randn(32, 2, 48)[:, 0].t()
    monkeypatch.setattr(cpu_matmul, "prefers_onednn", lambda: True)
    x = torch.randn(16, 48)
    with Weights() as weights:
        got = cpu_matmul.add_matmul(x, right, torch.ones(16, 32))
    assert weights.dense == [True]
    assert_close([got], [x.double() @ right.double() + 1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "heads"), [(1, 4), (339, 1), (339, 4)])
def test_a_query_of_one_key_gets_no_gradient_at_all(
    kernel, dtype: torch.dtype, queries: int, heads: int
) -> None:
    """Its probability is 1 whatever the score: dQ and dK are 0, and dV is the sum of the gradients that arrive."""
    q, do = (torch.randn(1, queries, heads, 64).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 1, 1, 64).to(dtype).requires_grad_() for _ in range(2))
    dq, dk, dv = torch.autograd.grad(kernel.flash_attn_func(q.requires_grad_(), k, v), (q, k, v), do)
    assert not dq.any()
    assert not dk.any()
    exact = do.double().sum((1, 2))
    rounding = (exact.to(dtype).double() - exact).abs().max()
    # What is left of a sum in float32.
    summed = 1e-12 if dtype == torch.float64 else 1e-5 * exact.abs().max()
    assert (dv.double().view_as(exact) - exact).abs().max() <= rounding + summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_query_of_a_causal_sequence_gets_no_gradient_either(kernel, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 33, heads, 64).to(dtype).requires_grad_() for heads in (4, 2, 2))
    out = kernel.flash_attn_func(q, k, v, causal=True)
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert not dq[:, 0].any()
    assert dq[:, 1].any()


def test_nan_is_left_where_a_query_sees_one_key(kernel) -> None:
    q, k, v = (torch.randn(2, 33, heads, 64).requires_grad_() for heads in (4, 2, 2))
    out = kernel.flash_attn_func(q, k, v, causal=True)
    do = torch.randn_like(out)
    do[0, 0, 1] = torch.nan
    (dq,) = torch.autograd.grad(out, q, do)
    assert dq[0, 0, 1].isnan().all()
    dq[0, 0, 1] = 0
    assert not dq[:, 0].any()
    assert dq.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_gradients_of_the_log_sum_exp_may_be_larger_than_float16(submodule, size: float) -> None:
    flash = submodule("ops.attention.cpu_flash")
    q, k, v = (torch.randn(1, 2, rows, 16).half() for rows in (9, 200, 200))
    out, lse = flash.forward(q, k, v, None, False, 0.1)
    # Large and small ones, each as exact as float16's gradients are.
    grad_lse = torch.randn_like(lse) * torch.tensor([size, 1.0]).view(1, 2, 1)
    gradients = flash.backward(torch.zeros_like(out), grad_lse, q, k, v, out, lse, None, False, 0.1)
    inputs = [x.double().requires_grad_() for x in (q, k)]
    exact = ((inputs[0] @ inputs[1].mT * 0.1).logsumexp(-1) * grad_lse).sum()
    for got, exact_gradient in zip(gradients, torch.autograd.grad(exact, inputs), strict=False):
        for head in range(2):
            assert_close([got[:, head]], [exact_gradient[:, head]], 4e-3)


def test_an_infinite_score_is_no_nan(submodule) -> None:
    product = submodule("ops.attention.cpu_products")._exact_product
    a, b = torch.ones(3, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    b[2], b[3], b[4] = -torch.inf, torch.inf, torch.nan
    got, exact = product(a, b), a.double() @ b.double().T
    assert torch.equal(got[:, 2:4], exact[:, 2:4].float())
    assert got[:, 4].isnan().all()
    assert_close([got[:, :2]], [exact[:, :2]], 1e-3)


def test_gradients_of_keys_are_summed_over_blocks_in_float32(kernel, submodule) -> None:
    """Rounded to bfloat16 a block, they were 1.8 times as far off as one rounding.

    This is of what PyTorch's kernel does not compute; the soft cap has no effect.
    """
    q, do = torch.randn(2, 1, 2048, 1, 64).bfloat16()
    k, v = torch.randn(2, 1, 256, 1, 64).bfloat16()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    _, *gradients = torch.autograd.grad(kernel.flash_attn_func(*inputs, softcap=1e6), inputs, do)
    exact_inputs = [x.detach()[0].double().requires_grad_() for x in inputs]
    window = submodule("ops.attention.window").Window(-1, -1)
    exact, _ = submodule("ops.attention.reference").attention(*exact_inputs, 0.125, window)
    _, *exact_gradients = torch.autograd.grad(exact, exact_inputs, do[0].double())
    for got, exact_gradient in zip(gradients, exact_gradients, strict=True):
        rounding = (exact_gradient.bfloat16().double() - exact_gradient).norm()
        # The probabilities are rounded before the product, too.
        assert (got[0].double() - exact_gradient).norm() < 1.55 * rounding


class Masks(TorchDispatchMode):
    """Notes the calls of PyTorch's kernel, by the number of elements of their mask, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[int] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention_for_cpu" in str(func):
            mask = (kwargs or {}).get("attn_mask")
            self.masks.append(0 if mask is None else mask.numel())
        results = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return results


@pytest.mark.parametrize(
    ("window", "softcap", "masks"),
    [((-1, 0), 0.0, [0]), ((-1, -1), 0.0, [0]), ((63, 0), 0.0, None), ((-1, 0), 9.0, [])],
    ids=["causal", "full", "window", "soft cap"],
)
def test_no_call_makes_a_dense_mask(submodule, window, softcap, masks) -> None:
    cpu, arguments = submodule("ops.attention.cpu"), submodule("ops.attention.arguments")
    rows = 1600
    q, k, v = (torch.randn(1, rows, heads, 16) for heads in (2, 1, 1))
    operands = arguments.Operands(q, k, v, None, None)
    settings = arguments.Settings(rows, rows, 0.25, *window, softcap)
    with Masks() as forward:
        out, lse = cpu.forward(operands, settings)
    with Masks() as backward:
        cpu.backward(out, None, operands, out, lse, settings)
    for calls in (forward, backward):
        assert calls.largest < rows**2 / 2
        if masks is None:
            assert len(calls.masks) == -(-rows // 192)
            assert max(calls.masks) <= 192 * (192 + 63)
        else:
            assert calls.masks == masks


CASES = {
    "causal": (67, 67, 4, 2, (-1, 0)),
    "full": (33, 70, 4, 4, (-1, -1)),
    "one key head": (50, 50, 3, 1, (-1, 0)),
    "window": (450, 450, 2, 1, (20, 0)),
    "more keys": (210, 250, 2, 2, (-1, 0)),
    "more queries": (250, 210, 2, 2, (-1, 0)),
    "both sides": (200, 230, 2, 1, (30, 5)),
}


@pytest.mark.parametrize("is_plain", [False, True], ids=["kernel", "products"])
@pytest.mark.parametrize("shares", [False, True], ids=["repeated", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_and_products_agree_with_the_reference(
    submodule, monkeypatch: pytest.MonkeyPatch, name: str, shares: bool, is_plain: bool
) -> None:
    """Both give each other's log-sum-exp and take its gradient."""
    flash, sequence = submodule("ops.attention.cpu_flash"), submodule("ops.attention.cpu_sequence")
    if shares and not flash._SHARES_KEYS:
        pytest.skip(f"torch {torch.__version__}'s kernel wants as many key heads as heads")
    monkeypatch.setattr(flash, "_SHARES_KEYS", shares)
    monkeypatch.setattr(sequence, "_is_plain", lambda *_: is_plain)
    cpu, arguments = submodule("ops.attention.cpu"), submodule("ops.attention.arguments")
    queries, keys, heads, kv_heads, window = CASES[name]
    q, do = (torch.randn(2, queries, heads, 24, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, keys, kv_heads, 24, dtype=torch.float64) for _ in range(2))
    settings = arguments.Settings(queries, keys, 0.3, *window, 0.0)
    operands = arguments.Operands(q, k, v, None, None)
    out, lse = cpu.forward(operands, settings)
    seen = ~lse.isinf()
    grad_lse = torch.randn_like(lse) * seen
    gradients = cpu.backward(do, grad_lse, operands, out, lse, settings)
    reference = submodule("ops.attention.reference").attention
    for row in range(2):
        inputs = [x[row].clone().requires_grad_() for x in (q, k, v)]
        exact, exact_lse = reference(*inputs, 0.3, submodule("ops.attention.window").Window(*window))
        at = seen[row]
        assert torch.equal(exact_lse.isinf(), ~at)
        assert_close([lse[row][at]], [exact_lse[at].detach()], 1e-12)
        loss = (exact * do[row]).sum() + (exact_lse[at] * grad_lse[row][at]).sum()
        exact_gradients = torch.autograd.grad(loss, inputs)
        assert_close([x[row] for x in (out, *gradients)], [exact.detach(), *exact_gradients], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_not_above_that_of_sdpa(kernel, submodule, dtype: torch.dtype) -> None:
    q, do = (torch.randn(1, 1024, 4, 64).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 1024, 2, 64).to(dtype) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = kernel.flash_attn_func(*inputs, causal=True)
    got = [out, *torch.autograd.grad(out, inputs, do)]
    by_heads = [q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))]
    out = torch.nn.functional.scaled_dot_product_attention(*by_heads, is_causal=True).transpose(1, 2)
    theirs = [out, *torch.autograd.grad(out, inputs, do)]
    exact_inputs = [x.detach()[0].double().requires_grad_() for x in inputs]
    window = submodule("ops.attention.window").Window(-1, 0)
    exact, _ = submodule("ops.attention.reference").attention(*exact_inputs, 0.125, window)
    exact_results = [exact, *torch.autograd.grad(exact, exact_inputs, do[0].double())]
    for ours, their, exact_result in zip(got, theirs, exact_results, strict=True):
        error, other = ((x[0].double() - exact_result).norm() for x in (ours, their))
        assert error <= 1.02 * other


def test_a_call_without_an_operator_around_it_is_right_in_every_mode(
    kernel, submodule, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, calls = submodule("ops.attention.eager"), []
    plain = eager.attention
    monkeypatch.setattr(eager, "attention", lambda *arguments: calls.append(1) or plain(*arguments))

    def attend(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return kernel.flash_attn_func(x, y, z, causal=True)

    leaves = [torch.randn(2, 9, heads, 16).requires_grad_() for heads in (4, 2, 2)]
    out = attend(*leaves)
    grads = torch.randn(3, *out.shape)
    expected = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads]
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = torch.autograd.grad(out, leaves, grads[0])
    assert all(map(torch.equal, in_autocast, expected[0]))
    assert all(map(torch.equal, batched, map(torch.stack, zip(*expected, strict=True))))
    for i, leaf in enumerate(leaves):
        others = [leaf if other is leaf else other.detach() for other in leaves]
        (gradient,) = torch.autograd.grad(attend(*others), leaf, grads[0])
        assert torch.equal(gradient, expected[0][i])
    with torch.inference_mode():
        assert torch.equal(attend(*leaves), out)
    assert len(calls) == 5
    # Casting, and rules for a batch, are an operator's.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*leaves), out)
    with torch.no_grad():
        assert torch.equal(torch.vmap(attend)(*(leaf[None] for leaf in leaves))[0], out)
    assert len(calls) == 5


def test_gradients_through_the_kernel_pass_gradcheck_with_those_of_the_log_sum_exp(submodule) -> None:
    forward = submodule("ops.attention.op").attention_forward
    q, k, v = (torch.randn(1, 5, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return forward(q, k, v, None, None, 5, 5, 0.3, -1, 0, 0.0)

    assert torch.autograd.gradcheck(attention, (q, k, v))
