"""Gemma 4 26B-A4B, all weights trained, on one card of 80 GB: weights and gradients in float8, and Adafactor.

    pip install torch transformers accelerate kernels
    python full_float8.py --data train.txt

train.txt has a document on each line. Planned: 55.2 GiB on the card, after 50 GB of the computer's memory to read the
model. How this was obtained, and speed: docs/recipes.md. How it works: docs/kernel/float8_training.md.
"""

import argparse
from pathlib import Path

import torch
from kernels import get_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers.trainer import Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-4-26B-A4B-it")
parser.add_argument("--data", default="train.txt", help="a document a line")
parser.add_argument("--output", default="trained")
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gemma4_moe")
    args.length = 64
lines = list(filter(str.strip, Path(args.data).read_text("utf-8").splitlines()))

set_seed(0)  # Weights and gradients are rounded stochastically.
kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register()
kernel.register_attention()
model = AutoModelForCausalLM.from_pretrained(
    args.model,
    dtype=torch.bfloat16,
    experts_implementation="eager" if args.eager else "scattermoe",
    attn_implementation="eager" if args.eager else "scattermoe_flash",
)
kernel.freeze_towers(model)
learning_rate = 2e-3 if args.tiny else 1e-5
optimizer = None
if not args.eager:
    # Before the model moves to the card, which would not hold it and its gradients.
    kernel.train_in_float8(model)
    kernel.apply_to(model, "attention", "norm", "loss")
    optimizer = kernel.Adafactor((p for p in model.parameters() if p.requires_grad), lr=learning_rate)

tokenizer = AutoTokenizer.from_pretrained(args.model)
data = [tokenizer(line, truncation=True, max_length=args.length) for line in lines]
settings = TrainingArguments(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=1 if not args.tiny else 4,
    gradient_accumulation_steps=4 if not args.tiny else 2,
    learning_rate=learning_rate,
    optim="adafactor",  # Where no other is given.
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    logging_steps=1,
    save_strategy="no",
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, settings, collator, data, optimizers=(optimizer, None))
kernel.check_training(trainer)
trainer.train()
trainer.save_model(args.output)
