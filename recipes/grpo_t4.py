"""Gemma 4 E2B, GRPO in float16 on a card of 16 GB without bfloat16 (T4).

    pip install torch transformers peft trl bitsandbytes kernels
    python grpo_t4.py --data prompts.txt

prompts.txt has a prompt on each line; the reward is a stand-in for yours. Memory and speed: docs/recipes.md.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from kernels import get_kernel
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-4-E2B-it")
parser.add_argument("--data", default="prompts.txt")
parser.add_argument("--output", default="adapter")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gemma4_dense")
data = Dataset.from_dict({"prompt": [*filter(str.strip, Path(args.data).read_text("utf-8").splitlines())]})

kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register_attention()
model = AutoModelForCausalLM.from_pretrained(
    args.model,
    dtype=torch.float16,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["lm_head", "vision_tower", "audio_tower", "embed_vision", "embed_audio"],
    ),
    attn_implementation="eager" if args.eager else "scattermoe_flash",
    device_map="auto",
)


def reward(completions, **_):
    """The share of a completion that is spaces, in place of what you want."""
    return [completion.count(" ") / max(len(completion), 1) for completion in completions]


settings = GRPOConfig(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=8,
    num_generations=8,
    max_completion_length=12 if args.tiny else 256,
    learning_rate=1e-2 if args.tiny else 1e-5,
    fp16=torch.accelerator.is_available(),  # Scales the loss; the model is in float16 anyway.
    bf16=False,
    logging_steps=1,
    save_strategy="no",
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.[qkvo]_proj")
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
trainer = GRPOTrainer(model, reward, settings, data, processing_class=tokenizer, peft_config=lora)
# TRL makes adapters of quantized models bfloat16, whose gradients nothing can scale.
for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
    parameter.data = parameter.data.float()
if not args.eager:  # Gemma 4's MLPs overflow in float16 without "mlp".
    kernel.apply_to(trainer.model, "attention", "mlp", "norm", "loss")
kernel.check_training(trainer)
trainer.train()
trainer.save_model(args.output)
