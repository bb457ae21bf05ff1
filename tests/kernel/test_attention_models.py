"""Attention registered in transformers: real models of every kind, compared with eager mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    StaticCache,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FLASH = "scattermoe_flash"
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SLIDING = ["sliding_attention", "full_attention"]


def gemma4(layers: int = 2, **more: Any) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        **{**SMALL, "num_hidden_layers": layers},
        layer_types=SLIDING * (layers // 2),
        sliding_window=5,
        **{
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            **more,
        },
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma4 dense": lambda: gemma4(),
    "gemma4 head_dim 512": lambda: gemma4(global_head_dim=512),
    "gemma4 moe": lambda: gemma4(
        num_experts=4, top_k_experts=2, moe_intermediate_size=24, enable_moe_block=True
    ),
    "gemma4 shared KV": lambda: gemma4(layers=4, num_kv_shared_layers=2, use_double_wide_mlp=True),
    "gemma4 K=V": lambda: gemma4(attention_k_eq_v=True, num_global_key_value_heads=1),
    "gemma4 per-layer inputs": lambda: gemma4(hidden_size_per_layer_input=8),
    "gemma4 bidirectional": lambda: gemma4(use_bidirectional_attention="all"),
    "gemma2 softcap": lambda: Gemma2Config(**SMALL, sliding_window=5, attn_logit_softcapping=2.0),
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    # Its layers do not tell their attention of the window: only the mask does.
    "qwen2 moe": lambda: Qwen2MoeConfig(
        **SMALL,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=5),
}
SEVERAL = ["gemma4 shared KV", "gemma4 K=V", "qwen3"]


@pytest.fixture
def attention(kernel: ModuleType) -> Iterator[ModuleType]:
    """The kernel, its attention registered while the test runs."""
    kernel.register_attention()
    yield kernel
    kernel.unregister_attention()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, submodule: Callable[[str], ModuleType]) -> Callable[[], list[str]]:
    """``said()``: which attention ran where, by the lines of the log."""
    logger = submodule("integration.attention_paths").__name__
    caplog.set_level(logging.INFO, logger)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger]


def model(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=FLASH)
    # Weights as small as those of a new model leave attention all but uniform.
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return built


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(7))


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The tokens that follow a token: neither padding nor the first after it, which padding would have to predict."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ids.masked_fill((mask == 0) | (before == 0), -100)


def results(model: Any, implementation: str, **inputs: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_trains_as_eager(model: Any, implementation: str = FLASH, **inputs: Any) -> None:
    assert_close(results(model, implementation, **inputs), results(model, "eager", **inputs), 1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_loss_and_gradients_of_eager(attention, said, name: str) -> None:
    ids = tokens(2, 13)
    assert_trains_as_eager(model(CONFIGS[name]()), input_ids=ids, labels=ids)
    assert said()
    assert all(line.endswith(": the kernel") for line in said())


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", [*SEVERAL, "qwen2 moe", "gemma4 bidirectional"])
def test_a_padded_batch_has_the_loss_and_gradients_of_eager(attention, said, name: str, side: str) -> None:
    ids = tokens(3, 13)
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :4] = 0
    if side != "left":
        mask[1, 8:] = 0
    labels = labels_of(ids, mask)
    assert_trains_as_eager(model(CONFIGS[name]()), input_ids=ids, labels=labels, attention_mask=mask)
    assert all(line.endswith(": the kernel") for line in said())


def test_padding_between_tokens_counts_in_a_window(attention, said) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, 5:8] = 0
    labels = labels_of(ids, mask)
    assert_trains_as_eager(model(gemma4()), input_ids=ids, labels=labels, attention_mask=mask)
    assert [line for line in said() if "(sliding_attention)" in line] == [
        "attention of Gemma4TextAttention (sliding_attention), head_dim 16: transformers' sdpa, "
        "because of a window over keys with padding between them"
    ]


LENGTHS = (5, 1, 7)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["gemma4 dense", "gemma4 shared KV", "qwen3", "qwen2 moe"])
def test_packed_sequences_have_the_loss_and_gradients_of_unpacked(
    attention, said, name: str, rows: int
) -> None:
    m, ids = model(CONFIGS[name]()), tokens(rows, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    labels = ids.masked_fill(positions == 0, -100)
    packed = results(m, FLASH, input_ids=ids, labels=labels, position_ids=positions)
    assert all(line.endswith(": the kernel") for line in said())

    m.zero_grad()
    parts = [part for row in ids for part in row.split(LENGTHS) if len(part) > 1]
    losses = [
        m(input_ids=part[None], labels=part[None], use_cache=False).loss * (len(part) - 1) for part in parts
    ]
    loss = sum(losses) / sum(len(part) - 1 for part in parts)
    loss.backward()
    apart = [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]
    assert_close(packed, apart, 1e-3)
    assert_close(packed, results(m, "eager", input_ids=ids, labels=labels, position_ids=positions), 1e-3)


def test_lengths_handed_over_by_a_collator_are_taken(attention, said) -> None:
    m, ids = model(CONFIGS["llama"]()), tokens(1, sum(LENGTHS))
    boundaries = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    given = {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    eager = m(input_ids=ids, position_ids=positions, use_cache=False).logits
    # Without positions the mask knows of one sequence, and the layers of three.
    m.model.rotary_emb.forward = lambda x, position_ids, f=m.model.rotary_emb.forward: f(x, positions)
    assert_close([m(input_ids=ids, use_cache=False, **given).logits], [eager], 1e-4)
    m.train()
    for layer in m.model.layers:
        layer.self_attn.attention_dropout = 1e-9
    assert_close([m(input_ids=ids, use_cache=False, **given).logits], [eager], 1e-4)
    assert said()[-1].endswith("transformers' sdpa, because of dropout 1e-09")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [*SEVERAL, "gemma4 moe", "mistral"])
def test_generation_gives_the_tokens_of_eager(attention, name: str, cache: str | None, padded: bool) -> None:
    m, ids = model(CONFIGS[name]()).eval(), tokens(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    generated = []
    for implementation in (FLASH, "eager"):
        m.set_attn_implementation(implementation)
        generated.append(
            m.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                eos_token_id=None, cache_implementation=cache,
            )
        )  # fmt: skip
    assert generated[0].shape == (2, 17)
    assert torch.equal(*generated)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_prompt_in_pieces_has_the_logits_of_a_whole_one(attention, said, name: str, static: bool) -> None:
    """Pieces before, at and beyond the window of a sliding cache, without any mask."""
    m, ids = model(CONFIGS[name]()).eval(), tokens(2, 14)
    m.set_attn_implementation("eager")
    with torch.no_grad():
        whole = m(input_ids=ids, use_cache=False).logits
        m.set_attn_implementation(FLASH)
        cache = StaticCache(m.config, max_cache_len=20) if static else None
        pieces = []
        for piece in ids.split([3, 4, 6, 1], dim=1):
            out = m(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert_close([torch.cat(pieces, 1)], [whole], 1e-4)
    assert all(
        line.endswith(": the kernel") or "a step of decoding with a static cache" in line for line in said()
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(attention, reentrant: bool) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    m = model(gemma4(layers=4)).train()
    inputs = {"input_ids": ids, "labels": labels_of(ids, mask), "attention_mask": mask}
    plain = results(m, FLASH, **inputs)
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    m.enable_input_require_grads()
    for a, b in zip(plain, results(m, FLASH, **inputs), strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype(attention, said) -> None:
    m, ids = model(gemma4()), tokens(2, 13)
    losses = []
    for implementation in (FLASH, "sdpa"):
        m.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(m(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(*losses, rtol=3e-2, atol=0)
    assert all(line.endswith(": the kernel") for line in said())


@pytest.mark.parametrize(
    ("name", "inputs"), [("gemma4 dense", "packed"), ("mistral", "padded"), ("mistral", "plain")]
)
def test_a_compiled_model_has_the_loss_and_gradients_of_eager(
    attention, submodule, monkeypatch, name: str, inputs: str
) -> None:
    """In one graph for every length, and in the kernel."""
    runs = []
    traced = submodule("integration.attention_traced")
    forward = traced.attention_forward
    monkeypatch.setattr(traced, "attention_forward", lambda *given: runs.append(given) or forward(*given))
    m = model(CONFIGS[name]())
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (13, 16):
        ids = tokens(2, length)
        mask = torch.ones_like(ids)
        given: dict[str, Any] = {"labels": ids}
        if inputs == "padded":
            mask[0, :4], mask[1, 9:] = 0, 0
            given = {"labels": labels_of(ids, mask), "attention_mask": mask}
        if inputs == "packed":
            first = torch.cat([torch.arange(n) for n in (*LENGTHS[:2], length - sum(LENGTHS[:2]))])
            given["position_ids"] = torch.stack([first, torch.arange(length)])
        m.set_attn_implementation(FLASH)
        m.zero_grad()
        loss = compiled(input_ids=ids, use_cache=False, **given).loss
        loss.backward()
        got = [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]
        assert_close(got, results(m, "eager", input_ids=ids, **given), 1e-3)
    assert len(runs) == 2 * len(m.model.layers)
    assert all((run[3] is None) == (inputs == "plain") for run in runs)


def test_a_traced_graph_leaves_to_transformers_what_it_cannot_look_into(attention, submodule) -> None:
    masks = submodule("integration.attention_masks")
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
    traced = submodule("integration.attention_traced")
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
    traced = submodule("integration.attention_traced")
    q, numbers = torch.randn(1, 4, 2, 16), torch.tensor([[1, 0, 1, 1]], dtype=torch.int32)
    traced.segments_forward(q, q, q, numbers, True, False, 1.0, -1, -1, 0.0)
    with pytest.raises(ValueError, match="pad to the left or right"):
        traced.segments_forward(q, q, q, numbers, True, False, 1.0, 1, -1, 0.0)


# Images and audio


def multimodal(bidirectional: str | None = "vision") -> Any:
    torch.manual_seed(0)
    config = Gemma4Config(
        text_config=gemma4(use_bidirectional_attention=bidirectional),
        vision_config=Gemma4VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
            num_key_value_heads=2, patch_size=4, position_embedding_size=16, pooling_kernel_size=2,
        ),
        audio_config=Gemma4AudioConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=(8, 4),
            output_proj_dims=32, attention_chunk_size=4, attention_context_left=5,
        ),
        image_token_id=60, audio_token_id=61, video_token_id=59, boi_token_id=58, eoi_token_id=57,
        boa_token_id=56, eoa_token_index=55,
    )  # fmt: skip
    return Gemma4ForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation=FLASH)


def image_inputs() -> dict[str, Any]:
    """Two rows with an image of 4 soft tokens each, the second of them half padding."""
    ids = tokens(2, 14) % 50 + 1
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    positions = grid.repeat(2, 1, 1)
    positions[1, 8:] = -1
    ids[0, 3:7] = 60
    ids[1, 5:7] = 60
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(2, 16, 3 * 16, generator=torch.Generator().manual_seed(3)),
        "image_position_ids": positions,
        "mm_token_type_ids": (ids == 60).long(),
    }


@pytest.mark.parametrize("bidirectional", ["vision", None])
def test_a_model_with_images_has_the_loss_and_gradients_of_eager(
    attention, said, bidirectional: str | None
) -> None:
    m, inputs = multimodal(bidirectional), image_inputs()
    assert_trains_as_eager(
        m, **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 60, -100)
    )
    sliding = "attention of Gemma4TextAttention (sliding_attention), head_dim 16: "
    assert set(said()) == {
        "attention of Gemma4VisionAttention, head_dim 16: the kernel",
        "attention of Gemma4TextAttention (full_attention), head_dim 32: the kernel",
        sliding + "transformers' sdpa, because of spans that see themselves whole"
        if bidirectional
        else sliding + "the kernel",
    }


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_model_with_images_generates_the_tokens_of_eager(attention, cache: str | None) -> None:
    m, inputs = multimodal().eval(), image_inputs()
    generated = []
    for implementation in (FLASH, "eager"):
        m.set_attn_implementation(implementation)
        generated.append(
            m.generate(
                **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                cache_implementation=cache,
            )
        )  # fmt: skip
    assert torch.equal(*generated)


def test_text_alone_runs_in_the_kernel_in_a_model_for_images(attention, said) -> None:
    m, ids = multimodal(), tokens(2, 13) % 50 + 1
    assert_trains_as_eager(m, input_ids=ids, labels=ids, mm_token_type_ids=torch.zeros_like(ids))
    assert all(line.endswith(": the kernel") for line in said())


def test_a_tower_with_an_attention_of_its_own_has_the_mask_of_eager(attention) -> None:
    tower = multimodal().model.audio_tower.eval()
    features, mask = torch.rand(2, 24, 8), torch.ones(2, 24, dtype=torch.bool)
    mask[1, 13:] = False
    outputs = []
    for implementation in (FLASH, "eager"):
        tower.config._attn_implementation = implementation
        out = tower(features, attention_mask=mask)
        outputs.append(out.last_hidden_state[out.attention_mask])
    assert outputs[0].numel() > 0
    assert torch.equal(*outputs)


# What the kernel does not do


def test_dropout_runs_in_transformers_and_the_log_says_so(attention, said) -> None:
    m, ids = model(gemma4(attention_dropout=0.5)).train(), tokens(2, 13)
    losses = []
    for implementation in (FLASH, "sdpa"):
        m.set_attn_implementation(implementation)
        torch.manual_seed(1)
        losses.append(m(input_ids=ids, labels=ids, use_cache=False).loss)
    torch.testing.assert_close(*losses)
    assert len(said()) == 2
    assert all(line.endswith("transformers' sdpa, because of dropout 0.5") for line in said())


def test_a_dense_mask_runs_in_transformers(attention, said) -> None:
    m, ids = model(CONFIGS["llama"]()), tokens(2, 13)
    mask = (torch.rand(2, 1, 13, 13) < 0.5) | torch.eye(13, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for each in (mask, additive):
        got = results(m, FLASH, input_ids=ids, labels=ids, attention_mask=each)
        assert_close(got, results(m, "eager", input_ids=ids, labels=ids, attention_mask=additive), 1e-3)
    assert said() == [
        "attention of LlamaAttention, head_dim 16: transformers' sdpa, because of a mask of its own"
    ]


@pytest.mark.parametrize(
    ("head_dim", "reason"),
    [(12, "head_dim, of which the kernel takes multiples of 8 from 16 to 512"), (520, "head_dim")],
)
def test_a_head_size_outside_the_kernels_runs_in_transformers(
    attention, said, head_dim: int, reason: str
) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    m = model(MistralConfig(**{**SMALL, "head_dim": head_dim}, sliding_window=5))
    for each in (mask, torch.ones_like(mask)):
        assert_trains_as_eager(m, input_ids=ids, labels=labels_of(ids, each), attention_mask=each)
    (line,) = said()
    assert f"transformers' sdpa, because of {reason}" in line


def test_sinks_run_in_the_kernel_under_a_name_that_transformers_leaves_alone(kernel, said) -> None:
    # Under a name with "flash" in it, transformers would take one of the packages that gpt-oss names.
    kernel.register_attention("scattermoe")
    config = GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=5, layer_types=SLIDING
    )
    try:
        torch.manual_seed(0)
        m = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="scattermoe")
        for layer in m.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
        ids = tokens(2, 13)
        assert_trains_as_eager(m, "scattermoe", input_ids=ids, labels=ids)
    finally:
        kernel.unregister_attention()
    assert all(line.endswith(": the kernel") for line in said())


def test_continuous_batching_is_refused(attention) -> None:
    function = AttentionInterface._global_mapping[FLASH]
    q = torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        function(torch.nn.Module(), q, q, q, None, cache=object())


# Registration


def test_the_log_says_each_thing_once(attention, said) -> None:
    m, ids = model(gemma4(layers=4)), tokens(2, 13)
    for _ in range(3):
        m(input_ids=ids)
    assert said() == [
        "attention of Gemma4TextAttention (sliding_attention), head_dim 16: the kernel",
        "attention of Gemma4TextAttention (full_attention), head_dim 32: the kernel",
    ]


def test_registering_twice_is_registering_once_and_unregistering_undoes_it(kernel) -> None:
    from transformers import modeling_flash_attention_utils as flash_utils

    def state() -> tuple[Any, ...]:
        return (
            dict(AttentionInterface._global_mapping),
            dict(AttentionMaskInterface._global_mapping),
            flash_utils._lazy_imports,
        )

    before = state()
    kernel.register_attention()
    once = state()
    kernel.register_attention()
    assert state() == once
    kernel.register_attention("another")
    model(CONFIGS["llama"]())
    kernel.unregister_attention()
    assert state() == before
    assert flash_utils._loaded_implementation != FLASH
    kernel.unregister_attention()
    assert state() == before


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_a_name_that_is_taken_is_refused(kernel, name: str) -> None:
    with pytest.raises(ValueError, match=f"already has an attention implementation '{name}'"):
        kernel.register_attention(name)


@pytest.mark.parametrize("hybrid", ["eager", "no_such", FLASH])
def test_a_hybrid_with_nothing_is_refused(kernel, hybrid: str) -> None:
    with pytest.raises(ValueError, match=f"hybrid: .*'{hybrid}'"):
        kernel.register_attention(hybrid=hybrid)
    assert FLASH not in AttentionInterface._global_mapping


def test_a_hybrid_with_a_package_that_is_not_installed_is_refused(kernel) -> None:
    with pytest.raises(ImportError):
        kernel.register_attention(hybrid="flash_attention_3")
    assert FLASH not in AttentionInterface._global_mapping


# Hybrid


class StandIn:
    """A flash attention for head_dim <= 256 that keeps a record: what it is given, computed by sdpa."""

    def __init__(self) -> None:
        self.head_dims: list[int] = []

    def __call__(
        self, module, query, key, value, attention_mask, sliding_window=None, is_causal=None, **kwargs
    ):
        assert module.config._attn_implementation == "stand_in"
        assert attention_mask is None or attention_mask.shape == (query.shape[0], key.shape[2])
        self.head_dims.append(query.shape[-1])
        queries, keys = query.shape[2], key.shape[2]
        q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
        if is_causal:
            seen = seen & (k <= q)
        if sliding_window is not None:
            seen = seen & (k > q - sliding_window)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :]
        if kwargs.get("cu_seq_lens_q") is not None:
            ids = torch.bucketize(
                torch.arange(query.shape[0] * queries, dtype=torch.int32),
                kwargs["cu_seq_lens_q"][1:],
                right=True,
            )
            ids = ids.view(query.shape[0], 1, queries)
            seen = seen & (ids[..., :, None] == ids[..., None, :])
        # A row of padding that sees nothing is left at zero, as flash attention leaves it.
        rows = seen.any(-1, keepdim=True)
        out, _ = sdpa_attention_forward(module, query, key, value, seen | ~rows, scaling=kwargs["scaling"])
        return out * rows.transpose(1, 2), None


@pytest.fixture
def stand_in(kernel) -> Iterator[StandIn]:
    function = StandIn()
    AttentionInterface.register("stand_in", function)
    kernel.register_attention(hybrid="stand_in")
    yield function
    kernel.unregister_attention()
    del AttentionInterface._global_mapping["stand_in"]


@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
def test_hybrid_takes_the_other_attention_up_to_256(stand_in: StandIn, said, inputs: str) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    given = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}[inputs]
    labels = labels_of(ids, mask) if inputs == "padded" else ids
    m = model(gemma4(layers=4, global_head_dim=512))
    assert_trains_as_eager(m, input_ids=ids, labels=labels, **given)
    assert stand_in.head_dims == [16, 16]
    assert said() == [
        "attention of Gemma4TextAttention (sliding_attention), head_dim 16: stand_in",
        "attention of Gemma4TextAttention (full_attention), head_dim 512: the kernel",
    ]


def test_registering_with_another_hybrid_replaces_the_first(kernel, stand_in: StandIn) -> None:
    kernel.register_attention()
    ids = tokens(2, 13)
    model(gemma4())(input_ids=ids)
    assert stand_in.head_dims == []


# Masks


@given(data=st.data())
def test_a_mask_says_what_transformers_own_says(kernel, submodule, data: st.DataObject) -> None:
    plans, masks = submodule("integration.attention_plans"), submodule("integration.attention_masks")
    draw = data.draw
    batch, queries, earlier = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 6))
    dropped, spare = draw(st.integers(0, earlier)), draw(st.integers(0, 4))
    kv_length = earlier - dropped + queries
    window = draw(st.none() | st.integers(1, 8))
    causal = draw(st.booleans())
    if causal:
        kv_length += spare
        parts = [masking_utils.causal_mask_function]
        parts += [masking_utils.sliding_window_overlay(window)] if window else []
    else:
        parts = [masking_utils.bidirectional_mask_function]
        parts += [masking_utils.sliding_window_bidirectional_overlay(window)] if window else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    padding = None
    if draw(st.booleans()):
        padding = torch.rand(batch, earlier + queries, generator=generator) < draw(
            st.sampled_from([0.5, 0.9, 1.0])
        )
    elif earlier == 0 and spare == 0 and draw(st.booleans()):
        ids = (torch.rand(batch, queries, generator=generator) < 0.3).cumsum(1)
        parts.append(masking_utils.packed_sequence_mask_function(ids))
    arguments = {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": kv_length,
        "q_offset": earlier,
        "kv_offset": dropped,
        "mask_function": masking_utils.and_masks(*parts),
        "attention_mask": padding,
        "config": LlamaConfig(),
    }
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    got = masks.mask(**arguments)
    if got.dim() == 4:
        assert torch.equal(got == 0, expected)
        holes = padding is not None and window is not None
        assert holes or queries > kv_length, masks.reason_of(got)
        return
    keys = got.shape[1]
    plan = plans.plan_of(got, queries, causal=not causal, window=(0, 0))
    dense = plans.dense(plan, got, queries)
    assert torch.equal(dense, expected[..., :keys])
    assert not expected[..., keys:].any()
    # A copy has lost the plan; what the layer says of causality and the window then counts.
    again = plans.plan_of(got.clone(), queries, plan.causal, plan.window)
    assert torch.equal(plans.dense(again, got, queries), dense)
    # What the kernel makes of the plan, for the queries that take part.
    seen, rows = seen_by_the_kernel(plan, batch, queries, keys)
    assert torch.equal(seen[rows], expected[:, 0, :, :keys][rows])
    assert padding is not None or rows.all()


def seen_by_the_kernel(plan: Any, batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys each query sees, ``[B, Q, K]``, and which queries take part, ``[B, Q]``."""
    if plan.sequences is None:
        q_index, k_index = torch.arange(batch * queries), torch.arange(batch * keys)
        cu_q, cu_k = torch.arange(batch + 1) * queries, torch.arange(batch + 1) * keys
    else:
        q_index, k_index, cu_q, cu_k, longest_q, longest_k = plan.sequences
        assert (longest_q, longest_k) == (cu_q.diff().max(), cu_k.diff().max())
        q_index = torch.arange(batch * queries) if q_index is None else q_index
        k_index = torch.arange(batch * keys) if k_index is None else k_index
    rows = torch.zeros(batch * queries, dtype=torch.bool)
    seen = torch.zeros(batch * queries, batch * keys, dtype=torch.bool)
    rows[q_index] = True
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        q, k = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)
        left, right = plan.window
        part = torch.ones(len(q), len(k), dtype=torch.bool)
        part = part & (k <= q) if plan.causal else part
        part = part & (k >= q - left) if left >= 0 else part
        part = part & (k <= q + right) if right >= 0 else part
        seen[q_index[a:b, None], k_index[c:d]] = part
    seen = seen.view(batch, queries, batch, keys)
    assert seen.any((1, 3)).logical_and(~torch.eye(batch, dtype=torch.bool)).sum() == 0
    return seen[torch.arange(batch), :, torch.arange(batch)], rows.view(batch, queries)


def test_a_model_that_takes_no_flash_attention_has_the_mask_of_eager(kernel, submodule) -> None:
    class Config(LlamaConfig):
        pass

    class Model(LlamaForCausalLM):
        config_class = Config
        _supports_flash_attn = False

    masks = submodule("integration.attention_masks")
    got = masks.mask(batch_size=1, q_length=4, kv_length=4, config=Config())
    assert got.shape == (1, 1, 4, 4)
    assert masks.reason_of(got) == "transformers gives this model no flash attention"
