"""Other projects' MoE layers with LoRA, from their wheels, as rows of compare.py.

Each row runs the code that its project runs for Gemma 4's experts under PEFT, and nothing else of the project:

``axolotl``
    ``scattermoe_lora``, which axolotl's plugin registers as experts implementation and as a patch of PEFT's
    ``ParamWrapper``. axolotl's own packages import its whole framework, so kernelpress makes a kernel of the folder
    and the kernels loader loads that. Its Triton kernels need a GPU; without one, Triton's interpreter runs them.
``unsloth``
    ``unsloth_zoo``'s patches of ``Gemma4TextExperts`` and of ``ParamWrapper``, on the backend that it chooses itself:
    torch's grouped matrix product on a GPU that has it, else a loop over the experts (so on a CPU, where it says
    little). ``unsloth`` itself would import trainers and quantizers that the layer does not use. That torch.compile
    then is run over the model, as Unsloth does on a GPU, is left out, as for every other row.
"""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

AXOLOTL = "axolotl.integrations.kernels.libs.scattermoe_lora"
# What AXOLOTL imports of axolotl beside itself.
AXOLOTL_INCLUDE = ("axolotl/utils/logging.py", "axolotl/utils/weight_conversions.py")


class PeerError(Exception):
    """A row that cannot be measured, and why."""


@dataclass(frozen=True)
class Peer:
    """The wheels of a project (as pip takes them), and how its row is made ready.

    ``prepare(unpacked)`` runs once, in the parent, on the folder that holds the wheels' contents; ``install(unpacked)``
    in each row's process, before a GPU is used, and gives the name of the experts implementation.
    """

    requirements: tuple[str, ...]
    prepare: Callable[[Path], object]
    install: Callable[[Path], str]


def _build_axolotl(unpacked: Path) -> None:
    from kernelpress.builder.build import build
    from kernelpress.spec.pyproject import load_project

    spec = load_project(
        unpacked, source_dir=unpacked.joinpath(*AXOLOTL.split(".")), package=AXOLOTL,
        name="axolotl-scattermoe-lora", license="Apache-2.0", include=AXOLOTL_INCLUDE,
    )  # fmt: skip
    build(spec)


def _install_axolotl(unpacked: Path) -> str:
    from kernels import get_local_kernel

    kernel = get_local_kernel(unpacked / "build")
    importlib.import_module(f"{kernel.__name__}.experts").register_scattermoe_experts()
    return "scattermoe"


def _install_unsloth(unpacked: Path) -> str:
    # What importing `unsloth` sets before it imports `unsloth_zoo`, which refuses to be imported without.
    os.environ["UNSLOTH_IS_PRESENT"] = "1"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(unpacked / "unsloth_compiled_cache")
    sys.path.insert(0, str(unpacked))
    importlib.import_module("unsloth_zoo.temporary_patches.gemma4_moe").patch_gemma4_moe()
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    if not getattr(Gemma4TextExperts, "_unsloth_already_patched", False):
        raise PeerError("unsloth_zoo does not know this transformers' Gemma4TextExperts")
    # Its forward takes the place of the class's, before any experts implementation is looked up.
    return "eager"


PEERS = {
    "axolotl": Peer(("axolotl==0.19.0",), _build_axolotl, _install_axolotl),
    "unsloth": Peer(("unsloth_zoo==2026.10.9", "unsloth==2026.10.9"), lambda _: None, _install_unsloth),
}


def how_to_get(names: Sequence[str]) -> str:
    """The command that downloads what the rows ``names`` need."""
    requirements = " ".join(requirement for name in names for requirement in PEERS[name].requirements)
    return f"pip download --no-deps --only-binary=:all: --dest wheels {requirements}"


def find_wheels(name: str, folder: Path | None) -> tuple[Path, ...] | None:
    """The wheels of a row in ``folder``, of any version; None where one is missing."""
    matches = []
    for requirement in PEERS[name].requirements:
        project = requirement.partition("==")[0]
        wheels = sorted(folder.glob(f"{project}-*.whl")) if folder else []
        if not wheels:
            return None
        if len(wheels) > 1:
            raise PeerError(f"{folder} holds {len(wheels)} wheels of {project}; leave one")
        matches.extend(wheels)
    return tuple(matches)


def prepare(name: str, wheels: Sequence[Path], scratch: Path) -> Path:
    """Makes ``name`` ready to be installed by any number of processes; the folder that :func:`install` takes.

    Raises:
        PeerError: The wheels are not what this module knows.
    """
    unpacked = scratch / name
    try:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        PEERS[name].prepare(unpacked)
    except Exception as error:
        # A wheel of another version may fail anywhere, in its own code or in the build; the other rows still run.
        raise PeerError(f"{', '.join(wheel.name for wheel in wheels)}: {error}") from error
    return unpacked


def versions(unpacked: Path) -> list[str]:
    """Names and versions of the wheels in a folder that :func:`prepare` made."""
    return sorted(path.stem for path in unpacked.glob("*.dist-info"))


def install(name: str, unpacked: Path) -> str:
    """Makes the row's code take part in this process, for good; the experts implementation that selects it."""
    return PEERS[name].install(unpacked)
