"""Gemma 4 26B-A4B in bfloat16, LoRA on attention and experts, on 8 cards of 80 GB: FSDP2, or expert parallelism.

    pip install torch transformers peft kernels
    torchrun --nproc-per-node 8 eight_cards.py --data train.txt --parallel fsdp

"fsdp" splits all weights and the texts, "experts" the experts alone. Memory and speed: docs/recipes.md.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from kernels import get_kernel
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.distributed import DistributedConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-4-26B-A4B-it")
parser.add_argument("--data", default="train.txt")
parser.add_argument("--output", default="adapter")
parser.add_argument("--parallel", choices=["fsdp", "experts"], default="fsdp")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--eager", action="store_true", help="run transformers' own code, to compare")
parser.add_argument("--tiny", action="store_true", help="small random weights, to try the script")
args = parser.parse_args()
if args.tiny:
    import tiny

    args.model, args.data = tiny.prepare("gemma4_moe")
batch, length, dtype = (4, 64, torch.float32) if args.tiny else (8, 4096, torch.bfloat16)

dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.accelerator.current_accelerator() or torch.device("cpu")
if torch.accelerator.is_available():
    torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
kernel = get_kernel("org/scattermoe-lora", version=1)
kernel.register()
kernel.register_attention("scattermoe")
implementation = "eager" if args.eager else "scattermoe"
settings = {"dtype": dtype, "experts_implementation": implementation, "attn_implementation": implementation}
split = DistributedConfig(tp_size=world, ep_size=world, tp_plan={})
settings |= {"distributed_config": split} if args.parallel == "experts" else {"device_map": {"": device}}
model = AutoModelForCausalLM.from_pretrained(args.model, **settings)
set_seed(0)  # PEFT draws the adapter on each card.
modules, experts = r".*language_model.*\.[qkvo]_proj", ["experts.gate_up_proj", "experts.down_proj"]
lora = LoraConfig(r=16, lora_alpha=32, target_modules=modules, target_parameters=experts)
model = get_peft_model(model, lora, autocast_adapter_dtype=False)  # FSDP2 wants one dtype in a layer.
model.gradient_checkpointing_enable({"use_reentrant": False})
if args.parallel == "fsdp":
    for layer in model.get_base_model().model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
if not args.eager:
    kernel.apply_to(model, "attention", "loss")

text = AutoTokenizer.from_pretrained(args.model)(Path(args.data).read_text("utf-8"), return_tensors="pt")
rows = text["input_ids"][0].unfold(0, length, length).to(device)
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=5e-3 if args.tiny else 2e-4)
losses = []
for step in range(args.steps):
    ids = rows[torch.arange(step * batch, (step + 1) * batch) % len(rows)]
    ids = ids[rank::world] if args.parallel == "fsdp" else ids
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss := loss.detach() / world)
    losses.append(loss.item())
    if rank == 0:
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=options) if args.parallel == "fsdp" else None
if rank == 0 or state is None:  # Split experts are saved on all cards: PEFT gathers their factors.
    model.save_pretrained(args.output, state_dict=state)
