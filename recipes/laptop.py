"""The recipe of Gemma 4's experts on a laptop: a small model with random weights, and this repository's text.

    kernelpress build && export LOCAL_KERNELS=org/scattermoe-lora=$PWD/build
    python recipes/laptop.py

`python recipes/measure.py laptop` runs it with the kernel and without, and compares.
"""

import argparse
from pathlib import Path

import tiny
import torch
from kernels import get_kernel
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", default="adapter")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument(
    "--tiny", action="store_true", help="the smaller model and the few lines of the other recipes"
)
args = parser.parse_args()
args.model, args.data = tiny.prepare("gemma4_moe" if args.tiny else "laptop")
batch, length = (4, 64) if args.tiny else (4, 128)

set_seed(0)
kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register()
kernel.register_attention("scattermoe")
implementation = "eager" if args.eager else "scattermoe"
settings = {"experts_implementation": implementation, "attn_implementation": implementation}
model = AutoModelForCausalLM.from_pretrained(args.model, **settings)
kernel.quantize_experts(model, "nf4")
lora = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=r".*language_model.*\.[qkvo]_proj",
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
model = get_peft_model(model, lora)
if not args.eager:
    kernel.apply_to(model, "attention", "mlp", "norm", "loss")

tokenizer = AutoTokenizer.from_pretrained(args.model)
text = tokenizer(Path(args.data).read_text("utf-8"), return_tensors="pt")["input_ids"][0]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
losses = []
for step in range(args.steps):
    starts = torch.randint(len(text) - length, (batch,)).tolist()
    ids = torch.stack([text[start : start + length] for start in starts])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 10 == 0 or step + 1 == args.steps:
        print(f"step {step + 1:>3}/{args.steps}  loss {losses[-1]:.4f}", flush=True)

model.save_pretrained(args.output)
model = AutoModelForCausalLM.from_pretrained(args.model, **settings)
model = PeftModel.from_pretrained(model, args.output)
prompt = tokenizer("The kernel", return_tensors="pt")
sample = model.generate(**prompt, max_new_tokens=40, do_sample=True, temperature=0.7)
print(f"{args.output}, loaded again, goes on: {tokenizer.decode(sample[0])!r}")
