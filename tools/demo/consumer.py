"""Fetches the kernel from a Hub, registers it and trains with it, as a user does; needs torch, transformers and PEFT.

Trains a small Gemma 4 text model with mixture-of-experts blocks (random weights) on bytes of English text, with PEFT
LoRA on the experts, once for each experts implementation from the same seed. Events go to standard output as JSON
lines; the last one is the result.

    python consumer.py REPO_ID VERSION TEXT_FILE STEPS
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernels import get_kernel, get_loaded_kernels
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma4TextConfig

IMPLEMENTATIONS = ("scattermoe", "grouped_mm")
# Shows how far two of transformers' own implementations drift apart; a few steps, for it is slow.
CONTROL, CONTROL_STEPS = "eager", 8
BATCH, LENGTH = 4, 192
WARM_UP_STEPS = 2
RANK = 16


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def build_model() -> Any:
    """A Gemma 4 text model over bytes: a sliding layer and a global one, each with 64 experts, 8 of them a token."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=64,
        enable_moe_block=True,
        num_experts=64,
        top_k_experts=8,
        moe_intermediate_size=192,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=256,
        max_position_embeddings=LENGTH,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(model, lora)


def batches(text: bytes, steps: int) -> list[torch.Tensor]:
    """``[steps, BATCH, LENGTH]`` byte ids, the same for every call."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, len(data) - LENGTH, (steps, BATCH), generator=generator)
    return [torch.stack([data[s : s + LENGTH] for s in row.tolist()]) for row in starts]


class Memory:
    """Peak memory of this process above what it held at the start, in bytes, by Linux's own count."""

    def __init__(self) -> None:
        gc.collect()
        # Without this, pages that an earlier run freed would count as held already.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM") - self.start

    @staticmethod
    def _read(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def train(implementation: str, data: list[torch.Tensor]) -> dict[str, Any]:
    """Losses, milliseconds a step and peak memory above the model's."""
    model = build_model()
    model.get_base_model().set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses, seconds = [], []
    memory = Memory()
    for step, ids in enumerate(data):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        say("step", implementation=implementation, step=step + 1, steps=len(data), loss=losses[-1])
    return {
        "losses": losses,
        "ms_per_step": 1000 * statistics.median(seconds[WARM_UP_STEPS:] or seconds),
        "peak_memory_bytes": memory.peak(),
    }


def main(repo_id: str, version: str, text_file: str, steps: str) -> None:
    kernel = get_kernel(repo_id, version=int(version))
    kernel.register()
    loaded = next(k for k in get_loaded_kernels() if k.module is kernel)
    say(
        "loaded",
        id=loaded.metadata.id,
        file=kernel.__file__,
        revision=loaded.repo_info.revision if loaded.repo_info else None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    data = batches(Path(text_file).read_bytes(), int(steps))
    runs = {name: train(name, data) for name in IMPLEMENTATIONS}
    runs[CONTROL] = train(CONTROL, data[:CONTROL_STEPS])
    say("result", runs=runs)


if __name__ == "__main__":
    main(*sys.argv[1:])
