"""Gemma 4 E4B, LoRA on text and vision layers, trained on pictures with descriptions, on one card of 24 GB.

    pip install torch transformers peft accelerate kernels pillow
    python gemma4_e4b_images.py --data train.jsonl

Each line of train.jsonl is {"image": "picture.png", "text": "what it shows"}. Memory and speed, and how they were
obtained: docs/recipes.md.
"""

import argparse
import json
from pathlib import Path

import torch
from kernels import get_kernel
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.trainer import Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-4-E4B-it")
parser.add_argument("--data", default="train.jsonl")
parser.add_argument("--output", default="adapter")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
dtype = torch.float32 if args.tiny else torch.bfloat16
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gemma4_images")
data = [json.loads(line) for line in Path(args.data).read_text("utf-8").splitlines()]

set_seed(0)  # Before PEFT draws the adapter.
kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register_attention()
model = AutoModelForImageTextToText.from_pretrained(
    args.model, dtype=dtype, attn_implementation="eager" if args.eager else "scattermoe_flash"
)
# The linear layers inside the vision tower's clipped ones, which PEFT refuses; none in the audio tower, which pictures
# leave without gradients.
targets = kernel.lora_targets(model, r".*(language_model|vision_tower).*\.[qkvo]_proj")
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
if not args.eager:
    kernel.apply_to(model, "attention", "mlp", "norm", "projections", "loss")

tokenizer = AutoTokenizer.from_pretrained(args.model)
processor = AutoImageProcessor.from_pretrained(args.model)


def collate(rows):
    """Pictures and texts as the model takes them, with tokens for the parts of each picture, which no label has."""
    batch = processor([[Image.open(row["image"])] for row in rows], return_tensors="pt")
    parts = [tokenizer.image_token * count for count in batch.pop("num_soft_tokens_per_image")]
    begin, end = tokenizer.boi_token, tokenizer.eoi_token
    texts = [f"{begin}{image}{end}{row['text']}" for row, image in zip(rows, parts, strict=True)]
    batch |= tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    pictures = batch["input_ids"] == tokenizer.image_token_id
    batch["mm_token_type_ids"] = pictures.long()
    batch["labels"] = batch["input_ids"].masked_fill(pictures | (batch["attention_mask"] == 0), -100)
    return dict(batch)


settings = TrainingArguments(
    args.output,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=5e-3 if args.tiny else 1e-4,
    gradient_checkpointing=True,
    bf16=not args.tiny,
    logging_steps=1,
    remove_unused_columns=False,
    save_strategy="no",
)
trainer = Trainer(model, settings, collate, data)
kernel.check_training(trainer)
trainer.train()
trainer.save_model(args.output)
