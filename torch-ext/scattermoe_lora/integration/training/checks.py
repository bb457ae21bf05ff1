"""Settings and batches that train wrongly without an error, found before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...ops.float8.weight import Float8Weight


def check_training(trainer: Any) -> None:
    """Refuses a ``Trainer`` whose first batch or settings would train wrongly without an error.

    ========================= =======================================================================================
    found                     what would happen
    ========================= =======================================================================================
    a mask beside packed      transformers reads a mask first, and the packed documents see each other
    ``position_ids``
    pictures without          in models whose pictures see themselves whole (``use_bidirectional_attention="vision"``)
    ``mm_token_type_ids``     they see backwards alone. Text alone needs none
    a loss that ignores       with accumulation, the loss and its gradient are as many times too large as batches are
    ``num_items_in_batch``    accumulated
    reentrant checkpointing   keys and values that layers share get no gradient; ``DistributedDataParallel`` fails
    weights in float8 without updates that are smaller than a step of float8 are rounded away
    ``optimizers=``
    trainable towers and text ``DistributedDataParallel`` waits for gradients that never come
    ========================= =======================================================================================

    It reads the first batch of ``trainer.get_train_dataloader()``, and with accumulation computes that batch's loss
    twice, without gradients.

    Args:
        trainer: A ``Trainer`` of transformers, or of TRL, with its model and arguments.

    Raises:
        ValueError: One of these; the message says how to mend it.
    """
    model, settings = trainer.model, trainer.args
    _check_optimizer(trainer)
    with torch.random.fork_rng():
        batch = next(iter(trainer.get_train_dataloader()))
    if not isinstance(batch, Mapping):  # Prompts, of which TRL's trainers make batches as they go.
        batch = {}
    _check_packing(batch)
    _check_pictures(model, batch)
    _check_checkpointing(model, settings)
    _check_towers(model, batch, settings)
    if settings.gradient_accumulation_steps > 1 and trainer.model_accepts_loss_kwargs and "labels" in batch:
        _check_accumulation(trainer, batch)


def _check_optimizer(trainer: Any) -> None:
    parameters = ((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
    trained = [name for name, parameter in parameters if isinstance(parameter, Float8Weight)]
    if trained and trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        raise ValueError(
            f"check_training: optimizers: expected one for weights in float8 such as {trained[0]}, got none, and "
            "Trainer's own loses updates that are smaller than a step of float8; give Trainer "
            "optimizers=(Adafactor(model.parameters()), None)"
        )


def _check_packing(batch: Mapping[str, Any]) -> None:
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or mask is None or mask.dim() != 2 or mask.shape[1] != positions.shape[-1]:
        return
    begins = positions[..., 1:] <= positions[..., :-1]
    if positions.dim() == 3:  # In time, height and width: a picture's tokens have one time.
        begins = positions[0, :, 1:] < positions[0, :, :-1]
    # Padding has positions as well, which may begin anywhere.
    begins = begins & mask[:, 1:].bool() & mask[:, :-1].bool()
    if bool(begins.any()):
        raise ValueError(
            "check_training: attention_mask: expected none beside position_ids that begin again, got one that "
            "has ones there, by which transformers takes the packed documents for one; leave it out, as "
            "DataCollatorWithFlattening does"
        )


def _check_pictures(model: Any, batch: Mapping[str, Any]) -> None:
    pictures = {"pixel_values", "pixel_values_videos"} & batch.keys()
    whole = getattr(model.config.get_text_config(), "use_bidirectional_attention", None) == "vision"
    if pictures and whole and batch.get("mm_token_type_ids") is None:
        raise ValueError(
            "check_training: mm_token_type_ids: expected beside pixel_values, got none: pictures would not see "
            "themselves whole; take what the processor returns, 1 where a token stands for a part of a picture"
        )


def _check_checkpointing(model: Any, settings: Any) -> None:
    reentrant = (settings.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if not (settings.gradient_checkpointing and reentrant):
        return
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    if shared or settings.world_size > 1:
        reason = (
            f"{shared} layers share keys and values" if shared else "DistributedDataParallel fails with it"
        )
        raise ValueError(
            f"check_training: gradient_checkpointing_kwargs: expected use_reentrant=False, got True, and {reason}"
        )


def _check_towers(model: torch.nn.Module, batch: Mapping[str, Any], settings: Any) -> None:
    from transformers import PreTrainedModel

    looks_for_unused = settings.ddp_find_unused_parameters
    if looks_for_unused is None:  # Trainer's own choice.
        looks_for_unused = not (
            isinstance(model, PreTrainedModel)
            and (settings.gradient_checkpointing or model.is_gradient_checkpointing)
        )
    if looks_for_unused or settings.world_size == 1:
        return
    if {"pixel_values", "pixel_values_videos", "input_features"} & batch.keys():
        return
    for composite in [module for module in model.modules() if "language_model" in module._modules]:
        text = {id(parameter) for parameter in composite.get_submodule("language_model").parameters()}
        for name, parameter in composite.named_parameters():
            if parameter.requires_grad and id(parameter) not in text:
                raise ValueError(
                    f"check_training: {name}: trained, and a batch of text does not reach it, for which "
                    "DistributedDataParallel waits; call freeze_towers(model)"
                )


def _check_accumulation(trainer: Any, batch: Mapping[str, Any]) -> None:
    """Asks the trainer for the batch's loss as if all accumulated batches had twice as many tokens."""
    inputs = trainer._prepare_inputs(batch)
    count = (inputs["labels"][..., 1:] != -100).sum()
    model = trainer.model
    was_training = model.training
    model.train()  # In evaluation bitsandbytes rewrites its weights for inference.
    losses = []
    with torch.no_grad(), torch.random.fork_rng(), trainer.compute_loss_context_manager():
        for items in (count, 2 * count):
            torch.manual_seed(0)  # Dropout draws alike.
            losses.append(float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)))
    model.train(was_training)
    if abs(losses[1] - losses[0] / 2) > 0.1 * abs(losses[0]):
        raise ValueError(
            f"check_training: {type(trainer.model).__name__}: expected a loss divided by num_items_in_batch, got one "
            "that ignores it, so that the logged loss and the gradients grow with gradient_accumulation_steps; set "
            "trainer.model_accepts_loss_kwargs = False"
        )
