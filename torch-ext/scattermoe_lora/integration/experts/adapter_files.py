"""A LoRA adapter's two files, as PEFT's ``save_pretrained`` writes them: reading with checks, and writing at once."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapter_layouts import Pair

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def error(file: Path, key: str, expected: object, got: object) -> ValueError:
    """The exception for an adapter that does not fit, with file, key, expected and got."""
    return ValueError(f"convert_adapter: {file}: {key}: expected {expected}, got {got}")


def tensor_key(name: str, side: str = "A") -> str:
    """The key of a module's factor in the file of tensors; ``name`` as in :class:`Adapter`."""
    module, embedding, _ = name.partition(":embedding")
    return f"{_PREFIX}{module}.lora_{'embedding_' if embedding else ''}{side}" + (
        "" if embedding else ".weight"
    )


@dataclass(frozen=True)
class Adapter:
    """What the files of an adapter hold.

    Attributes:
        directory: Their place, for messages.
        config: adapter_config.json.
        pairs: A and B, by the name of the module in the model; names end in ``:embedding`` for layers whose factors
            PEFT calls ``lora_embedding_A`` and ``lora_embedding_B``.
        rest: Other tensors (``modules_to_save``), by key.
    """

    directory: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    rest: Mapping[str, torch.Tensor]

    def mismatch(self, name: str, expected: object, got: object) -> ValueError:
        """The exception for factors of a module that do not fit."""
        return error(self.directory / TENSORS, tensor_key(name), expected, got)

    def scaling(self, name: str, rank: int, target: str) -> float:
        """``alpha / r`` of the factors under ``name``, or ``alpha / sqrt(r)`` of rank-stabilised LoRA.

        Args:
            target: The name of the module or parameter that PEFT matches ``rank_pattern`` and ``alpha_pattern`` with.

        Raises:
            ValueError: By the config they have another rank.
        """

        def value(pattern: str, default: str) -> Any:
            for key, number in (self.config.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", target):
                    return number
            return self.config[default]

        expected, alpha = value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")
        if rank != expected:
            raise self.mismatch(name, f"rank {expected} by {CONFIG}", rank)
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def read(directory: Path) -> Adapter:
    """Reads and checks an adapter.

    Raises:
        ValueError: No adapter of LoRA, an unreadable file, or an adapter that is more than pairs of factors.
    """
    for file in (CONFIG, TENSORS):
        if not (directory / file).is_file():
            raise error(directory, file, "an adapter's directory with this file", "none")
    config = _read_config(directory / CONFIG)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / TENSORS)
    except SafetensorError as e:
        raise error(directory / TENSORS, "header", "a safetensors file", e) from e
    sides: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_(?:(embedding_)([AB])|([AB])\.weight)", key)
        if match is not None:
            name = match[1].removeprefix(_PREFIX) + (":embedding" if match[2] else "")
            sides.setdefault(name, {})[match[3] or match[4]] = tensor
        elif ".lora_" in key:
            raise error(directory / TENSORS, key, "factors A and B of LoRA alone", list(tensor.shape))
        else:
            rest[key] = tensor
    for name, pair in sides.items():
        for side in {"A", "B"} - pair.keys():
            raise error(directory / TENSORS, tensor_key(name, side), "a factor A and a factor B", "none")
        if pair["A"].dim() != 2 or pair["B"].dim() != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = f"{list(pair['A'].shape)} and {list(pair['B'].shape)}"
            raise error(directory / TENSORS, tensor_key(name), "A [r, in] and B [out, r]", shapes)
    return Adapter(directory, config, {name: (pair["A"], pair["B"]) for name, pair in sides.items()}, rest)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as e:
        raise error(file, "contents", "JSON", e) from e
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        raise error(
            file, "peft_type", "LORA", config.get("peft_type") if isinstance(config, dict) else config
        )
    for setting in ("use_dora", "lora_bias"):
        if config.get(setting):
            raise error(file, setting, "false, for factors A and B do not express it", config[setting])
    for key, number in {"r": config.get("r"), **(config.get("rank_pattern") or {})}.items():
        if not isinstance(number, int) or number < 1:
            raise error(file, key, "a rank of 1 or more", number)
    for key, number in {
        "lora_alpha": config.get("lora_alpha"),
        **(config.get("alpha_pattern") or {}),
    }.items():
        if not isinstance(number, (int, float)):
            raise error(file, key, "a number", number)
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(setting) or {}:
            try:
                re.compile(pattern)
            except re.error as e:
                raise error(file, setting, "names or regular expressions", f"{pattern!r}, {e}") from e
    return config


def targets(names: Collection[str], every: Collection[str], parts: int) -> set[str]:
    """Names by which PEFT finds ``names`` among ``every``: their last parts, where these are of no others."""
    ends = set()
    for name in names:
        end = ".".join(name.split(".")[-parts:])
        same = (other for other in every if f".{other}".endswith(f".{end}"))
        ends.add(end if all(other in names for other in same) else name)
    return ends


def settings(scalings: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The part of a config that gives modules and parameters by name their rank and scaling."""
    values = {name: (rank, scaling * rank) for name, (rank, scaling) in scalings.items()}
    (r, alpha), _ = Counter(values.values()).most_common(1)[0]
    ranks, alphas = {}, {}
    for value in dict.fromkeys(values.values()):
        for target in sorted(targets({name for name in values if values[name] == value}, values, 2)):
            if value[0] != r:
                ranks[target] = value[0]
            if value[1] != alpha:
                alphas[target] = _number(value[1])
    numbers = {"r": r, "lora_alpha": _number(alpha), "rank_pattern": ranks, "alpha_pattern": alphas}
    return {**numbers, "use_rslora": False}


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def check_place(directory: Path) -> None:
    """Raises FileExistsError where a new adapter would replace something."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"convert_adapter: {directory}: expected nothing there or an empty directory")


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter beside its place and renames it there, so that no half of one is ever found."""
    from safetensors.torch import save_file

    # Resolved, for "." has no name.
    directory = directory.resolve()
    new_parents = [parent for parent in directory.parents if not parent.exists()]
    beside = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        (beside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        save_file(_apart(tensors), beside / TENSORS, {"format": "pt"})
        beside.replace(directory)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous, with a copy of each that shares its memory with one before it, such as the A of gate and
    up: a file keeps them apart."""
    apart: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()
    for key, tensor in tensors.items():
        contiguous = tensor.contiguous()
        apart[key] = contiguous.clone() if contiguous.data_ptr() in addresses else contiguous
        addresses.add(contiguous.data_ptr())
    return apart
