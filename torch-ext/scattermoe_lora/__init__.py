"""Fused mixture-of-experts kernels with LoRA that is never merged, and attention for heads of up to 512.

``register()`` makes ``experts_implementation="scattermoe"`` available to transformers' models, and PEFT's LoRA on
expert parameters runs fused in it; ``register_attention()`` does the same for ``attn_implementation``;
``apply_to(model)`` fuses RMSNorms, gated MLPs, Gemma 4's rotary embedding and LoRA on projections, and takes the loss
without logits; ``quantize_experts(model, "nf4")`` quantizes a loaded model's experts; ``convert_adapter`` writes a
trained adapter as vLLM and SGLang read it. Importing the package needs torch alone.
"""

from .integration.apply import apply_to, remove_from
from .integration.attention.register import register_attention, unregister_attention
from .integration.experts.adapters import convert_adapter
from .integration.experts.forward import experts_forward
from .integration.experts.quantized.convert import dequantize_experts, quantize_experts
from .integration.experts.quantized.loading import quantization_config
from .integration.experts.register import register, unregister
from .integration.float8_training.adafactor import Adafactor
from .integration.float8_training.convert import train_in_float8
from .integration.float8_training.dense_steps import Float8Optimizer
from .integration.projections.targets import lora_targets
from .integration.projections.towers import freeze_towers
from .ops.attention.api import flash_attn_func, flash_attn_varlen_func
from .ops.gated_activation.api import gated_activation, gated_mlp
from .ops.grouped_linear.api import grouped_linear
from .ops.linear_cross_entropy.api import linear_cross_entropy
from .ops.linear_cross_entropy.decoded import DecodedWeight
from .ops.lora_linear.api import lora_linear
from .ops.norm_rotary.api import rms_norm_rotary
from .ops.rms_norm.api import add_rms_norm, rms_norm

__all__ = [
    "Adafactor",
    "DecodedWeight",
    "Float8Optimizer",
    "add_rms_norm",
    "apply_to",
    "convert_adapter",
    "dequantize_experts",
    "experts_forward",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "freeze_towers",
    "gated_activation",
    "gated_mlp",
    "grouped_linear",
    "linear_cross_entropy",
    "lora_linear",
    "lora_targets",
    "quantization_config",
    "quantize_experts",
    "register",
    "register_attention",
    "remove_from",
    "rms_norm",
    "rms_norm_rotary",
    "train_in_float8",
    "unregister",
    "unregister_attention",
]
