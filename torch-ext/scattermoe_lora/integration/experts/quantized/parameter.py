"""A quantized stack of matrices as a tensor, so that it can be a module's parameter.

Models, optimizers, PEFT, checkpoints and the compiler take it for the dense weight that it stands for: it has that
weight's shape, dtype and device. It keeps codes and scales only, which move, copy and save with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ....ops.quantization.op import decode_experts
from ....ops.quantization.stack import QuantizedStack
from . import operators


class QuantizedWeight(torch.Tensor):
    """A stack of quantized matrices with the shape, dtype and device of the dense one: frozen, read by kernels.

    ``torch.nn.Parameter(QuantizedWeight(stack), requires_grad=False)`` is a module's parameter. It can be moved,
    copied, saved, loaded (``copy_`` from another of its format) and given another dtype, which changes what it decodes
    to and nothing that is kept. ``weight[e]`` decodes one matrix. Whatever else reads its numbers gets a dense copy of
    all of them, with a warning; whatever writes to it is an error.

    FSDP2 splits it along the experts, gathers codes and scales, and so needs no more memory or traffic than these.

    Args:
        stack: Codes, scales and format; or another quantized weight, of whose storage this is a parameter then, as
            accelerate makes parameters where it offloads.
        is_flat: Gives it one dimension, as FSDP2 looks at a parameter.
        requires_grad: Not so.

    Raises:
        ValueError: Dense numbers, or a gradient is asked for.
    """

    codes: torch.Tensor
    _layout: str
    _scale_dtypes: tuple[torch.dtype, ...]
    _is_flat: bool

    @staticmethod
    def __new__(
        cls, stack: QuantizedStack | QuantizedWeight, is_flat: bool = False, requires_grad: bool = False
    ) -> QuantizedWeight:
        _refuse_gradient(requires_grad)
        stack = _stack_of(stack)
        shape = [stack.shape.numel()] if is_flat else stack.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=stack.dtype, device=stack.device, requires_grad=False
        )

    def __init__(
        self, stack: QuantizedStack | QuantizedWeight, is_flat: bool = False, requires_grad: bool = False
    ) -> None:
        if isinstance(stack, QuantizedWeight):
            self._is_param = True
        stack = _stack_of(stack)
        self.codes = stack.codes
        self._is_flat = is_flat
        self._layout = str(stack.format)
        self._scale_dtypes = tuple(scale.dtype for scale in stack.scales)
        for name, scale in zip(self._scale_names(), stack.scales, strict=True):
            # Bytes, for torch pickles no float8 and knows few operators on it.
            setattr(self, name, scale.view(torch.uint8) if scale.itemsize == 1 else scale)

    def _scale_names(self) -> list[str]:
        return [f"scale{i}" for i in range(len(self._scale_dtypes))]

    @property
    def stack(self) -> QuantizedStack:
        """Codes, scales and format, of this tensor's own storage."""
        scales = [getattr(self, name) for name in self._scale_names()]
        typed = [
            scale if scale.dtype == dtype else scale.view(dtype)
            for scale, dtype in zip(scales, self._scale_dtypes, strict=True)
        ]
        return QuantizedStack.from_operands(self.codes, typed, self._layout, self.dtype)

    def dequantize(self) -> torch.Tensor:
        """The dense ``[E, N, K]`` in this tensor's dtype."""
        return self.decode().reshape(self.shape) if self._is_flat else self.decode()

    def decode(self, experts: Sequence[int] | None = None) -> torch.Tensor:
        """The dense matrices of some experts, or of all."""
        return decode_experts(*self.stack.operands(), self.dtype, experts)

    def map_tensors(
        self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
    ) -> QuantizedWeight:
        """The weight of what a function makes of codes and scales, which stands for ``dtype``."""
        names, (layout, old, *others) = self.__tensor_flatten__()
        inner = {name: function(getattr(self, name)) for name in names}
        return QuantizedWeight.__tensor_unflatten__(inner, (layout, dtype or old, *others), None, None)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        """Itself; ValueError where a gradient is asked for."""
        _refuse_gradient(requires_grad)
        return self

    def share_memory_(self) -> QuantizedWeight:
        """Itself, with codes and scales where other processes on this machine can read them."""
        for name in self.__tensor_flatten__()[0]:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.codes.is_shared()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            f"scattermoe: a quantized weight {list(self.shape)} is no array of numbers: call dequantize() on it. It "
            "cannot be offloaded to disk; to the CPU it can"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", *self._scale_names()], (
            self._layout,
            self.dtype,
            self._scale_dtypes,
            self._is_flat,
        )

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: tuple[Any, ...], size: Any, stride: Any
    ) -> QuantizedWeight:
        layout, dtype, scale_dtypes, is_flat = context
        scales = [inner[f"scale{i}"].view(scale_dtype) for i, scale_dtype in enumerate(scale_dtypes)]
        return QuantizedWeight(QuantizedStack.from_operands(inner["codes"], scales, layout, dtype), is_flat)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        names, context = self.__tensor_flatten__()
        inner = {name: getattr(self, name) for name in names}
        return _rebuild, (inner, context, isinstance(self, torch.nn.Parameter))

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Codes and scales to gather along their first dimension, and what they mean."""
        names, context = self.__tensor_flatten__()
        return tuple(getattr(self, name).contiguous() for name in names), context

    def fsdp_post_all_gather(
        self,
        outputs: tuple[torch.Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: QuantizedWeight | None = None,
    ) -> tuple[QuantizedWeight, tuple[torch.Tensor, ...]] | None:
        """The whole weight of what was gathered; ``out`` has been made of the same memory."""
        if out is not None:
            return None
        layout, _, *others = metadata
        inner = dict(zip(self.__tensor_flatten__()[0], outputs, strict=True))
        weight = QuantizedWeight.__tensor_unflatten__(inner, (layout, param_dtype, *others), None, None)
        return weight, outputs

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({list(self.shape)}, {self.dtype}, {self._layout}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return operators.run(cls, func, args, kwargs or {})


def _stack_of(value: QuantizedStack | QuantizedWeight) -> QuantizedStack:
    if isinstance(value, QuantizedWeight):
        return value.stack
    if isinstance(value, QuantizedStack):
        return value
    raise ValueError(f"scattermoe: a quantized weight: expected codes and scales, got {type(value).__name__}")


def _refuse_gradient(requires_grad: bool) -> None:
    if requires_grad:
        raise ValueError(
            "scattermoe: a quantized weight cannot be trained: leave requires_grad False and train LoRA on it "
            "(PEFT's target_parameters), or call dequantize_experts(model) first"
        )


def _set_data(weight: QuantizedWeight, value: torch.Tensor) -> None:
    if not isinstance(value, QuantizedWeight):
        operators.refuse_write("setting data", weight)
    torch.Tensor.data.__set__(weight, value)  # type: ignore[attr-defined]
    for name in (*value.__tensor_flatten__()[0], "_layout", "_scale_dtypes", "_is_flat"):
        setattr(weight, name, getattr(value, name))


# Set here, for properties in the class's body would hide what the type checker knows of torch's.
QuantizedWeight.requires_grad = property(  # type: ignore[assignment]
    lambda self: False, lambda self, requires_grad: _refuse_gradient(requires_grad)
)
QuantizedWeight.data = property(lambda self: self.detach(), _set_data)  # type: ignore[assignment]


def _rebuild(inner: Mapping[str, torch.Tensor], context: tuple[Any, ...], is_parameter: bool) -> torch.Tensor:
    weight = QuantizedWeight.__tensor_unflatten__(inner, context, None, None)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


# What torch.load and its weights_only=True may call.
torch.serialization.add_safe_globals([_rebuild])
