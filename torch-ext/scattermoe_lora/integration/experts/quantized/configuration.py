"""The configuration of quantized experts, which ``from_pretrained`` takes and ``config.json`` keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ....ops.quantization.encode import FORMATS

try:
    from transformers.quantizers.auto import AutoQuantizationConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"scattermoe: quantization in from_pretrained needs transformers 5.20 or later: {error}"
    ) from error

METHOD = "scattermoe"
"""The quantization method that ``config.json`` names."""


class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """The configuration that ``config.json`` keeps; :func:`.loading.quantization_config` makes one.

    Attributes:
        replaced: The classes of configuration and quantizer that another build registered before this one.

    Raises:
        ValueError: An unknown format; a string instead of a list of modules to skip.
    """

    replaced: ClassVar[list[Any] | None] = None

    def __init__(
        self,
        quant_type: str = "nf4",
        linears: QuantizationConfigMixin | dict[str, Any] | None = None,
        skip_modules: Sequence[str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_type not in FORMATS:
            raise ValueError(
                f"quantization_config: quant_type: expected one of {', '.join(FORMATS)}, got {quant_type!r}"
            )
        if isinstance(skip_modules, str):
            raise ValueError(
                f"quantization_config: skip_modules: expected a list of names, got the string {skip_modules!r}"
            )
        self.quant_method = quant_method
        self.quant_type = quant_type
        self.linears = AutoQuantizationConfig.from_dict(linears) if isinstance(linears, dict) else linears
        self.skip_modules = list(skip_modules or ())

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON has them."""
        linears = None if self.linears is None else self.linears.to_dict()
        return {**vars(self), "linears": linears}
