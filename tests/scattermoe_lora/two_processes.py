"""Five parallel set-ups on two real processes, each held to the gradients of one process.

python two_processes.py FOLDER      (LOCAL_KERNELS names the built kernel)
"""

from __future__ import annotations

import copy
import gc
import importlib
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from kernels import get_kernel
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

PROCESSES = 2
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
# The plain layout, and the one with biases, transposed weights and a clamped gate.
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4),
}
IDS = torch.arange(4 * 13).view(4, 13) * 7 % 64


def build(name: str, adapted: bool, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    model.set_experts_implementation("scattermoe")
    return adapt(model, **settings) if adapted else model


def adapt(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_parameters=targets, **settings)
    return inject_adapter_in_model(lora, model)


def merge(model: Any, back: bool = False) -> None:
    """Merges the adapters, each process its part, or takes them out again."""
    for module in list(model.modules()):
        if hasattr(module, "parameter_name"):
            module.unmerge() if back else module.merge(safe_merge=True)


def train(model: Any, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the mean of the batches' losses, by parameter."""
    for ids in batches:
        (model(input_ids=ids, labels=ids).loss / len(batches)).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return gradients


def assert_equal(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], part: str = "experts") -> None:
    assert got.keys() == exact.keys(), got.keys() ^ exact.keys()
    assert any(part in name for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, exact[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def ddp(rank: int, folder: Path) -> None:
    for adapted in (True, False):
        exact = train(build("qwen3_moe", adapted), [IDS[:2], IDS[2:]])
        model = DistributedDataParallel(build("qwen3_moe", adapted))
        got = train(model, [IDS[2 * rank : 2 * rank + 2]])
        assert_equal({name.removeprefix("module."): g for name, g in got.items()}, exact)


def fsdp(rank: int, folder: Path) -> None:
    for name, adapted, settings in (
        ("qwen3_moe", True, {}),
        ("gpt_oss", True, {}),
        ("gpt_oss", False, {}),
        ("gpt_oss", True, {"use_dora": True}),
    ):
        exact = train(build(name, adapted, **settings), [IDS[:2], IDS[2:]])
        model = build(name, adapted, **settings)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert_equal(train(model, [IDS[2 * rank : 2 * rank + 2]]), exact)

    # Around the experts below the adapters' wrappers, as a policy that goes by classes' names has it. PEFT alone adds a
    # plain tensor to a part of a weight there.
    exact = train(build("qwen3_moe", adapted=True), [IDS[:2], IDS[2:]])
    model = build("qwen3_moe", adapted=True)
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts.get_base_layer())
        fully_shard(layer)
    fully_shard(model)
    assert_equal(train(model, [IDS[2 * rank : 2 * rank + 2]]), exact)


def expert_parallel(rank: int, folder: Path) -> None:
    # Both ways that transformers has: all tokens on both processes, each expert's owner computing (sentinels mark the
    # pairs of the other's experts); and tokens sent to the experts' owners.
    sentinels = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    for name, plan, settings in (
        ("qwen3_moe", sentinels, {}),
        ("qwen3_moe", None, {}),
        ("gpt_oss", None, {}),
        ("qwen3_moe", sentinels, {"use_dora": True}),
        ("gpt_oss", None, {"lora_bias": True}),
    ):
        whole = build(name, adapted=False)
        if rank == 0:
            whole.save_pretrained(folder / name)
        dist.barrier()
        config = DistributedConfig(tp_size=PROCESSES, tp_plan={}, ep_size=PROCESSES, ep_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, distributed_config=config, experts_implementation="scattermoe"
        )
        experts = [m for m in model.modules() if hasattr(m, "has_gate")]
        assert all(m._is_expert_parallel and m.num_experts == 2 for m in experts)
        assert_equal(train(model, [IDS]), train(whole, [IDS]))
        # transformers and PEFT alone cannot do this: PEFT adds a plain tensor to a part of a weight.
        for each in (whole, model):
            each.zero_grad()
            adapt(each, **settings)
        got = train(model, [IDS])
        assert_equal(got, train(whole, [IDS]))
        assert len(got) == 2 * 2 * (3 if settings else 2)
        torch.testing.assert_close(decoded(model), decoded(whole), rtol=1e-4, atol=1e-5)
        if settings:
            with pytest.raises(NotImplementedError, match="are not merged into weights that are split"):
                merge(model)
        else:
            merge(model)
            torch.testing.assert_close(decoded(model), decoded(whole), rtol=1e-4, atol=1e-5)
            merge(model, back=True)
            assert_equal(train(model, [IDS]), train(whole, [IDS]))

    # Where each process has a batch of its own, it is for nobody to say how often the gradients are averaged.
    apart = DistributedConfig(fsdp_size=PROCESSES, ep_size=PROCESSES)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "qwen3_moe", distributed_config=apart, experts_implementation="scattermoe"
    )
    with pytest.raises(NotImplementedError, match="got ep_size=2 with tp_size=1"):
        adapt(model)(input_ids=IDS)


def quantized(rank: int, folder: Path) -> None:
    warnings.filterwarnings("error", message=".*decodes all of it")
    kernel = get_kernel("org/scattermoe-lora", version=1)

    def quantize(model: Any, format: str) -> Any:
        kernel.quantize_experts(model, format)
        return adapt(model)

    for name, format in (("qwen3_moe", "nf4"), ("gpt_oss", "fp8")):
        whole = quantize(build(name, adapted=False), format)
        model = copy.deepcopy(whole)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        exact = train(whole, [IDS[:2], IDS[2:]])
        for _ in range(2):
            model.zero_grad()
            assert_equal(train(model, [IDS[2 * rank : 2 * rank + 2]]), exact)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            for key, parameter in whole.named_parameters():
                if hasattr(parameter, "codes"):
                    assert torch.equal(state[key].codes, parameter.codes), key
        plain = build(name, adapted=False)
        fully_shard(plain)
        with pytest.raises(NotImplementedError, match="split by FSDP2; quantize before fully_shard"):
            kernel.quantize_experts(plain)

        with pytest.raises(NotImplementedError, match="split by FSDP2; dequantize before fully_shard"):
            kernel.dequantize_experts(model)
        with pytest.raises(
            NotImplementedError, match="not merged into quantized experts that FSDP2 has split"
        ):
            merge(model)

    # Each process begins with other weights, and DistributedDataParallel gives it those of the first.
    whole = quantize(build("qwen3_moe", adapted=False), "nf4")
    model = build("qwen3_moe", adapted=False)
    if rank:
        torch.nn.init.normal_(model.model.layers[0].mlp.experts.down_proj)
    got = train(DistributedDataParallel(quantize(model, "nf4")), [IDS[2 * rank : 2 * rank + 2]])
    assert_equal(
        {name.removeprefix("module."): g for name, g in got.items()}, train(whole, [IDS[:2], IDS[2:]])
    )

    def load(path: Path, **settings: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation="scattermoe", **settings
        )

    whole = build("qwen3_moe", adapted=False)
    kernel.quantize_experts(whole, "nf4")
    exact = decoded(whole)
    nf4 = kernel.quantization_config("nf4")
    for kind, settings in (
        ("ep", {"tp_size": PROCESSES, "tp_plan": {}, "ep_size": PROCESSES}),
        ("fsdp", {"fsdp_size": PROCESSES}),
    ):
        config = DistributedConfig(**settings)
        # Quantized as it is read, saved whole, and read again in parts and whole.
        model = load(folder / "qwen3_moe", distributed_config=config, quantization_config=nf4)
        model.save_pretrained(folder / f"quantized {kind}", is_main_process=rank == 0)
        again = load(folder / f"quantized {kind}", distributed_config=config)
        for parts in (model, again, load(folder / f"quantized {kind}")):
            torch.testing.assert_close(decoded(parts), exact, rtol=1e-4, atol=1e-5)
        if kind == "ep":
            with pytest.raises(ValueError, match="already quantized"):
                kernel.quantize_experts(model)
            one = adapt(copy.deepcopy(whole))
            assert_equal(train(adapt(model), [IDS]), train(one, [IDS]))
            merge(model)
            torch.testing.assert_close(decoded(model), decoded(one), rtol=1e-4, atol=1e-5)
            kernel.dequantize_experts(again)
            assert not any(
                hasattr(p.to_local(), "codes") for p in again.parameters() if isinstance(p, DTensor)
            )
            torch.testing.assert_close(decoded(again), exact, rtol=1e-4, atol=1e-5)

    # The same by hand: whole models that are quantized and then split, and split ones that are quantized.
    model = load(folder / "qwen3_moe")
    kernel.quantize_experts(model, "nf4")
    fully_shard(model)
    model.save_pretrained(folder / "by hand", is_main_process=rank == 0)
    dist.barrier()
    torch.testing.assert_close(decoded(load(folder / "by hand")), exact, rtol=1e-4, atol=1e-5)
    config = DistributedConfig(tp_size=PROCESSES, tp_plan={}, ep_size=PROCESSES)
    model = load(folder / "qwen3_moe", distributed_config=config)
    kernel.quantize_experts(model, "nf4")
    torch.testing.assert_close(decoded(model), exact, rtol=1e-4, atol=1e-5)


def loss(rank: int, folder: Path) -> None:
    kernel = get_kernel("org/scattermoe-lora", version=1)
    sizes = {**SIZES, "num_hidden_layers": 1}
    del sizes["num_experts_per_tok"]

    def llama(tied: bool, fused: bool) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if fused:
            kernel.apply_to(model, "loss")
        return model.train()

    def sharded(model: Any, head: bool) -> Any:
        if head:
            fully_shard(model.lm_head)
        return fully_shard(model)

    heads = importlib.import_module(f"{kernel.__name__}.integration.loss.heads")
    for wrap, tied in (
        (DistributedDataParallel, True),
        (partial(sharded, head=False), True),
        (partial(sharded, head=True), False),
    ):
        exact = train(llama(tied, False), [IDS[:2], IDS[2:]])
        model = wrap(llama(tied, True))
        for _ in range(2):
            model.zero_grad()
            got = train(model, [IDS[2 * rank : 2 * rank + 2]])
            assert_equal(
                {name.removeprefix("module."): g for name, g in got.items()},
                exact,
                "layers" if tied else "lm_head",
            )
        assert model(input_ids=IDS, labels=IDS).logits is None
        model.eval()
        assert model(input_ids=IDS, labels=IDS).logits.shape == (4, 13, 64)
    assert not heads._logged


def float8(rank: int, folder: Path) -> None:
    kernel = get_kernel("org/scattermoe-lora", version=1)
    for name in ("qwen3_moe", "gpt_oss"):
        whole = build(name, adapted=False)
        kernel.train_in_float8(whole)
        model = copy.deepcopy(whole)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        models = {"whole": whole, "parts": model}
        optimizers = {key: kernel.Adafactor(each.parameters(), lr=1e-3) for key, each in models.items()}
        originals = {key: p.detach().dequantize().clone() for key, p in whole.named_parameters()}
        train(whole, [IDS[:2], IDS[2:]])
        train(model, [IDS[2 * rank : 2 * rank + 2]] * 2)
        norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0) for each in models.values()]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=0.02, atol=0)
        for key, parameter in model.named_parameters():
            local, exact = parameter.grad._local_tensor, whole.get_parameter(key).grad.dequantize()
            assert hasattr(local, "codes") == (parameter.dim() > 1), key
            got = parameter.grad.full_tensor().dequantize().view(exact.shape)
            # Both were rounded twice, by less than a quarter and 0.1 in the mean of squares.
            assert (got - exact).norm() <= 0.25 * exact.norm(), key
        for optimizer in optimizers.values():
            optimizer.step()
        for key, parameter in model.named_parameters():
            got, exact = parameter.detach().full_tensor(), whole.get_parameter(key).detach()
            assert hasattr(got, "codes") == hasattr(exact, "codes"), key
            moved = [each.dequantize().view(exact.shape) - originals[key] for each in (got, exact)]
            assert abs(moved[0].norm() / moved[1].norm() - 1) < 0.2, key
        # Columns are those of the whole matrix on each process, rows of its part.
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        moments = [
            o.state[m.get_parameter(q_proj)]
            for o, m in zip(optimizers.values(), models.values(), strict=True)
        ]
        torch.testing.assert_close(moments[1]["columns"], moments[0]["columns"], rtol=0.5, atol=0)
        part = moments[0]["rows"].chunk(PROCESSES, 1)[rank]
        torch.testing.assert_close(moments[1]["rows"], part, rtol=0.5, atol=0)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            gathered = dict(state)
            whole.load_state_dict(state)
            for key, parameter in whole.named_parameters():
                exact = gathered[key].dequantize().view(parameter.shape)
                torch.testing.assert_close(parameter.detach().dequantize(), exact, rtol=1 / 16, atol=1e-4)
        with pytest.raises(
            NotImplementedError, match="split over processes already; convert before fully_shard"
        ):
            kernel.train_in_float8(fully_shard(build(name, adapted=False)))

    # Copies that DistributedDataParallel holds begin and stay alike, though each process draws its own random numbers.
    whole, model = (build("qwen3_moe", adapted=False) for _ in range(2))
    if rank:
        torch.nn.init.normal_(model.model.layers[0].mlp.experts.down_proj)
    for replica in (whole, model):
        kernel.train_in_float8(replica)
    exact = train(whole, [IDS[:2], IDS[2:]])
    model = DistributedDataParallel(model)
    torch.manual_seed(rank)
    for kind in (kernel.Adafactor, partial(kernel.Float8Optimizer, torch.optim.AdamW)):
        optimizer = kind(model.parameters(), lr=1e-3)
        got = train(model, [IDS[2 * rank : 2 * rank + 2]])
        if kind is kernel.Adafactor:
            for key, gradient in exact.items():
                off = got[f"module.{key}"].sub(gradient)
                assert off.norm() <= 0.25 * torch.linalg.vector_norm(gradient), key
        optimizer.step()
        optimizer.zero_grad()
    for key, parameter in model.named_parameters():
        numbers = parameter.codes if hasattr(parameter, "codes") else parameter.detach()
        of_first = numbers.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(numbers, of_first), key

    config = DistributedConfig(tp_size=PROCESSES, tp_plan={}, ep_size=PROCESSES)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "qwen3_moe", distributed_config=config, experts_implementation="scattermoe"
    )
    with pytest.raises(NotImplementedError, match="tensor and expert parallelism are not supported"):
        kernel.train_in_float8(model)
    mesh = dist.init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("copies", "parts"))
    hybrid = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
    with pytest.raises(NotImplementedError, match="split along their first dimension alone"):
        kernel.Adafactor(hybrid.parameters())


def decoded(model: Any) -> torch.Tensor:
    """Logits of one more token, where few experts get anything to do."""
    with torch.no_grad():
        return model(input_ids=IDS[:1, :1]).logits


def main(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    get_kernel("org/scattermoe-lora", version=1).register()
    for check in (ddp, fsdp, expert_parallel, quantized, loss, float8):
        check(rank, folder)
        print(f"{check.__name__}: equal to one process\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked after the imports, which take longer than the checks; nothing has computed yet. To look through what was
    # imported for garbage would copy it into each process.
    gc.freeze()
    torch.multiprocessing.start_processes(main, (Path(sys.argv[1]),), nprocs=PROCESSES, start_method="fork")
