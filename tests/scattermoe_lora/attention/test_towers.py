"""Registered attention in models for images and audio, with encoders, and where transformers has to run its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_models import (
    CONFIGS,
    FLASH,
    SLIDING,
    SMALL,
    assert_trains_as_eager,
    gemma4,
    labels_of,
    model,
    outputs,
    results,
    tokens,
)
from helpers import assert_close
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4VisionConfig,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
    masking_utils,
)
from transformers.models.gemma4.modeling_gemma4 import eager_attention_forward
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

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
    attention, log_lines, bidirectional: str | None
) -> None:
    m, inputs = multimodal(bidirectional), image_inputs()
    assert_trains_as_eager(
        m, **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 60, -100)
    )
    sliding = "attention of Gemma4TextAttention (sliding_attention), head_dim 16: "
    assert set(log_lines()) == {
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


def test_a_mask_of_spans_serves_queries_of_another_dtype(attention, submodule) -> None:
    """As where a model computes its norms in float32, and its embeddings, and with them the mask, are in bfloat16."""
    m = multimodal().model.language_model
    layer, spans = m.layers[0].self_attn, torch.tensor([[-1, 0, 0, -1]])
    causal = masking_utils.causal_mask_function
    function = masking_utils.or_masks(causal, masking_utils.blockwise_overlay(spans))
    mask = submodule("integration.attention.masks").mask(
        batch_size=1, q_length=4, kv_length=4, mask_function=function, config=m.config, dtype=torch.bfloat16
    )
    q, k = torch.randn(1, 4, 4, 16), torch.randn(1, 2, 4, 16)
    got, _ = AttentionInterface._global_mapping[FLASH](layer, q, k, k, mask, scaling=1.0)
    exact, _ = eager_attention_forward(layer, q, k, k, mask.float(), scaling=1.0)
    assert_close([got], [exact], 1e-5)


def test_text_alone_runs_in_the_kernel_in_a_model_for_images(attention, log_lines) -> None:
    m, ids = multimodal(), tokens(2, 13) % 50 + 1
    assert_trains_as_eager(m, input_ids=ids, labels=ids, mm_token_type_ids=torch.zeros_like(ids))
    assert all(line.endswith(": the kernel") for line in log_lines())


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


# Models of other shapes


@pytest.mark.parametrize("cache", [None, "static"])
def test_an_encoder_with_a_decoder_has_the_logits_and_tokens_of_eager(attention, cache: str | None) -> None:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    m = BartForConditionalGeneration._from_config(config, attn_implementation=FLASH).eval()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    # As many queries as keys, of which some are padding: that of the keys is not that of the queries.
    for length in (7, 9):
        got, exact = outputs(
            m, lambda n=length: m(**inputs, decoder_input_ids=ids[:, :n], use_cache=False).logits
        )
        assert_close([got], [exact], 1e-4)
    generate = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(*outputs(m, lambda: m.generate(**inputs, **generate)))


def test_a_vision_tower_that_packs_its_images_has_the_features_of_eager(attention, log_lines) -> None:
    config = Qwen2VLVisionConfig(
        depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2
    )
    tower = Qwen2VisionTransformerPretrainedModel._from_config(config, attn_implementation=FLASH).eval()
    pixels, grid = torch.rand(40, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4], [1, 6, 4]])
    got, exact = outputs(tower, lambda: tower(pixels, grid_thw=grid).last_hidden_state)
    assert_close([got], [exact], 1e-4)
    assert log_lines() == ["attention of VisionAttention, head_dim 16: the kernel"]
    # The second image is another one if it sees the first.
    alone = tower(pixels[16:], grid_thw=grid[1:]).last_hidden_state
    assert_close([got[16:]], [alone], 1e-4)


def test_attention_in_chunks_runs_in_transformers_under_a_name_without_flash(kernel, log_lines) -> None:
    # Under a name with "flash" in it, transformers refuses texts longer than a chunk.
    kernel.register_attention("scattermoe")
    config = Llama4TextConfig(**SMALL, num_local_experts=2, attention_chunk_size=4, intermediate_size_mlp=32)
    try:
        m = AutoModelForCausalLM.from_config(config, attn_implementation="scattermoe").eval()
        ids = tokens(2, 13)
        got, exact = outputs(m, lambda: m(ids, use_cache=False).logits, "scattermoe")
    finally:
        kernel.unregister_attention()
    assert_close([got], [exact], 1e-4)
    assert all("transformers' sdpa, because of " in line for line in log_lines())


def test_attention_weights_come_from_eager(attention, log_lines) -> None:
    m, ids = model(CONFIGS["llama"]()).eval(), tokens(2, 13)
    weights = []
    for implementation in (FLASH, "eager"):
        m.set_attn_implementation(implementation)
        weights.append(m(ids, output_attentions=True, use_cache=False).attentions)
    assert len(weights[0]) == 2
    assert_close(*weights, 1e-5)
    assert log_lines() == [
        "attention of LlamaAttention, head_dim 16: transformers' eager, because of output_attentions"
    ]


# What the kernel does not do


def test_dropout_runs_in_transformers_and_the_log_says_so(attention, log_lines) -> None:
    m, ids = model(gemma4(attention_dropout=0.5)).train(), tokens(2, 13)
    losses = []
    for implementation in (FLASH, "sdpa"):
        m.set_attn_implementation(implementation)
        torch.manual_seed(1)
        losses.append(m(input_ids=ids, labels=ids, use_cache=False).loss)
    torch.testing.assert_close(*losses)
    assert len(log_lines()) == 2
    assert all(line.endswith("transformers' sdpa, because of dropout 0.5") for line in log_lines())


def test_a_dense_mask_runs_in_transformers(attention, log_lines) -> None:
    m, ids = model(CONFIGS["llama"]()), tokens(2, 13)
    mask = (torch.rand(2, 1, 13, 13) < 0.5) | torch.eye(13, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for attention_mask in (mask, additive):
        got = results(m, FLASH, input_ids=ids, labels=ids, attention_mask=attention_mask)
        assert_close(got, results(m, "eager", input_ids=ids, labels=ids, attention_mask=additive), 1e-3)
    assert log_lines() == [
        "attention of LlamaAttention, head_dim 16: transformers' sdpa, because of a mask of its own"
    ]


@pytest.mark.parametrize(
    ("head_dim", "reason"),
    [(12, "head_dim, of which the kernel takes multiples of 8 from 16 to 512"), (520, "head_dim")],
)
def test_a_head_size_outside_the_kernels_runs_in_transformers(
    attention, log_lines, head_dim: int, reason: str
) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    m = model(MistralConfig(**{**SMALL, "head_dim": head_dim}, sliding_window=5))
    for attention_mask in (mask, torch.ones_like(mask)):
        assert_trains_as_eager(
            m, input_ids=ids, labels=labels_of(ids, attention_mask), attention_mask=attention_mask
        )
    (line,) = log_lines()
    assert f"transformers' sdpa, because of {reason}" in line


def test_sinks_run_in_the_kernel_under_a_name_that_transformers_leaves_alone(kernel, log_lines) -> None:
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
    assert all(line.endswith(": the kernel") for line in log_lines())


def test_continuous_batching_is_refused(attention) -> None:
    function = AttentionInterface._global_mapping[FLASH]
    q = torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        function(torch.nn.Module(), q, q, q, None, cache=object())
