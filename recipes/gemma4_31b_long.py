"""Gemma 4 31B (dense), QLoRA on documents of up to 32,768 tokens, on one card of 80 GB.

    pip install torch transformers peft accelerate bitsandbytes kernels
    python gemma4_31b_long.py --data train.txt

train.txt has a document on each line. Memory and speed, and how they were obtained: docs/recipes.md.
"""

import argparse
from pathlib import Path

import torch
from kernels import get_kernel
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorWithFlattening
from transformers.trainer import Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-4-31B-it")
parser.add_argument("--data", default="train.txt", help="a document a line")
parser.add_argument("--output", default="adapter")
parser.add_argument(
    "--length", type=int, default=32768, help="tokens in a row, in which documents are packed"
)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gemma4_dense")
    args.length = 128
dtype = torch.float32 if args.tiny else torch.bfloat16
lines = list(filter(str.strip, Path(args.data).read_text("utf-8").splitlines()))

set_seed(0)  # Before PEFT draws the adapter.
kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register_attention()
model = AutoModelForCausalLM.from_pretrained(
    args.model,
    dtype=dtype,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "vision_tower", "embed_vision"],
    ),
    attn_implementation="eager" if args.eager else "scattermoe_flash",
    device_map="auto",
)
targets = kernel.lora_targets(model, r".*language_model.*\.([qkvo]|gate|up|down)_proj")
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
if not args.eager:
    kernel.apply_to(model, "attention", "mlp", "norm", "projections", "loss")

tokenizer = AutoTokenizer.from_pretrained(args.model)
rows = [[]]
for line in lines:
    ids = tokenizer(line)["input_ids"][: args.length]
    if sum(map(len, rows[-1])) + len(ids) > args.length:
        rows.append([])
    rows[-1].append(ids)
flatten = DataCollatorWithFlattening()  # Positions begin anew at each document; no mask hides that.
settings = TrainingArguments(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=1,
    learning_rate=1e-2 if args.tiny else 1e-4,
    gradient_checkpointing=True,
    bf16=not args.tiny,
    logging_steps=1,
    remove_unused_columns=False,
    save_strategy="no",
)
trainer = Trainer(model, settings, lambda batch: flatten([{"input_ids": ids} for ids in batch[0]]), rows)
kernel.check_training(trainer)
trainer.train()
trainer.save_model(args.output)
