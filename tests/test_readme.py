"""The README's training script, run as it stands on a small Gemma 4 with random weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "google/gemma-4-26B-A4B-it"

# Runs the script and notes the operators that it calls: a script that trained without the kernel would pass otherwise.
WATCHED = """
import sys
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    called = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(str(function))
        return function(*args, **(kwargs or {}))

with Watch():
    exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))
print(*(name for name in Watch.called if "scattermoe_lora" in name), file=sys.stderr)
"""


@pytest.fixture
def script() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "Trainer(" in block]
    return block


def save_small_model(directory: Path) -> None:
    """A Gemma 4 text model with experts and a tokenizer of bytes, as ``from_pretrained`` reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({"<pad>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>").save_pretrained(directory)
    config = Gemma4TextConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=32,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=257,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def test_the_training_script_of_the_readme_trains_a_lora_with_the_kernel(script: str, tmp_path: Path) -> None:
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec

    assert len(script.strip().splitlines()) <= 20
    build(load_spec(REPOSITORY), tmp_path / "build")
    save_small_model(tmp_path / "model")
    lines = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if len(line) > 40]
    (tmp_path / "train.txt").write_text("\n".join(lines[:64]))
    assert script.count(f'"{MODEL}"') == 1
    (tmp_path / "script.py").write_text(script.replace(MODEL, str(tmp_path / "model")))

    environment = {
        **os.environ,
        "LOCAL_KERNELS": f"org/scattermoe-lora={tmp_path / 'build'}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", WATCHED, "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "experts_forward" in done.stderr
    assert "experts_backward" in done.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
