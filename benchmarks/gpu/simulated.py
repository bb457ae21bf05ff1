"""A GPU that compiles and does nothing else, for a run where there is none."""

from __future__ import annotations

from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

DEVICE = "sm_90"


class _Driver:
    """The part of a driver that Triton uses before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> str:
    """Makes this process compile for the GPU; the name of its tile tables."""
    from scattermoe_lora.ops import tile_tables

    driver.set_active(_Driver())
    mock.patch.object(tile_tables, "table_of", return_value=DEVICE).start()
    return DEVICE
