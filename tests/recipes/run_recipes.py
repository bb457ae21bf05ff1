"""Runs every recipe at tiny size, ours and eager, and writes what came of it as JSON.

    python run_recipes.py FOLDER      (LOCAL_KERNELS names the built kernel)

Each recipe runs in a process of its own, forked after the imports, which take longer than the recipes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import runpy
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
import transformers
import transformers.distributed
import trl
from kernels import get_kernel
from peft import PeftModel
from torch.distributed.checkpoint import state_dict as _state_dict  # noqa: F401
from torch.distributed.fsdp import fully_shard as _fully_shard  # noqa: F401

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STEPS = "6"
RUNS = {
    "gemma4_26b_qlora": [],
    "gemma4_31b_long": [],
    "gemma4_e4b_images": [],
    "qwen3": ["qwen3_gpt_oss_qlora"],
    "gpt_oss": ["qwen3_gpt_oss_qlora", "--model", "unsloth/gpt-oss-20b-BF16"],
    "grpo_t4": [],
    "laptop": [],
}
PARALLEL = {"eight_cards_fsdp": "fsdp", "eight_cards_experts": "experts"}
_ = trl.SFTTrainer, trl.GRPOTrainer  # Imported here, once, and not in every process.


def run(script: str, *arguments: str) -> dict[str, Any]:
    """The globals that a recipe ends with."""
    sys.argv = [script, "--tiny", "--steps", STEPS, *arguments]
    return runpy.run_path(str(RECIPES / f"{script}.py"), run_name="__main__")


def history(result: dict[str, Any]) -> dict[str, list[float]]:
    """Losses, and rewards where there are some, of each step."""
    if "losses" in result:
        return {"losses": result["losses"]}
    log = result["trainer"].state.log_history
    return {
        key: [row[name] for row in log if name in row]
        for key, name in (("losses", "loss"), ("rewards", "reward"))
    }


def both_ways(name: str, folder: Path) -> dict[str, Any]:
    script, *arguments = RUNS[name] or [name]
    eager = run(script, *arguments, "--eager", "--output", str(folder / f"{name}-eager"))
    del eager["model"]
    ours = run(script, *arguments, "--output", str(folder / name))
    return {"ours": history(ours), "eager": history(eager), **reloaded(ours["args"].model, folder / name)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def parallel(rank: int, processes: int, port: int, eager: bool, name: str, folder: Path) -> None:
    set_up()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = folder / (f"{name}-eager" if eager else name)
    result = run(
        "eight_cards", "--parallel", PARALLEL[name], "--output", str(output), *(["--eager"] if eager else [])
    )
    torch.distributed.destroy_process_group()
    if rank == 0:
        output.with_suffix(".losses").write_text(json.dumps([history(result), result["args"].model]))


def reloaded(base: str, adapter: Path) -> dict[str, Any]:
    """The adapter in a fresh model, dense: losses of a text with and without it, ours and eager, and a continuation."""
    kernel = get_kernel("org/scattermoe-lora", version=1)
    kernel.register()
    kernel.register_attention("scattermoe")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    text = Path(base, "train.txt").read_text("utf-8").splitlines()[0]
    text = json.loads(text)["text"] if text.startswith("{") else text
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    losses = {}
    for implementation in ("scattermoe", "eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, experts_implementation=implementation, attn_implementation=implementation
        )
        model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            losses[implementation] = model(input_ids=ids, labels=ids).loss.item()
            with model.disable_adapter():
                losses[f"{implementation} without"] = model(input_ids=ids, labels=ids).loss.item()
        output = model.generate(input_ids=ids[:, :5], max_new_tokens=4, do_sample=False)
    return {"reloaded": losses, "generated": output.shape[1] - 5}


def set_up() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(RECIPES))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def child(_: int, name: str, folder: Path) -> None:
    set_up()
    if name in PARALLEL:
        ours, base = json.loads((folder / name).with_suffix(".losses").read_text())
        eager, _base = json.loads((folder / f"{name}-eager").with_suffix(".losses").read_text())
        result = {"ours": ours, "eager": eager, **reloaded(base, folder / name)}
    else:
        result = both_ways(name, folder)
    (folder / f"{name}.json").write_text(json.dumps(result))


def fork(target: Any, arguments: tuple[Any, ...], processes: int = 1) -> None:
    gc.freeze()
    torch.multiprocessing.start_processes(target, arguments, nprocs=processes, start_method="fork")


def main(folder: Path) -> None:
    for name in RUNS:
        fork(child, (name, folder))
    for name in PARALLEL:
        fork(parallel, (1, free_port(), True, name, folder))
        fork(parallel, (2, free_port(), False, name, folder), processes=2)
        fork(child, (name, folder))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(Path(sys.argv[1]))
