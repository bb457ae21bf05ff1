"""One MoE layer of Gemma 4 with PEFT LoRA, as each row of compare.py measures it, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
from measuring import (
    LAUNCHES,
    Alone,
    device_name,
    median_seconds,
    peak_memory,
    run_beside_others,
    start_memory,
)

if TYPE_CHECKING:
    import torch

RANK = 16
# The largest share by which a peer's results may differ from eager's in float64: room for bfloat16's rounding, not for
# an adapter that is left out or read in another order.
CLOSE = 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: experts, hidden, intermediate, top-k, tokens."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    dtype: str

    def flops(self) -> int:
        """Multiplications and additions of the base weights' products, forward and backward of a frozen base."""
        pairs = self.tokens * self.top_k
        return 2 * (2 * pairs * self.hidden * 3 * self.intermediate)

    def floor(self, dense_rate: float, memory_rate: float) -> float:
        """The least seconds of a step, which its products take or its weights: read once forward, once backward.

        Args:
            dense_rate: Multiplications and additions a second.
            memory_rate: Bytes a second that are read from memory.
        """
        import torch

        weights = self.experts * self.hidden * 3 * self.intermediate * getattr(torch, self.dtype).itemsize
        return max(self.flops() / dense_rate, 2 * weights / memory_rate)


# What a peer is compared with eager on before it is measured.
TINY = Shape(experts=8, hidden=64, intermediate=32, top_k=2, tokens=24, dtype="float32")


class Layer:
    """Experts with LoRA on both projections, and what goes through them; random, on torch's default device."""

    def __init__(self, shape: Shape, implementation: str) -> None:
        import torch
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import Gemma4TextConfig
        from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

        dtype = getattr(torch, shape.dtype)
        config = Gemma4TextConfig(
            num_experts=shape.experts,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            top_k_experts=shape.top_k,
            enable_moe_block=True,
        )
        config._experts_implementation = implementation
        module = torch.nn.Module()
        module.experts = Gemma4TextExperts(config).to(dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        lora = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            init_lora_weights=False,
        )
        self.module: Any = inject_adapter_in_model(lora, module)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
        self.index = torch.rand(shape.tokens, shape.experts).topk(shape.top_k).indices
        self.weights = torch.rand(shape.tokens, shape.top_k).to(dtype).requires_grad_()
        self.grad = torch.randn(shape.tokens, shape.hidden).to(dtype)

    def leaves(self) -> dict[str, torch.Tensor]:
        """The tensors that get a gradient, by name."""
        factors = {
            name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad
        }
        return {"x": self.x, "weights": self.weights, **factors}

    def forget(self) -> None:
        """Frees the gradients."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def results(self) -> dict[str, torch.Tensor]:
        """The output and every gradient, by name."""
        self.forget()
        output = self.module.experts(self.x, self.index, self.weights)
        output.backward(self.grad)
        grads = {}
        for name, leaf in self.leaves().items():
            assert leaf.grad is not None, f"{name} got no gradient"
            grads[f"gradient of {name}"] = leaf.grad
        return {"output": output.detach(), **grads}

    def copy_from(self, other: Layer) -> None:
        """Takes the values of a layer of the same sizes, on whatever device and in whatever dtype."""
        import torch

        self.module.load_state_dict(other.module.state_dict())
        with torch.no_grad():
            for name in ("x", "index", "weights", "grad"):
                getattr(self, name).copy_(getattr(other, name))


def differences(shape: Shape, install: Callable[[], str], device: str) -> tuple[str, dict[str, float]]:
    """Errors of a peer's results against eager's in float64: the norm of the difference over that of eager's, by name.

    ``install`` is what makes the peer take part in this process, and gives the name that it goes by from then on. It
    is called once eager is done, since a peer may replace eager for good.
    """
    import torch

    reference = Layer(replace(shape, dtype="float64"), "eager")
    expected = reference.results()
    implementation = install()
    with torch.device(device):
        layer = Layer(shape, implementation)
    layer.copy_from(reference)
    outputs = layer.results()
    errors = {
        name: float((outputs[name].to(value) - value).norm() / value.norm())
        for name, value in expected.items()
    }
    return implementation, errors


def measure(
    shape: Shape,
    implementation: str,
    device: str,
    unpacked: Path | None = None,
    alone: Alone = run_beside_others,
    steady: float = 3.0,
) -> dict[str, Any]:
    """Runs in the child: seconds, peak memory above the weights, and the dense rate and memory's of the same process.

    ``unpacked`` is where a peer was prepared (:func:`peers.prepare`), None for ours and transformers'. ``alone`` runs
    what is timed, for ``steady`` seconds or longer, when nothing else does.

    Raises:
        peers.PeerError: The peer computes something else than eager.
    """
    import torch
    from kernels import get_kernel

    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    if unpacked is None:
        get_kernel("org/scattermoe-lora", version=1).register()
    else:
        install = partial(peers.install, implementation, unpacked)
        implementation, errors = differences(replace(TINY, dtype=shape.dtype), install, device)
        # So that NaN is wrong too.
        wrong = [f"{name} is {error:.0%} off" for name, error in errors.items() if not error < CLOSE]
        if wrong:
            raise peers.PeerError(f"computes something else than eager: {', '.join(wrong)}")
    torch.set_default_device(device)
    layer = Layer(shape, implementation)

    def step() -> None:
        layer.forget()
        layer.module.experts(layer.x, layer.index, layer.weights).backward(layer.grad)

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        # Autotuners run in the first step, and neither their time nor their buffers are the layer's. Where others fill
        # the memory meanwhile, they run in the first step alone.
        with suppress(torch.OutOfMemoryError):
            step()
        layer.forget()
        finish()
        torch.cuda.empty_cache()

    def timed() -> tuple[float, int, int, float, float]:
        before = start_memory(device)
        seconds, repeats = median_seconds(step, finish, steady=steady, least=LAUNCHES[device])
        peak = peak_memory(device) - before
        # On a CPU a product takes a tenth of a second and more, which is not soon disturbed.
        side, products = (8192, 15) if device == "cuda" else (2048, 5)
        a = torch.randn(side, side).to(dtype)
        dense_seconds, _ = median_seconds(lambda: a @ a, finish, repeats=products)
        large = torch.ones(1 << (28 if device == "cuda" else 26))
        read_seconds, _ = median_seconds(large.sum, finish, repeats=15)
        return seconds, repeats, peak, 2 * side**3 / dense_seconds, large.nbytes / read_seconds

    seconds, repeats, peak, dense_rate, memory_rate = alone(timed)
    row = {
        "ms": 1000 * seconds,
        "repeats": repeats,
        "peak_bytes_above_weights": peak,
        "share_of_dense_rate": shape.flops() / seconds / dense_rate,
        "floor_ms": 1000 * shape.floor(dense_rate, memory_rate),
        "dense_gflops": dense_rate / 1e9,
        "memory_gbytes": memory_rate / 1e9,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
    return row if unpacked is None else {**row, "wheels": peers.versions(unpacked)}
