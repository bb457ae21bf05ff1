"""The tests that the Triton kernels have to pass on a GPU, with every tensor made there."""

from __future__ import annotations

# Operators against their references, by module: what ran on a GPU the least often first. A test compiles some ten
# kernels and there are minutes, so that of the parameters of a test those stand here that compile something else.
BY_MODULE = {
    "ops/quantization/test_decode.py": "bits",
    "ops/quantization/test_operators.py": "reference",
    "ops/quantization/test_matrices.py": "those_of_the_decoded_matrices",
    "ops/linear_cross_entropy/test_linear_cross_entropy.py": (
        "gradients_match_the_reference and (300 or 37 and (bias or -lora)) or error_of_bfloat16 "
        "or decoded_by_rows or loss_alone or no_tokens and mean or autocast_reads"
    ),
    "ops/gated_activation/test_gated_activation.py": "reference or half_precision or read_in_place or chunks_meet",
    "ops/rms_norm/test_rms_norm.py": (
        "reference or half_precision or other_strides or bits and not compiled"
    ),
    "ops/test_norm_rotary.py": (
        "gradients_match_the_reference and bfloat16 or without_rotation and 512 or every_launch or half_precision "
        "or bits"
    ),
    "ops/test_grouped_linear.py": "reference",
    "ops/test_options.py": (
        "layer_matches_the_reference and 33 or transposed_weights and True or one_expert and library "
        "or linear_matches_the_reference and True or every_row_once and 40- and 300 or "
        "torch_sorts and 16-torch.int64 and 40 or are_summed and 70 and float32 or nan_in_another or "
        "negative_indices or equal_bits and (flat or own)"
    ),
    "ops/test_transpose.py": "rounded_once and bfloat16-torch",
    "ops/test_experts.py": (
        "gradients_match_the_reference or half_precision or one_expert or sentinels or no_tokens or nan_in or bits"
    ),
    "experts/test_module.py": "reference and True or nan_passes",
    "ops/test_attention.py": (
        "gradients_match_the_reference or every_dtype and bfloat16 or both_gradients and packed or sees_nothing "
        "or equal_bits and packed or any_strides or sink or every_option and 320"
    ),
    "ops/lora_linear/test_lora_linear.py": "reference and bfloat16 or rounded_once",
}
MODULES = tuple(BY_MODULE)
CHOSEN = " or ".join(f"({module.rpartition('/')[2]} and ({tests}))" for module, tests in BY_MODULE.items())
# Small, awkward shapes: under a memory checker each launch takes many times longer.
CHECKED = "gradients_match_the_reference or layer_of_every_format"
