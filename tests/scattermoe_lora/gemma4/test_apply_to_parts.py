"""Parts of a model, chosen by name."""

from __future__ import annotations

import re

import pytest
import torch
from gemma4_models import build


def test_parts_are_applied_and_removed_by_name(kernel) -> None:
    model = build()
    assert kernel.apply_to(model, "attention") == model.config.num_hidden_layers
    assert kernel.remove_from(model, "attention") == model.config.num_hidden_layers
    assert kernel.remove_from(model, "attention") == 0


def test_a_part_of_another_name_is_refused_and_one_that_the_model_has_not_is_named(kernel) -> None:
    for run in (kernel.apply_to, kernel.remove_from):
        with pytest.raises(
            ValueError, match=re.escape(f"{run.__name__}: parts: expected some of 'attention'")
        ):
            run(build(), "attention", "head")
    needs = "layers of Gemma4TextAttention or Gemma4UnifiedTextAttention"
    message = f"apply_to: expected a model with {needs}, got a Linear without"
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.apply_to(torch.nn.Linear(2, 2), "attention")
