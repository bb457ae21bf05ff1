"""Log-probabilities for TRL's trainers: the forward that TRL gives a model, around this package's statistics."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch

from ...ops.linear_cross_entropy.api import token_statistics
from ...ops.linear_cross_entropy.arguments import Settings
from ..fused_classes import Target
from . import heads

# The global names of TRL's forward that stand for something else in ours: its function, and the question whether
# tokens without a label are left out.
_FUNCTION, _LEAVES_OUT = "_ChunkedLogProbFunction", "_use_triton"
_PARAMETERS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_RETURNED = {"log_probs", "entropy", "mean_logits", "is_top1"}


class _LogProbs:
    """Takes the place of TRL's ``ChunkedLogProbFunction``, of one model."""

    def __init__(self, model: Any, plain: Any) -> None:
        self._model, self._plain = model, plain

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """``[T]`` each: log-probability and entropy; None; mean of the logits, and whether none is above the label's.

        None for what TRL did not ask for. The last two have no gradient.
        """
        head = self._head(hidden, weight)
        if isinstance(head, str):
            heads.log_once(f"loss: runs as TRL has it: {head}")
            result: tuple[torch.Tensor | None, ...] = self._plain.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
            return result
        settings = Settings(
            scale=logit_scale / temperature,
            # TRL divides the capped logits: cap(x) / t is the cap c / t of x / t.
            softcap=0.0 if softcap is None else softcap / temperature,
            sums="mean_logits" in outputs,
            entropies="entropy" in outputs,
            peaks="is_top1" in outputs,
            pulls=False,
        )
        own = token_statistics(
            hidden, head.weight, targets, settings, bias=head.bias, lora_a=head.lora_a, lora_b=head.lora_b
        )
        mean = own.logit_sum.detach() / head.weight.shape[0] if settings.sums else None
        is_top1 = own.label_logit >= own.peak if settings.peaks else None
        entropy = own.entropy if settings.entropies else None
        return own.label_logit - own.lse, entropy, None, mean, is_top1

    def _head(self, hidden: torch.Tensor, weight: torch.Tensor) -> heads.Head | str:
        module = self._model.get_output_embeddings()
        # A copy of the model has the same function, but a head of its own.
        if weight is not module.weight:
            return "the head's weight is gathered, or the model was copied"
        head = heads.read(module, hidden.dtype)
        is_cast = torch.is_autocast_enabled(hidden.device.type)
        if not isinstance(head, str) and head.weight.dtype != hidden.dtype and not is_cast:
            return f"the head is {head.weight.dtype}, its input {hidden.dtype}"
        return head


def find(name: str, module: torch.nn.Module) -> TrlTarget | None:
    """The module as a target, where TRL's ``add_fused_lm_head`` or :meth:`TrlTarget.fuse` replaced its forward."""
    forward: Any = getattr(module.__dict__.get("forward"), "__func__", None)
    # Its __module__ is that of the forward which it wraps.
    is_there = isinstance(forward, types.FunctionType) and "fused_lm_head" in forward.__code__.co_varnames
    if not is_there or forward.__globals__.get("__name__") != "trl.trainer.utils":
        return None
    return TrlTarget(name, module, type(module), forward)


class TrlTarget(Target):
    """A model with TRL's fused head, ``forward`` the function that stands in its own forward's place."""

    @property
    def is_fused(self) -> bool:
        """True if the head's log-probabilities are those computed here."""
        return hasattr(self.forward, "scattermoe_plain")

    def check(self) -> None:
        """Refuse a head that returns what is not computed here, or of another version of TRL.

        Raises:
            NotImplementedError: It is one.
        """
        if self.is_fused:
            return
        function: Any = self.forward
        inner = function.__globals__.get(_FUNCTION)
        parameters = () if inner is None else tuple(inspect.signature(inner.forward).parameters)[1:]
        if parameters != _PARAMETERS or not {_FUNCTION, _LEAVES_OUT} <= set(function.__code__.co_names):
            self.refuse("loss: this TRL's fused head is another than that of TRL 1.16")
        outputs = inspect.getclosurevars(function).nonlocals["outputs"]
        others = [output for output in outputs if output not in _RETURNED]
        if others:
            self.refuse(
                f"loss: the trainer's fused head, which makes no logits either, returns {', '.join(others)}, too"
            )

    def fuse(self) -> None:
        """Gives the module TRL's forward with another function within. Where it has that, nothing is done."""
        if self.is_fused:
            return
        plain: Any = self.forward
        names = plain.__globals__ | {
            _FUNCTION: _LogProbs(self.module, plain.__globals__[_FUNCTION]),
            _LEAVES_OUT: lambda _device: True,
        }
        forward: Any = types.FunctionType(
            plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__
        )
        forward.__kwdefaults__ = plain.__kwdefaults__
        # With the signature that generate() reads, of the forward that TRL wraps.
        functools.update_wrapper(forward, plain).__wrapped__ = plain.__wrapped__
        forward.scattermoe_plain = plain
        self.module.forward = types.MethodType(forward, self.module)

    def check_removable(self) -> None:
        """Do nothing: a forward that something wrapped since then is not found."""

    def restore(self) -> None:
        """Undoes :meth:`fuse`."""
        plain: Any = self.forward
        self.module.forward = types.MethodType(plain.scattermoe_plain, self.module)
