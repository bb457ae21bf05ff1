"""What ``--tiny`` of every recipe trains: models of the same classes with random weights, and this repository's text.

A recipe asks for ``prepare("gemma4_moe")`` and goes on with the directory's name where a model's name on the Hub would
stand, so that all that follows is the code that real weights run. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CARD.md", "docs/**/*.md")
VOCABULARY = 512
# Token ids that Gemma 4 marks images and sound with, in the small vocabulary.
SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    # Logits large enough for low-rank factors to change what is said in a few steps.
    "initializer_range": 0.1,
}
GEMMA: dict[str, Any] = DECODER | {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 0,
}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 64}
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4}


def text(kind: str) -> str:
    """Real text that every clone has: the repository's documents for a laptop's minutes, its license for a few steps,
    whose losses then do not change with every edit of a document."""
    patterns = DOCUMENTS if kind == "laptop" else ("LICENSE",)
    paths = [path for pattern in patterns for path in sorted(REPOSITORY.glob(pattern))]
    return "\n".join(path.read_text("utf-8") for path in paths)


def lines(content: str, count: int = 12) -> str:
    """A few of its long lines: so little that every step of a short run sees all of it."""
    return "\n".join([line.strip() for line in content.splitlines() if len(line) > 70][:count])


def prepare(kind: str) -> tuple[str, str]:
    """The directory of a small model with tokenizer, and a file of its training text; made once for each text.

    Args:
        kind: A key of ``_configurations``.
    """
    content = text(kind)
    code = hashlib.sha256(content.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    parent = Path(tempfile.gettempdir(), f"scattermoe-tiny-{os.getuid()}")
    directory = parent / f"{kind}-{code}"
    if not directory.is_dir():
        parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            _save_model(kind, Path(scratch), content)
            if kind == "gemma4_images":
                data = _save_pictures(directory, Path(scratch))
            else:
                data = content if kind == "laptop" else lines(content)
            Path(scratch, "train.txt").write_text(data, encoding="utf-8")
            # At once, for the processes of a parallel run do the same; the first to end is the one that counts.
            with contextlib.suppress(OSError):
                os.rename(scratch, directory)
                os.mkdir(scratch)
    return str(directory), str(directory / "train.txt")


def _save_pictures(directory: Path, scratch: Path) -> str:
    """Pictures of one colour, written to ``scratch``, and JSON lines that name them where they will stand."""
    from PIL import Image

    lines = []
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (48, 48), colour).save(scratch / f"{colour}.png")
        lines.append(
            json.dumps({"image": str(directory / f"{colour}.png"), "text": f"This picture is {colour}."})
        )
    return "\n".join(lines * 8)


def _save_model(kind: str, directory: Path, content: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = _tokenizer(content)
    config = _configurations()[kind](tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kind == "gemma4_images":
        _save_image_processor(directory)


def _tokenizer(content: str) -> Any:
    """Byte-level BPE of 512 tokens, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([content], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        extra_special_tokens={
            name: token
            for name, token in SPECIAL.items()
            if name not in ("pad_token", "eos_token", "bos_token")
        },
        **{name: SPECIAL[name] for name in ("pad_token", "eos_token", "bos_token")},
    )


def _save_image_processor(directory: Path) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70).save_pretrained(directory)


def _configurations() -> dict[str, Any]:
    from transformers import Gemma4Config, GptOssConfig, Qwen3MoeConfig

    def gemma(tokenizer: Any, audio: Any = None, **text_config: Any) -> Any:
        tokens = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
        tokens["eoa_token_index"] = tokens.pop("eoa_token_id")
        return Gemma4Config(
            text_config=GEMMA | text_config, vision_config=VISION, audio_config=audio, **tokens
        )

    shared = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "hidden_size_per_layer_input": 16}
    layer_types = ["sliding_attention", "full_attention"] * 2
    audio = TOWER | {"output_proj_dims": 32, "subsampling_conv_channels": [8, 4]}
    moe = {"enable_moe_block": True, "top_k_experts": 2, "attention_k_eq_v": True, **EXPERTS}
    sizes = {"hidden_size": 256, "initializer_range": 0.04, "top_k_experts": 4}
    laptop = moe | sizes | {"num_experts": 32, "moe_intermediate_size": 192}
    return {
        "laptop": lambda tokenizer: gemma(tokenizer, **laptop),
        "gemma4_moe": lambda tokenizer: gemma(tokenizer, use_bidirectional_attention="vision", **moe),
        "gemma4_dense": lambda tokenizer: gemma(tokenizer, use_bidirectional_attention="vision"),
        "gemma4_images": lambda tokenizer: gemma(tokenizer, audio, layer_types=layer_types, **shared),
        "qwen3_moe": lambda _: Qwen3MoeConfig(**DECODER, **EXPERTS, num_experts_per_tok=2),
        "gpt_oss": lambda _: GptOssConfig(
            **DECODER, num_local_experts=8, num_experts_per_tok=2, sliding_window=32
        ),
    }
