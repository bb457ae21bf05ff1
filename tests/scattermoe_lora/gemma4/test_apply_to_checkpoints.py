"""Gradient checkpointing of a Gemma 4 model whose attention's norms and rotary embedding are fused."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import UserDict
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from gemma4_models import IDS, build, distance, step
from transformers.models.gemma4 import modeling_gemma4


@pytest.mark.parametrize("kind", ["shared", "k=v"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_what_it_gives_without(kernel, kind, reentrant) -> None:
    model = build(kind)
    kernel.apply_to(model, "attention")
    stored = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    lossy = reentrant and kind == "shared"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fused = step(model)
    kernel.remove_from(model)
    assert any("Reentrant gradient checkpointing loses" in str(warning.message) for warning in told) == lossy
    assert distance(fused, step(model)) < 1e-5
    if not lossy:
        assert all(torch.equal(f, s) for f, s in zip(fused, stored, strict=True))


class Watched(UserDict):
    """The dictionary of shared states, with weak references to every tensor that was put into any."""

    seen: ClassVar[list[weakref.ref]] = []

    def __setitem__(self, key: str, item: Any) -> None:
        super().__setitem__(key, item)
        if isinstance(item, list | tuple):
            self.seen.extend(weakref.ref(tensor) for tensor in item)

    @classmethod
    def alive(cls) -> int:
        return sum(reference() is not None for reference in cls.seen)


@pytest.fixture
def watched(monkeypatch) -> Iterator[type[Watched]]:
    """``Watched`` in the model's code, and no garbage collector: it would not run for a GPU's memory either."""
    monkeypatch.setattr(modeling_gemma4, "UserDict", Watched)
    Watched.seen = []
    gc.collect()
    gc.disable()
    yield Watched
    gc.enable()


def checkpointed(kernel: Any, kind: str) -> Any:
    model = build(kind)
    kernel.apply_to(model, "attention")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize(
    ("kind", "backward"),
    [("shared", "whole"), ("shared", "none"), ("shared", "upper layers"), ("dense", "none")],
)
def test_memory_of_shared_states_is_flat_over_checkpointed_steps(kernel, watched, kind, backward) -> None:
    model = checkpointed(kernel, kind)
    steps = 50 if backward != "upper layers" else 10
    top = [p for p in model.model.layers[-1].parameters() if p.requires_grad]
    bottom = [p for p in model.model.layers[1].parameters() if p.requires_grad]
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        # Between forward and backward the checkpoints of the layers that read them hold keys and values of both kinds.
        assert watched.alive() == (4 if kind == "shared" else 0)
        if backward == "whole":
            loss.backward()
            assert watched.alive() == 0
        elif backward == "upper layers":
            torch.autograd.grad(loss, top, retain_graph=True)
            torch.autograd.grad(loss, bottom)
        del loss
        assert watched.alive() == 0
    assert len(watched.seen) >= steps * 4


def test_a_checkpointed_graph_runs_backward_twice(kernel) -> None:
    model = checkpointed(kernel, "shared")
    once = step(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert distance(twice, [2 * g for g in once[1:]]) < 1e-6
