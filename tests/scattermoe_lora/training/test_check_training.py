"""What would train wrongly without an error is refused before the first step, and what is right is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_projections_towers import multimodal
from transformers import Trainer, TrainingArguments

IDS = torch.arange(2 * 12).view(2, 12) % 50
PACKED = {"input_ids": IDS, "labels": IDS, "position_ids": torch.arange(6).repeat(2, 2)}
# A picture's tokens among others', by time, height and width.
PLACES = torch.tensor(
    [[0, 1, 1, 1, 1, *range(3, 10)], [0, 1, 1, 2, 2, *range(3, 10)], [0, 1, 2, 1, 2, *range(3, 10)]]
)
PICTURE = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)} | {
    "position_ids": PLACES.unsqueeze(1).expand(-1, 2, -1)
}


def trainer(
    tmp_path: Any, batch: dict[str, Any] | None = None, model: Any = None, **settings: Any
) -> Trainer:
    """One whose only batch is ``batch``."""
    batch = batch or {"input_ids": IDS, "labels": IDS}
    arguments = TrainingArguments(tmp_path, use_cpu=True, remove_unused_columns=False, **settings)
    return Trainer(
        model or multimodal(), arguments, lambda _: dict(batch), [{"input_ids": ids} for ids in IDS]
    )


def test_text_alone_packed_or_accumulated_passes_and_draws_nothing(kernel, tmp_path) -> None:
    for batch, model, settings in (
        (None, None, {}),
        (PACKED, None, {"gradient_checkpointing": True}),
        (PACKED | {"attention_mask": torch.ones_like(IDS).tril()}, None, {}),
        (PICTURE, None, {}),
        (None, multimodal().eval(), {"gradient_accumulation_steps": 4}),
    ):
        checked = trainer(tmp_path, batch, model, **settings)
        checked.model_accepts_loss_kwargs = True  # Its loss heeds the number, whatever its class says.
        state = torch.get_rng_state()
        kernel.check_training(checked)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in checked.model.parameters())


def test_a_mask_of_ones_beside_packed_positions_is_refused(kernel, tmp_path) -> None:
    for length in (12, 11):  # The second has padding.
        mask = (torch.arange(12) < length).long().expand(2, -1)
        with pytest.raises(
            ValueError, match="attention_mask: expected none beside position_ids that begin again"
        ):
            kernel.check_training(trainer(tmp_path, PACKED | {"attention_mask": mask}))


def test_pictures_that_would_not_see_themselves_whole_are_refused(kernel, tmp_path) -> None:
    batch = {"input_ids": IDS, "labels": IDS, "pixel_values": torch.zeros(1)}
    kernel.check_training(trainer(tmp_path, batch))
    model = multimodal()
    model.config.text_config.use_bidirectional_attention = "vision"
    with pytest.raises(ValueError, match="mm_token_type_ids: expected beside pixel_values, got none"):
        kernel.check_training(trainer(tmp_path, batch, model))
    kernel.check_training(trainer(tmp_path, batch | {"mm_token_type_ids": torch.zeros_like(IDS)}, model))


def test_a_loss_that_accumulation_would_inflate_is_refused(kernel, tmp_path) -> None:
    model = multimodal()
    forward = model.forward
    model.forward = lambda *args, num_items_in_batch=None, **kwargs: forward(*args, **kwargs)
    checked = trainer(tmp_path, model=model, gradient_accumulation_steps=2)
    kernel.check_training(checked)  # The class says that its loss does not.
    checked.model_accepts_loss_kwargs = True
    with pytest.raises(ValueError, match="got one that ignores it, so that the logged loss"):
        kernel.check_training(checked)


def test_checkpointing_that_loses_shared_keys_or_fails_in_parallel_is_refused(
    kernel, tmp_path, monkeypatch
) -> None:
    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": True,
    }
    checked = trainer(tmp_path, **settings)
    kernel.check_training(checked)
    checked.model.config.text_config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="expected use_reentrant=False, got True, and 1 layers share"):
        kernel.check_training(checked)
    checked.model.config.text_config.num_kv_shared_layers = 0
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="got True, and DistributedDataParallel fails with it"):
        kernel.check_training(checked)


def test_towers_that_text_leaves_without_gradients_are_refused_in_parallel(
    kernel, tmp_path, monkeypatch
) -> None:
    checked = trainer(tmp_path, gradient_checkpointing=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"vision_tower\..*: trained, and a batch of text does not reach it"):
        kernel.check_training(checked)
    kernel.freeze_towers(checked.model)
    kernel.check_training(checked)
