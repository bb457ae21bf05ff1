"""A language model's loss from its hidden states: the class's own forward, with a head that does not multiply."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from ...ops.linear_cross_entropy.api import linear_cross_entropy
from ..fused_classes import Forward, Part, Target
from . import heads, source, trl_head

# Of logits that are there, so many tokens' are float32 at a time.
_TOKENS = 256


class _Logits:
    """Logits that are not computed: hidden states, the head, and what the model's code does with its result.

    That is ``outer * tanh(scale * x)`` of the head's result ``x``, or ``scale * x`` with ``outer`` None.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: torch.nn.Module,
        scale: float = 1.0,
        outer: float | None = None,
        compute: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self.hidden, self.head, self.scale, self.outer = hidden, head, scale, outer
        self.device = hidden.device
        self._compute = compute or (lambda: head(hidden))
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        """The logits, as the model's code computes them; the same tensor each time."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def _then(self, step: Callable[[Any], Any], scale: float, outer: float | None) -> _Logits:
        # What is scaled or capped is a step on the way, of which nothing is kept.
        return _Logits(self.hidden, self.head, scale, outer, lambda: step(self._compute()))

    def __mul__(self, factor: float) -> _Logits:
        if self.outer is None:
            return self._then(lambda x: x * factor, self.scale * factor, None)
        return self._then(lambda x: x * factor, self.scale, self.outer * factor)

    def __truediv__(self, divisor: float) -> _Logits:
        if self.outer is None:
            return self._then(lambda x: x / divisor, self.scale / divisor, None)
        return self._then(lambda x: x / divisor, self.scale, self.outer / divisor)

    def contiguous(self) -> _Logits:
        return self

    def tanh(self) -> Any:
        return torch.tanh(self)  # type: ignore[arg-type]

    def float(self) -> _Logits:
        # A loss may take these, and the result the others.
        return _Logits(self.hidden, self.head, self.scale, self.outer, lambda: self.value().float())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tanh and args[0].outer is None:
            return args[0]._then(torch.tanh, args[0].scale, 1.0)
        return function(*(x.value() if isinstance(x, cls) else x for x in args), **(kwargs or {}))


class _Head:
    """A head that keeps what it is called with."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self, hidden: torch.Tensor) -> _Logits:
        return _Logits(hidden, self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Model:
    """A model as its own forward sees it: with that head, and a loss that takes what comes out of it."""

    def __init__(self, model: Any, head: str, skips: bool) -> None:
        self._model = model
        setattr(self, head, _Head(getattr(model, head)))
        self.loss_function = functools.partial(_loss if skips else _loss_of_logits, model.loss_function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _loss(
    plain: Callable[..., torch.Tensor], logits: _Logits, labels: Any, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    """As ``ForCausalLMLoss`` of transformers 5.22, which is ``plain``."""
    module: Any = logits.head
    is_sharded = heads.is_sharded(module) and not torch.compiler.is_compiling()
    head = heads.Head(module.weight, module.bias) if is_sharded else heads.read(module, logits.hidden.dtype)
    reason = head if isinstance(head, str) else _misfit(head, logits, vocab_size)
    if isinstance(head, str) or reason is not None:
        heads.log_once(f"loss: runs unfused: {reason}")
        return plain(logits=logits.value(), labels=labels, vocab_size=vocab_size, **kwargs)
    if not is_sharded:
        return _fused_loss(head, logits, logits.hidden, labels, **kwargs)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return _fused_loss(heads.Head(module.weight, module.bias), logits, hidden, labels, **kwargs)

    return heads.run_sharded(module, logits.hidden, run)


def _fused_loss(
    head: heads.Head, logits: _Logits, hidden: torch.Tensor, labels: Any, **kwargs: Any
) -> torch.Tensor:
    softcap = logits.outer
    result: Any = linear_cross_entropy(
        hidden,
        head.weight,
        _shifted(labels, hidden.shape[:-1], **kwargs).to(hidden.device),
        bias=head.bias,
        lora_a=head.lora_a,
        lora_b=head.lora_b,
        softcap=softcap,
        # The cap is divided out within it.
        logit_scale=logits.scale * (1.0 if softcap is None else softcap),
        ignore_index=kwargs.get("ignore_index", -100),
        num_items_in_batch=kwargs.get("num_items_in_batch"),
    )
    return result


def _loss_of_logits(
    plain: Callable[..., torch.Tensor], logits: _Logits, labels: Any, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    """As ``plain`` of logits that are returned, too; without gradients, in float32 for some tokens at a time."""
    value = logits.value()
    shifted = _shifted(labels, value.shape[:-1], **kwargs).to(value.device).flatten()
    if value.requires_grad or value.shape[-1] != vocab_size:
        return plain(logits=value, labels=labels, vocab_size=vocab_size, **kwargs)
    ignore_index = kwargs.get("ignore_index", -100)
    count = kwargs.get("num_items_in_batch")
    if count is None:
        count = (shifted != ignore_index).sum()
    parts = zip(value.flatten(0, -2).split(_TOKENS), shifted.split(_TOKENS), strict=True)
    total = sum(
        torch.nn.functional.cross_entropy(rows.float(), own, ignore_index=ignore_index, reduction="sum")
        for rows, own in parts
    )
    return torch.as_tensor(total / torch.as_tensor(count, device=value.device).clamp(min=1))


def _shifted(labels: Any, shape: torch.Size, **kwargs: Any) -> torch.Tensor:
    """The label of each token's successor, of the tokens' ``shape``."""
    shifted = kwargs.get("shift_labels")
    name = "labels" if shifted is None else "shift_labels"
    if shifted is None:
        shifted = torch.nn.functional.pad(labels, (0, 1), value=kwargs.get("ignore_index", -100))[..., 1:]
    if shifted.numel() != shape.numel():
        got = list((labels if name == "labels" else shifted).shape)
        raise ValueError(
            f"loss: {name}: expected one for each token that the head is given, {list(shape)}, got {got}"
        )
    return shifted.reshape(shape)


def _misfit(head: heads.Head, logits: _Logits, vocab_size: int) -> str | None:
    hidden, weight = logits.hidden, head.weight
    if weight.shape[0] != vocab_size:
        return f"the head has {weight.shape[0]} words, the loss {vocab_size}"
    if weight.device != hidden.device:
        return f"the head is on {weight.device}, its input on {hidden.device}"
    if not (isinstance(logits.scale, float | int) and isinstance(logits.outer, float | int | None)):
        return "the logits are multiplied by a tensor"
    if logits.outer is not None and logits.outer <= 0:
        return f"the logits are capped at {logits.outer}"
    return None


@functools.cache
def _fused_forward(plain: Forward) -> Forward:
    """The forward that stands for a class's own, ``plain``; the same object for the same one."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    place = list(inspect.signature(plain).parameters).index("labels") - 1

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get("labels")
        # accelerate keeps this function within a wrapper of its own, also when the class has its forward back.
        is_removed = type(self).forward is not forward
        head = _head_name(self)
        if is_removed or labels is None or head is None or self.loss_function is not ForCausalLMLoss:
            return plain(self, *args, **kwargs)
        skips = self.training if skip_logits is None else skip_logits
        output = plain(_Model(self, head, skips), *args, **kwargs)
        if isinstance(output, tuple):
            values = (_resolved(value, skips) for value in output)
            return tuple(value for value in values if value is not None)
        return type(output)(**{name: _resolved(value, skips) for name, value in output.items()})

    # Trainer reads from a forward's signature what to pass on. A mark of another wrapper's end, which accelerate looks
    # for when it takes its own away, this is not.
    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    del forward.__wrapped__
    forward.scattermoe_fused = True  # type: ignore[attr-defined]
    return forward


def _resolved(value: Any, skips: bool) -> Any:
    if not isinstance(value, _Logits):
        return value
    return None if skips else value.value()


def _targets(model: torch.nn.Module, named: bool) -> Iterator[Target]:
    # A model of transformers' has imported it.
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if named and _head_name(module) is None:
            if _has_other_head(module):
                _refuse(
                    name,
                    module,
                    "its head is another module's, and it computes its loss from that one's logits",
                )
            continue
        trl_target = trl_head.find(name, module)
        if trl_target is not None:
            yield trl_target
            if named:
                continue
        base: Any = next(cls for cls in type(module).__mro__ if _defines_forward(cls))
        if not named:  # To be undone, whatever became of the head and the loss since.
            if hasattr(type(module).forward, "scattermoe_fused"):
                yield Target(name, module, base, type(module).forward)
            continue
        reason = _obstacle(module, base)
        if reason is not None:
            _refuse(name, module, reason)
        yield Target(name, module, base, _fused_forward(base.forward))


def _refuse(name: str, module: torch.nn.Module, reason: str) -> NoReturn:
    raise NotImplementedError(
        f"apply_to: {name or type(module).__name__}: loss: {reason}; nothing was changed"
    )


def _has_other_head(model: Any) -> bool:
    """True of a model that computes a loss, whose head is a part of one of its parts."""
    has_labels = "labels" in inspect.signature(type(model).forward).parameters
    return has_labels and model.get_output_embeddings() is not None


def _head_name(model: Any) -> str | None:
    """The attribute of ``model`` that is its head; None where none is."""
    head = model.get_output_embeddings()
    return next((name for name, child in model._modules.items() if child is not None and child is head), None)


def _defines_forward(cls: type) -> bool:
    """True for a class with a forward that is not one of those made here."""
    own = vars(cls).get("forward")
    return own is not None and not hasattr(own, "scattermoe_fused")


def _obstacle(model: Any, base: Any) -> str | None:
    """The reason why a model's loss is not the one that is computed here; None if it is."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    reason = source.obstacle(base.forward, _head_name(model))
    if reason is None and model.loss_function is not ForCausalLMLoss:
        reason = f"its loss is {getattr(model.loss_function, '__name__', model.loss_function)}, not ForCausalLMLoss"
    return reason


PART = Part("loss", "a linear head whose logits its forward hands to its loss and its result alone", _targets)
"""``model(..., labels=...)`` of causal language models, from the hidden states: no logits are made.

The class's own forward runs, with a head that keeps its input, and :func:`~scattermoe_lora.linear_cross_entropy` takes
the place of ``ForCausalLMLoss``: the same shift, ``num_items_in_batch``, soft cap, scale and LoRA on the head. A result
has no ``logits`` in training; ``skip_logits=False`` asks for them, ``skip_logits=True`` leaves them out in evaluation.
A quantized head (bitsandbytes', transformers' float8, torchao's) is decoded a part at a time, and one that FSDP2 shards
is gathered by its hooks. One that is more than a linear layer (other hooks, other shards, quantized otherwise) runs as
it is, and one line of the log says why.
"""
