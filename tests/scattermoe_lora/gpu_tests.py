"""The tests that the Triton kernels have to pass on a GPU, with every tensor made there."""

# Operators against their references; the rest of the tests is about what does not depend on the device.
CHOSEN = (
    "reference or any_shape or bits or half_precision or one_expert or sentinels or no_tokens or nan_in_one_token "
    "or nan_passes or every_dtype or both_gradients or sees_nothing or any_strides or sink"
)
MODULES = (
    "ops/test_experts.py",
    "ops/test_grouped_linear.py",
    "ops/test_options.py",
    "experts/test_module.py",
    "ops/test_attention.py",
    "ops/test_norm_rotary.py",
    "ops/gated_activation/test_gated_activation.py",
    "ops/rms_norm/test_rms_norm.py",
    "ops/linear_cross_entropy/test_linear_cross_entropy.py",
    "ops/quantization/test_decode.py",
    "ops/quantization/test_operators.py",
)
# Small, awkward shapes: under a memory checker each launch takes many times longer.
CHECKED = "gradients_match_the_reference"
