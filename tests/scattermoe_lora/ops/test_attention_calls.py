"""Attention as it is called: bad input, operators, torch.compile, memory, and transformers with no code of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Q, K = (2, 6, 4, 16), (2, 9, 2, 16)


def dense(**changes: Any) -> dict[str, Any]:
    return {"q": torch.randn(Q), "k": torch.randn(K), "v": torch.randn(K), **changes}


def packed(**changes: Any) -> dict[str, Any]:
    boundaries = torch.tensor([0, 4, 12], dtype=torch.int32)
    rows = {name: torch.randn(12, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    lengths = {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries, "max_seqlen_q": 8, "max_seqlen_k": 8}
    return {**rows, **lengths, **changes}


def starts(*values: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 6, 64)}, r"q: expected \[B, S, H, D\], got \[2, 6, 64\]"),
        ({"q": torch.randn(2, 6, 4, 16).half()}, r"k: expected dtype of q, torch.float16, got torch.float32"),
        ({"v": torch.randn(K).double()}, r"v: expected dtype of q, torch.float32, got torch.float64"),
        ({"k": torch.randn(K, device="meta")}, r"k: expected device of q, cpu, got meta"),
        (
            {name: torch.ones(Q, dtype=torch.int32) for name in "qkv"},
            r"q: expected float64.* got torch.int32",
        ),
        ({"q": torch.randn(2, 6, 4, 520)}, r"q: expected a head size from 1 to 512, got 520"),
        ({"q": torch.randn(2, 6, 4, 0)}, r"q: expected a head size from 1 to 512, got 0"),
        ({"k": torch.randn(2, 9, 2, 24)}, r"k: expected head size of q, 16, got 24"),
        ({"v": torch.randn(2, 8, 2, 16)}, r"v: expected shape of k, \[2, 9, 2, 16\], got \[2, 8, 2, 16\]"),
        ({"q": torch.randn(2, 6, 3, 16)}, r"q: expected a multiple of 2 heads .* got 3"),
        ({"q": torch.randn(1, 6, 4, 16)}, r"k: expected 1 sequences .* got 2"),
        ({"softcap": -1.0}, r"softcap: expected 0 .* got -1.0"),
        ({"softcap": float("nan")}, r"softcap: expected 0 .* got nan"),
        ({"softcap": None}, r"softcap: expected 0 .* got None"),
        ({"window_size": None}, r"window_size: expected \(left, right\).* got None"),
        ({"window_size": (1,)}, r"window_size: expected \(left, right\).* got \(1,\)"),
        ({"window_size": (1.5, 0)}, r"window_size: expected \(left, right\).* got \(1.5, 0\)"),
        ({"window_size": torch.tensor([3])}, r"window_size: expected \(left, right\).* got tensor\(\[3\]\)"),
        ({"s_aux": torch.randn(2)}, r"s_aux: expected \[4\] .* got \[2\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(kernel, changes, message) -> None:
    with pytest.raises(ValueError, match="^flash_attn_func: .*" + message):
        kernel.flash_attn_func(**dense(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": starts(1, 4, 12)}, r"cu_seqlens_q: expected to start at 0, got 1"),
        ({"cu_seqlens_k": starts(0, 13, 12)}, r"cu_seqlens_k: expected not to decrease, got 13, 12 at 1"),
        (
            {"cu_seqlens_k": starts(0, 4, 13)},
            r"cu_seqlens_k: expected to end at 12 \(the rows of k\), got 13",
        ),
        ({"cu_seqlens_q": starts(0, 4, 11)}, r"cu_seqlens_q: expected to end at 12"),
        (
            {"cu_seqlens_q": starts(0, 4, 12, dtype=torch.float32)},
            r"cu_seqlens_q: expected \[B \+ 1\] of int32 or",
        ),
        ({"cu_seqlens_q": starts(0, 4, 12)[None]}, r"cu_seqlens_q: expected \[B \+ 1\] .* got \[1, 3\]"),
        ({"cu_seqlens_q": starts(0, 12)}, r"expected one shape \[B \+ 1\].* got \[2\] and \[3\]"),
        ({"cu_seqlens_q": starts(0, 4, 12).to("meta")}, r"cu_seqlens_q: expected device of q, cpu, got meta"),
        ({"max_seqlen_k": 7}, r"max_seqlen_k: expected at least 8 .* got 7"),
        ({"q": torch.randn(2, 6, 4, 16)}, r"q: expected \[T, H, D\]"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused_by_name(kernel, changes, message) -> None:
    with pytest.raises(ValueError, match="^flash_attn_varlen_func: .*" + message):
        kernel.flash_attn_varlen_func(**packed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p: attention dropout is not supported; pass 0.0, got 0.1"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes: ALiBi is not supported"),
        ({"return_attn_probs": True}, "return_attn_probs: the probabilities are never in memory"),
        (
            {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
            "block_table: paged caches are not supported",
        ),
    ],
)
def test_what_is_not_there_says_so(kernel, changes, message) -> None:
    with pytest.raises(NotImplementedError, match=message):
        kernel.flash_attn_varlen_func(**packed(**changes))
    if "block_table" not in changes:
        with pytest.raises(NotImplementedError, match=message):
            kernel.flash_attn_func(**dense(**changes))


def test_boundaries_of_int64_and_lengths_in_tensors_are_taken(kernel) -> None:
    arguments = packed()
    expected = kernel.flash_attn_varlen_func(**arguments)
    boundaries = arguments["cu_seqlens_q"].long()
    again = {**arguments, "cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries}
    again |= {"max_seqlen_q": boundaries.diff().max(), "max_seqlen_k": boundaries.diff().max()}
    assert torch.equal(kernel.flash_attn_varlen_func(**again), expected)


@pytest.mark.parametrize(
    "window",
    [
        torch.tensor([3, 1]),
        torch.tensor([3, 1], dtype=torch.int32),
        (torch.tensor(3), torch.tensor(1)),
        [3, 1],
    ],
    ids=["int64", "int32", "two tensors", "list"],
)
def test_a_window_may_be_a_tensor(kernel, window) -> None:
    for function, arguments in ((kernel.flash_attn_func, dense()), (kernel.flash_attn_varlen_func, packed())):
        expected = function(**arguments, window_size=(3, 1))
        assert torch.equal(function(**arguments, window_size=window), expected)
        assert not torch.equal(function(**arguments), expected)


def test_a_scale_of_any_kind_is_a_float_to_the_kernels(kernel, submodule, monkeypatch) -> None:
    eager, scales = submodule("ops.attention.eager"), []
    monkeypatch.setattr(eager, "serves", lambda _, settings: scales.append(settings.scale))
    for scale in (2, torch.tensor(2.0)):
        # Triton would compile anew for an integer, and cannot for a tensor.
        kernel.flash_attn_func(**dense(), softmax_scale=scale)
    assert scales == [2.0, 2.0]
    assert {type(scale) for scale in scales} == {float}


def test_empty_batches_and_sequences_give_empty_or_zero_results(kernel) -> None:
    assert kernel.flash_attn_func(torch.randn(0, 6, 4, 16), *torch.randn(2, 0, 9, 2, 16)).shape == (
        0,
        6,
        4,
        16,
    )
    assert kernel.flash_attn_func(torch.randn(2, 0, 4, 16), *torch.randn(2, 2, 9, 2, 16)).shape == (
        2,
        0,
        4,
        16,
    )
    assert not kernel.flash_attn_func(torch.randn(Q), *torch.randn(2, 2, 0, 2, 16)).any()


@pytest.mark.parametrize("form", ["dense", "packed", "keys are values"])
def test_operators_pass_opcheck(submodule, form) -> None:
    op = submodule("ops.attention.op")
    if form == "packed":
        inputs = packed()
        lengths = (inputs["cu_seqlens_q"], inputs["cu_seqlens_k"], 8, 8)
    else:
        inputs, lengths = dense(), (None, None, 6, 9)
    tensors = [inputs[name].requires_grad_() for name in "qkv"]
    if form == "keys are values":
        tensors[2] = None
    numbers = (0.3, 5, 0, 2.0)
    torch.library.opcheck(op.attention_forward, (*tensors, *lengths, *numbers))
    out, lse = op.attention_forward(*tensors, *lengths, *numbers)
    plain = [
        None if x is None else x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), *tensors)
    ]
    saved = (*plain, *lengths[:2], out.detach(), lse.detach())
    torch.library.opcheck(op.attention_backward, (*saved, *lengths[2:], *numbers))


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_pass_gradcheck(kernel, shared) -> None:
    q, k, v = (
        torch.randn(1, n, h, 16, dtype=torch.float64, requires_grad=True) for n, h in ((4, 2), (5, 1), (5, 1))
    )
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attention(q, k, sink, v):
        return kernel.flash_attn_func(
            q, k, k if shared else v, causal=True, window_size=(2, 0), softcap=1.5, s_aux=sink
        )

    assert torch.autograd.gradcheck(attention, (q, k, sink, v))


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_compiles_to_one_graph_with_its_backward(kernel, form) -> None:
    function = kernel.flash_attn_func if form == "dense" else kernel.flash_attn_varlen_func
    arguments = dense() if form == "dense" else packed()
    tensors = [arguments[name].requires_grad_() for name in "qkv"]

    def loss() -> torch.Tensor:
        return function(**arguments, causal=True, window_size=(4, 4)).square().sum()

    expected = torch.autograd.grad(loss(), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), tensors)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator makes, those inside of ours included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("window", [-1, 100])
def test_nothing_grows_with_the_square_of_the_length(submodule, window) -> None:
    cpu, arguments = submodule("ops.attention.cpu"), submodule("ops.attention.arguments")
    most = []
    for length in (2048, 4096):
        q, k, v = (torch.randn(1, length, heads, 16) for heads in (2, 1, 1))
        operands = arguments.Operands(q, k, v, None, None)
        settings = arguments.Settings(length, length, 0.25, window, 0, 0.0)
        with Largest() as largest:
            out, lse = cpu.forward(operands, settings)
            cpu.backward(out, None, operands, out, lse, settings)
        most.append(largest.elements)
        assert largest.elements < length**2 / 3
    assert most[1] <= 2 * most[0]


@pytest.mark.parametrize("window", [0, 3, 64])
def test_keys_outside_of_the_window_are_never_read(kernel, window) -> None:
    q, k, v = (torch.randn(1, 600, heads, 16) for heads in (2, 1, 1))
    k[:, :256], v[:, :256] = torch.nan, torch.nan
    out = kernel.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    # A block of queries reads what its first one sees.
    assert not out[:, 512:].isnan().any()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def gemma4() -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
    )
    return Gemma4ForCausalLM(config)


@pytest.mark.parametrize("make", [llama, gemma4])
def test_transformers_takes_the_functions_as_its_attention(kernel, make) -> None:
    model = make()
    ids = torch.randint(0, 97, (2, 33))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    # What follows the padding is predicted from it, by whatever an implementation puts there.
    labels = ids.masked_fill(padding == 0, -100)
    labels[0, 5] = -100
    positions = torch.cat([torch.arange(20), torch.arange(13)])[None]
    results = []
    for implementation in ("eager", "org/scattermoe-lora"):
        model.set_attn_implementation(implementation, allow_all_kernels=True)
        model.zero_grad()
        whole, padded = model(ids, labels=ids).loss, model(ids, attention_mask=padding, labels=labels).loss
        two = model(ids[:1], position_ids=positions, use_cache=False).logits
        (whole + padded + two.square().mean()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        generated = model.generate(
            ids[:, :9], attention_mask=padding[:, :9], max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        results.append((whole, padded, two, generated, gradients))
    (*eager, tokens, gradients), (*ours, our_tokens, our_gradients) = results
    for got, expected in zip((*ours, *our_gradients), (*eager, *gradients), strict=True):
        assert (got - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)
    assert torch.equal(our_tokens, tokens)


def test_a_query_of_one_key_gets_no_gradient_in_bfloat16_either(kernel) -> None:
    # Its score's gradient is the difference of two equal numbers, which no rounding may come between.
    q, k, v = (torch.randn(1, 1, heads, 512).bfloat16().requires_grad_() for heads in (4, 2, 2))
    out = kernel.flash_attn_func(q, k, v)
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert dq.abs().max() < 1e-4
