"""Gemma 4 26B-A4B, QLoRA on attention and experts, on one card of 24 or 80 GB.

    pip install torch transformers peft trl bitsandbytes kernels
    python gemma4_26b_qlora.py --data train.txt --card 24

train.txt has a document a line. Planned: 18.3 GiB of 24 GB, 23.9 of 80; 10,469 tokens/s on an H200: docs/recipes.md
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from kernels import get_kernel
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-4-26B-A4B-it")
parser.add_argument("--data", default="train.txt", help="a document a line")
parser.add_argument("--output", default="adapter")
parser.add_argument("--card", type=int, choices=[24, 80], default=24, help="its memory in GB")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
length, batch = {24: (2048, 1), 80: (8192, 2)}[args.card]
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gemma4_moe")
    length, batch = 64, 4
dtype = torch.float32 if args.tiny else torch.bfloat16
data = Dataset.from_dict({"text": [*filter(str.strip, Path(args.data).read_text("utf-8").splitlines())]})

kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register()
kernel.register_attention("scattermoe")
implementation = "eager" if args.eager else "scattermoe"
# Experts by the kernel's quantizer, linear layers by bitsandbytes; the router and the towers stay as they are.
linears = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=dtype,
    llm_int8_skip_modules=["lm_head", "router", "vision_tower", "embed_vision"],
)
model = AutoModelForCausalLM.from_pretrained(
    args.model,
    dtype=dtype,
    quantization_config=kernel.quantization_config("nf4", linears=linears),
    experts_implementation=implementation,
    attn_implementation=implementation,
    device_map="auto",
)
lora = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=r".*language_model.*\.[qkvo]_proj",  # Text does not reach the towers.
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
settings = SFTConfig(
    args.output,
    max_steps=args.steps,
    max_length=length,
    packing=True,  # Without an attention mask, which would hide where documents begin.
    per_device_train_batch_size=batch,
    learning_rate=1e-2 if args.tiny else 2e-4,
    optim="adamw_torch" if args.tiny else "adamw_8bit",
    bf16=not args.tiny,
    logging_steps=1,
    save_strategy="no",
)
tokenizer = AutoTokenizer.from_pretrained(args.model)
trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora)
if not args.eager:
    kernel.apply_to(trainer.model, "attention", "mlp", "norm", "projections")
kernel.check_training(trainer)
trainer.train()
trainer.save_model(args.output)
