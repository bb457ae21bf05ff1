"""Convert a LoRA adapter of a mixture of experts for vLLM or SGLang, or back for PEFT.

    python convert_adapter.py my-adapter my-adapter-served
    vllm serve Qwen/Qwen3-30B-A3B --enable-lora --lora-modules mine=my-adapter-served

Needs kernels, torch, safetensors and transformers; no GPU, and no weights of the base model.
docs/kernel/adapters.md says which server reads which layout.
"""

from __future__ import annotations

import argparse
import sys

from kernels import get_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a LoRA adapter of a mixture of experts.")
    parser.add_argument("source", help="directory with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("destination", help="directory to make")
    parser.add_argument(
        "--layout",
        choices=["per_expert", "peft"],
        default="per_expert",
        help="per_expert for servers (default), peft to go on training",
    )
    parser.add_argument("--model", help="base model, if not the one that the adapter names")
    parser.add_argument("--kernel", default="org/scattermoe-lora", help="repository of the kernel")
    arguments = parser.parse_args()
    kernel = get_kernel(arguments.kernel, version=1)
    try:
        kernel.convert_adapter(
            arguments.source, arguments.destination, layout=arguments.layout, model=arguments.model
        )
    except (ValueError, OSError) as e:
        sys.exit(str(e))
    print(f"{arguments.destination}: an adapter in the {arguments.layout} layout")


if __name__ == "__main__":
    main()
