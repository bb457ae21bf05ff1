"""Conversion of LoRA adapters of expert weights between PEFT's layout and the one that inference servers read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from .adapter_files import (
    CONFIG,
    TENSORS,
    Adapter,
    check_place,
    error,
    read,
    settings,
    targets,
    tensor_key,
    write,
)
from .adapter_layouts import PROJECTIONS, Experts, Factors, join, split, stack, unstack
from .adapter_names import base_model, experts_of, renamed, served_names


def convert_adapter(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: Literal["per_expert", "peft"] = "per_expert",
    model: str | os.PathLike[str] | torch.nn.Module | None = None,
) -> None:
    """Convert a LoRA adapter of expert weights into the layout that servers read, or back into PEFT's.

    Every expert's ``scaling * B A`` stays what it was: entries of the factors are moved, copied and padded with zeros.
    Only where modules differ in ``alpha / r``, which servers take from one place for all, the ratio goes into B, in
    float64 where its own dtype does not hold the result. Adapters of attention and other linear layers come along.

    Args:
        source: Directory of an adapter in the other layout (``adapter_config.json``, ``adapter_model.safetensors``).
        destination: Directory to make. Nothing of it is there if this fails.
        layout: ``"per_expert"``: A ``[r, in]`` and B ``[out, r]`` for each expert and projection, one rank and one
            alpha for the whole adapter. ``"peft"``: as PEFT 0.20 and later keeps LoRA on ``target_parameters``, for a
            stack of weights A ``[r * E, in]``, expert-major, and B ``[out, r * E]``, rank-major.
        model: The base model, as a module or as what its configuration is loaded from; None for the one that the
            adapter names. Only names and shapes are looked at, and no weights are loaded.

    Raises:
        ValueError: The source is no such adapter; the message names file, key, expected and got.
        FileExistsError: There is something at the destination.
    """
    check_place(Path(destination))
    if layout not in ("per_expert", "peft"):
        raise ValueError(f"convert_adapter: layout: expected 'per_expert' or 'peft', got {layout!r}")
    adapter = read(Path(source))
    base = model if isinstance(model, torch.nn.Module) else base_model(adapter, model)
    convert = _to_per_expert if layout == "per_expert" else _to_peft
    config, tensors = convert(adapter, base)
    write(Path(destination), {**adapter.config, **config}, {**adapter.rest, **tensors})


def _to_per_expert(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What of the config changes, and the factors by key, of an adapter in PEFT's layout."""
    experts = experts_of(base)
    _check_targets(adapter, base, experts)
    parameters: dict[str, dict[str, Factors]] = {}
    linears: dict[str, Factors] = {}
    paths = {name: re.sub(r"(\.base_layer)+$", "", name) for name in adapter.pairs}
    if experts.keys().isdisjoint(paths.values()):
        raise _without(adapter, "factors of experts in PEFT's layout")
    names, parent = served_names(base)
    for name, path in paths.items():
        if path not in experts:
            linears[renamed(name, "mlp", parent)] = _linear(adapter, base, name, name)
            continue
        pair = adapter.pairs[name]
        # Of a module's parameters PEFT wraps the first one first.
        outer = sum(other == path and len(key) < len(name) for key, other in paths.items())
        expected = dict(enumerate(reversed(_targeted(adapter, experts[path])))).get(outer, "")
        match = unstack(experts[path], pair, expected, _turns(adapter))
        if match is None:
            shapes = " or ".join(
                f"A [r*{experts[path].number}, {n_in}] and B [{n_out}, r*{experts[path].number}] of {parameter}"
                for parameter in experts[path].parameters
                for n_in, n_out in (experts[path].features(parameter),)
            )
            raise adapter.mismatch(name, shapes, " and ".join(str(list(t.shape)) for t in pair))
        parameter, (a, b) = match
        if parameter in parameters.setdefault(path, {}):
            raise adapter.mismatch(name, f"one pair of factors of {parameter}", "a second")
        scaling = adapter.scaling(name, a.shape[1], f"{path}.{parameter}")
        parameters[path][parameter] = Factors(a, b, scaling)
    stacks = [
        (renamed(path, "mlp", parent), names[projection], factors)
        for path, by_parameter in parameters.items()
        for projection, factors in split(experts[path], by_parameter).items()
    ]
    every = [*linears.values(), *(factors for _, _, factors in stacks)]
    rank = max(factors.a.shape[-2] for factors in every)
    scalings = Counter(factors.scaling for factors in every if factors.scaling) or Counter([0.0])
    setting = rank, scalings.most_common(1)[0][0]
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in linears.items():
        tensors |= _named(name, *factors.fitted(*setting))
    for path, projection, factors in stacks:
        for expert, pair in enumerate(zip(*factors.fitted(*setting), strict=True)):
            tensors |= _named(f"{path}.{expert}.{projection}", *pair)
    # SGLang asks by these names which layers an adapter has, whatever the keys of its tensors are.
    modules = {renamed(name, "mlp", parent) for name, _ in base.named_modules()}
    others = targets({name.partition(":")[0] for name in linears}, modules, 1)
    config = {"target_modules": sorted({*others, *PROJECTIONS}), "target_parameters": None}
    return {**settings({"": setting}), **config}, tensors


