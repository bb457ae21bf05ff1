"""Registered attention in compiled models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_models import CONFIGS, FLASH, LENGTHS, labels_of, model, results, tokens
from helpers import assert_close
from transformers import (
    LlamaConfig,
    masking_utils,
)


@pytest.mark.parametrize(("name", "inputs"), [("gemma4 dense", "packed"), ("mistral", "padded")])
def test_a_compiled_model_has_the_loss_and_gradients_of_eager(
    attention, submodule, monkeypatch, name: str, inputs: str
) -> None:
    """In one graph for every length, and in the kernel."""
    runs = []
    traced = submodule("ops.attention.segments")
    forward = traced.attention_forward
    monkeypatch.setattr(traced, "attention_forward", lambda *given: runs.append(given) or forward(*given))
    m = model(CONFIGS[name]())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=True)
    # The second batch is neither packed nor padded, which the graph cannot know.
    for length, plain in ((sum(LENGTHS), False), (16, True)):
        ids = tokens(2, length)
        mask = torch.ones_like(ids)
        if inputs == "padded":
            if not plain:
                mask[0, :4], mask[1, 9:] = 0, 0
            arguments = {"labels": labels_of(ids, mask), "attention_mask": mask}
        else:
            several = torch.cat([torch.arange(n) for n in LENGTHS])
            one = torch.arange(length)
            arguments = {"labels": ids, "position_ids": torch.stack([one if plain else several, one])}
        m.set_attn_implementation(FLASH)
        m.zero_grad()
        loss = compiled(input_ids=ids, use_cache=False, **arguments).loss
        loss.backward()
        got = [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]
        assert_close(got, results(m, "eager", input_ids=ids, **arguments), 1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Boundaries of sequences for the first alone.
    assert [run[3] is None for run in runs] == [False] * len(m.model.layers) + [True] * len(m.model.layers)


def test_a_compiled_model_reads_positions_where_an_empty_cache_is_filled(attention) -> None:
    m = model(CONFIGS["gemma4 dense"]())
    torch._dynamo.reset()
    m.set_attn_implementation(FLASH)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    ids = tokens(2, sum(LENGTHS))
    one = torch.arange(sum(LENGTHS))
    for row in (torch.cat([torch.arange(n) for n in LENGTHS]), one):
        positions = torch.stack([row, one])
        got = compiled(input_ids=ids, position_ids=positions).logits
        m.set_attn_implementation("eager")
        expected = m(input_ids=ids, position_ids=positions, use_cache=False).logits
        m.set_attn_implementation(FLASH)
        assert_close([got], [expected], 1e-4)


def test_a_compiled_model_takes_the_lengths_that_it_is_given(attention) -> None:
    """As DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives them."""
    m = model(CONFIGS["gemma4 dense"]())
    torch._dynamo.reset()
    m.set_attn_implementation(FLASH)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, (9, 3)):
        ids = tokens(1, sum(lengths))
        arguments = {"labels": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        m.set_attn_implementation(FLASH)
        m.zero_grad()
        handed_over = {
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu),
            **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
        }
        loss = compiled(input_ids=ids, use_cache=False, **arguments, **handed_over).loss
        loss.backward()
        got = [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]
        assert_close(got, results(m, "eager", input_ids=ids, **arguments), 1e-3)


def test_a_traced_graph_leaves_to_transformers_what_it_cannot_look_into(attention, submodule) -> None:
    masks = submodule("integration.attention.masks")
    spans = torch.tensor([[-1, 0, 0, -1]])
    causal = masking_utils.causal_mask_function
    unions = {
        "spans": masking_utils.or_masks(causal, masking_utils.blockwise_overlay(spans)),
        "a function of one's own": lambda b, h, q, k: (k <= q) & (k != 1),
    }
    config = LlamaConfig()
    for function in unions.values():
        arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": function}

        def made(arguments: dict[str, Any] = arguments) -> torch.Tensor:
            return masks.mask(**arguments, config=config)

        torch._dynamo.reset()
        got = torch.compile(made, backend="eager", fullgraph=True)()
        assert torch.equal(got == 0, masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_operators_of_a_traced_graph_pass_opcheck(submodule, packed: bool, shared: bool) -> None:
    traced = submodule("ops.attention.segments")
    q = torch.randn(2, 5, 4, 16, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 16, requires_grad=True) for _ in "kv")
    v = None if shared else v
    rows = [[1, 1, 2, 2, 2], [1] * 5] if packed else [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    numbers = torch.tensor(rows, dtype=torch.int32)
    options = (True, packed, 0.3, 2, -1, 0.0)
    torch.library.opcheck(traced.segments_forward, (q, k, v, numbers, *options))
    out, lse = traced.segments_forward(q, k, v, numbers, *options)
    saved = (torch.randn_like(out), q, k, v, numbers, out, lse)
    saved = tuple(x if x is None else x.detach() for x in saved)
    torch.library.opcheck(traced.segments_backward, (*saved, *options))


def test_a_traced_graph_refuses_padding_between_tokens_under_a_window(submodule) -> None:
    traced = submodule("ops.attention.segments")
    q, numbers = torch.randn(1, 4, 2, 16), torch.tensor([[1, 0, 1, 1]], dtype=torch.int32)
    traced.segments_forward(q, q, q, numbers, True, False, 1.0, -1, -1, 0.0)
    with pytest.raises(ValueError, match="pad to the left or right"):
        traced.segments_forward(q, q, q, numbers, True, False, 1.0, 1, -1, 0.0)
