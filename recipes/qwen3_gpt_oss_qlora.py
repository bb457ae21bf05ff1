"""Qwen3-30B-A3B or gpt-oss-20b, QLoRA on attention and experts, on one card of 24 GB.

    pip install torch transformers peft accelerate bitsandbytes kernels
    python qwen3_gpt_oss_qlora.py --data train.txt --model Qwen/Qwen3-30B-A3B
    python qwen3_gpt_oss_qlora.py --data train.txt --model unsloth/gpt-oss-20b-BF16

train.txt has a document on each line. The checkpoint of gpt-oss has to be one in bfloat16: codes of its own format are
not trained on by PEFT. Planned: Qwen3 20.7 GiB, gpt-oss 15.0. How this was obtained, and speed: docs/recipes.md.
"""

import argparse
from pathlib import Path

import torch
from kernels import get_kernel
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
)
from transformers.trainer import Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B")
parser.add_argument("--data", default="train.txt", help="a document a line")
parser.add_argument("--output", default="adapter")
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gpt_oss" if "gpt-oss" in args.model else "qwen3_moe")
    args.length = 64
dtype = torch.float32 if args.tiny else torch.bfloat16
lines = list(filter(str.strip, Path(args.data).read_text("utf-8").splitlines()))

set_seed(0)  # Before PEFT draws the adapter.
kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register()
kernel.register_attention("scattermoe")  # gpt-oss refuses names with "flash" that it does not know.
implementation = "eager" if args.eager else "scattermoe"
linears = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
model = AutoModelForCausalLM.from_pretrained(
    args.model,
    dtype=dtype,
    quantization_config=kernel.quantization_config("nf4", linears=linears),
    experts_implementation=implementation,
    attn_implementation=implementation,
    device_map="auto",
)
projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
experts = ["experts.gate_up_proj", "experts.down_proj"]
lora = LoraConfig(r=8, lora_alpha=16, target_modules=projections, target_parameters=experts)
model = get_peft_model(model, lora, autocast_adapter_dtype=False)  # In bfloat16, to fit.
if not args.eager:
    kernel.apply_to(model, "norm", "projections", "loss")

tokenizer = AutoTokenizer.from_pretrained(args.model)
data = [tokenizer(line, truncation=True, max_length=args.length) for line in lines]
settings = TrainingArguments(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=4 if args.tiny else 1,
    gradient_accumulation_steps=2 if args.tiny else 8,
    optim="adamw_torch" if args.tiny else "adamw_8bit",
    learning_rate=1e-2 if args.tiny else 2e-4,
    gradient_checkpointing=True,
    bf16=not args.tiny,
    logging_steps=1,
    save_strategy="no",
)
trainer = Trainer(model, settings, DataCollatorForLanguageModeling(tokenizer, mlm=False), data)
kernel.check_training(trainer)
trainer.train()
trainer.save_model(args.output)