def _to_peft(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What of the config changes, and the factors by key, of an adapter with factors for each expert."""
    experts = experts_of(base)
    names, parent = served_names(base)
    projections = {**dict(zip(PROJECTIONS, PROJECTIONS, strict=True)), **{n: p for p, n in names.items()}}
    grouped: dict[str, dict[str, dict[int, str]]] = {}
    linears: dict[str, Factors] = {}
    places = {
        name: match
        for name in adapter.pairs
        if (match := re.fullmatch(r"(.+)\.(\d+)\.(\w+)", renamed(name, parent, "mlp")))
        and match[1] in experts
    }
    if not places:
        raise _without(adapter, "factors for each expert")
    for name in adapter.pairs:
        if name not in places:
            module = renamed(name, parent, "mlp")
            linears[module] = _linear(adapter, base, name, module)
            continue
        path, expert, alias = places[name].groups()
        projection = projections.get(alias, alias)
        if projection not in experts[path].projections:
            raise adapter.mismatch(name, f"one of the projections {', '.join(projections)}", alias)
        grouped.setdefault(path, {}).setdefault(projection, {})[int(expert)] = name

    every: dict[str, Factors] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, by_projection in grouped.items():
        stacks = {p: _stacked(adapter, experts[path], p, named) for p, named in by_projection.items()}
        for depth, (parameter, factors) in enumerate(reversed(join(experts[path], stacks).items())):
            every[f"{path}.{parameter}"] = factors = factors.padded(factors.rank)
            tensors |= _named(path + ".base_layer" * depth, *stack(factors))
    for name, factors in linears.items():
        every[_target(base, name)] = factors = factors.padded(max(factors.rank, 1))
        tensors |= _named(name, factors.a, factors.b)
    modules, parameters = dict(base.named_modules()), dict(base.named_parameters())
    config = {
        **settings({name: (factors.a.shape[-2], factors.scaling) for name, factors in every.items()}),
        "target_modules": sorted(targets(every.keys() & modules, modules, 1)),
        "target_parameters": sorted(targets(every.keys() & parameters, parameters, 2)),
    }
    return {**config, "peft_version": "0.20.0"} if _turns(adapter) else config, tensors


def _turns(adapter: Adapter) -> bool:
    """True if PEFT before 0.20 made the adapter, which took a weight's outputs for its inputs.

    PEFT notes its version since 0.18.
    """
    version = re.findall(r"\d+", adapter.config.get("peft_version") or "0.0")[:2]
    return [int(number) for number in version] < [0, 20]


def _stacked(adapter: Adapter, experts: Experts, projection: str, names: Mapping[int, str]) -> Factors:
    """One projection's factors of all experts, A ``[E, r, in]`` and B ``[E, out, r]``."""
    example = names[min(names)]
    n_in, n_out = experts.features(projection)
    rank = adapter.pairs[example][0].shape[0]
    scaling = adapter.scaling(example, rank, example)
    for expert in sorted({*names, *range(experts.number)}):
        name = names.get(expert, re.sub(r"\d+(?=\.\w+$)", str(expert), example))
        if expert not in names:
            raise adapter.mismatch(name, f"factors for each of {experts.number} experts", "none")
        if expert >= experts.number:
            raise adapter.mismatch(name, f"experts 0 to {experts.number - 1}", expert)
        a, b = adapter.pairs[name]
        if a.shape != (rank, n_in) or b.shape != (n_out, rank):
            expected = f"A [{rank}, {n_in}] and B [{n_out}, {rank}], the rank of all experts {rank}"
            raise adapter.mismatch(name, expected, f"{list(a.shape)} and {list(b.shape)}")
        if (other := adapter.scaling(name, rank, name)) != scaling:
            raise adapter.mismatch(name, f"alpha / r of all experts {scaling}", other)
    a, b = (torch.stack([adapter.pairs[names[e]][side] for e in range(experts.number)]) for side in (0, 1))
    return Factors(a, b, scaling)


def _without(adapter: Adapter, expected: str) -> ValueError:
    others = f"{len(adapter.pairs)} pairs of others, such as {next(iter(adapter.pairs), 'none')}"
    return error(adapter.directory / TENSORS, "experts", f"{expected} (or another layout=)", others)


def _linear(adapter: Adapter, base: torch.nn.Module, name: str, module: str) -> Factors:
    """The factors under ``name`` of what is no experts module, but ``module`` of the base model."""
    if module.partition(":")[0] not in dict(base.named_modules()):
        expected = f"a module of {type(base).__name__}"
        raise adapter.mismatch(name, expected, "none of that name (or pass model=)")
    a, b = adapter.pairs[name]
    return Factors(a, b, adapter.scaling(name, a.shape[0], _target(base, module)))


def _target(base: torch.nn.Module, name: str) -> str:
    """The name by which PEFT targets a module: of its parameter where it is no linear layer, as with routers."""
    module = name.partition(":")[0]
    layer = base.get_submodule(module)
    linear = hasattr(layer, "in_features") or hasattr(layer, "num_embeddings")
    return module if linear else f"{module}.weight"


def _targeted(adapter: Adapter, experts: Experts) -> list[str]:
    """The weights of a module that an adapter has by its config, in the order of the module."""
    ends = tuple(f".{target}" for target in adapter.config.get("target_parameters") or ())
    return [name for name in experts.parameters if f".{experts.path}.{name}".endswith(ends)]


def _check_targets(adapter: Adapter, base: torch.nn.Module, experts: Mapping[str, Experts]) -> None:
    """Raises ValueError where the adapter has another parameter of experts than their weights."""
    for target in adapter.config.get("target_parameters") or ():
        for name, _ in base.named_parameters():
            path, _, parameter = name.rpartition(".")
            if path in experts and f".{name}".endswith(f".{target}"):
                weights = experts[path].parameters
                if parameter not in weights:
                    file = adapter.directory / CONFIG
                    raise error(file, "target_parameters", f"of experts {' and '.join(weights)}", target)


def _named(name: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {tensor_key(name, "A"): a, tensor_key(name, "B"): b}
