"""The RMSNorms of models, whatever their class, run as one operator each, to the same bits."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gemma4_models import build, distance, step
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm


@pytest.fixture(scope="module")
def norm(kernel) -> Any:
    """``install(model)`` and ``remove(model)``."""
    part = "norm"
    return SimpleNamespace(
        install=lambda model: kernel.apply_to(model, part),
        remove=lambda model: kernel.remove_from(model, part),
        __name__=f"{kernel.__name__}.integration.norm.forward",
    )


def operators(run: Any) -> set[str]:
    """Names of the kernel's operators that ``run`` calls."""
    with torch.profiler.profile() as profile:
        run()
    names = (event.name.rpartition("::") for event in profile.events())
    return {name for namespace, _, name in names if "scattermoe" in namespace}


def test_a_gemma4_model_computes_the_same_loss_and_gradients_no_further_off(norm) -> None:
    plain = {dtype: step(build_equal(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_equal(dtype)
        assert norm.install(model) == norm.install(model) == 30
        loss, *gradients = step(model)
        assert torch.equal(loss, plain[dtype][0])
        exact = plain[torch.float64][1:]
        assert distance(gradients, exact) < 1.1 * distance(plain[dtype][1:], exact)
        assert norm.remove(model) == 30
        assert norm.remove(model) == 0
        assert all(torch.equal(a, b) for a, b in zip(step(model), plain[dtype], strict=True))


def build_equal(dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    return build("per layer", dtype)


@pytest.mark.parametrize("first", ["attention", "norm", "both"])
def test_norms_that_attention_fuses_with_the_rotary_embedding_stay_so(kernel, first) -> None:
    model = build("smallest")
    loss = step(model)[0]
    if first != "both":
        kernel.apply_to(model, first)
    kernel.apply_to(model, "attention", "norm")
    assert {"norm_rotary_forward", "rms_norm_forward"} <= operators(lambda: step(model))
    angles = torch.ones(1, 3, 16), torch.zeros(1, 3, 16)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        assert operators(lambda: attention(torch.randn(1, 3, 32), angles, None, {})) == {
            "norm_rotary_forward"
        }
    assert torch.equal(step(model)[0], loss)


CLASSES = [Gemma3RMSNorm, Gemma4RMSNorm, LlamaRMSNorm, NemotronHRMSNorm, torch.nn.RMSNorm]
UNWEIGHTED = functools.partial(Gemma4RMSNorm, with_scale=False)


@pytest.mark.parametrize("kind", [*CLASSES, UNWEIGHTED])
def test_any_class_of_one_of_the_formulas_runs_to_the_same_bits(norm, kind) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = kind(40, eps=1e-3)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        layer, x = layer.to(dtype), (torch.randn(2, 7, 40) * 0.1).to(dtype)
        plain = layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert norm.install(layer) == 1
        assert operators(lambda layer=layer, x=x: layer(x)) == {"rms_norm_forward"}
        assert torch.equal(layer(x), plain)
        # A changed setting counts.
        name = "variance_epsilon" if hasattr(layer, "variance_epsilon") else "eps"
        setattr(layer, name, 0.5)
        fused = layer(x)
        norm.remove(layer)
        assert torch.equal(fused, layer(x))
        assert not torch.equal(fused, plain)


def test_the_multimodal_embedders_norm_is_one_of_them(norm) -> None:
    tower, text = SimpleNamespace(hidden_size=12, rms_norm_eps=1e-6), SimpleNamespace(hidden_size=8)
    embedder, x = Gemma4MultimodalEmbedder(tower, text), torch.randn(3, 12)
    plain = embedder(x)
    assert norm.install(embedder) == 1
    assert torch.equal(embedder(x), plain)


def test_what_is_not_covered_runs_as_it_did_and_a_line_says_why(norm, caplog) -> None:
    replaced = LlamaRMSNorm(8)
    replaced.forward = lambda x: x
    others = [
        torch.nn.Softmax(dim=-1),
        torch.nn.Linear(8, 8),
        torch.nn.Embedding(8, 8),
        torch.nn.LayerNorm(8),
    ]
    model = torch.nn.ModuleList([T5LayerNorm(8), T5LayerNorm(8), replaced, *others])
    kinds = [type(module) for module in model]
    caplog.set_level(logging.INFO, norm.__name__)
    with pytest.raises(
        ValueError, match="apply_to: expected a model with RMSNorms, got a ModuleList without"
    ):
        norm.install(model)
    assert [type(module) for module in model] == kinds
    assert [record.getMessage() for record in caplog.records] == [
        "norm: 2 of T5LayerNorm (it computes none of the formulas of rms_norm) run as they are",
        "norm: 1 of LlamaRMSNorm (something else replaced its forward) run as they are",
    ]
    layer = Gemma4RMSNorm(8)
    norm.install(layer)
    assert operators(lambda: layer(torch.randn(2, 8, dtype=torch.float64))) == set()


def test_copies_run_fused_pickles_are_plain_and_it_compiles_as_one_graph(norm) -> None:
    torch._dynamo.reset()
    layer, x = Gemma4RMSNorm(24), torch.randn(3, 24)
    plain = layer(x)
    norm.install(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), compiled):
        assert torch.equal(other(hidden_states=x) if other is not compiled else other(x), plain)
    assert type(pickle.loads(pickle.dumps(layer))) is Gemma4RMSNorm
    assert type(copy.deepcopy(layer)) is type(layer)
