"""Layers of Transformers that are compiled."""

import re
from typing import Any

import pytest
import torch
from test_parity import curve, write_texts
from torch._dynamo.utils import counters

from ringspan.train.activations import Activations
from ringspan.train.config import TrainConfig
from ringspan.train.huggingface_config import HuggingFaceConfig

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from test_huggingface_model import folder_of, of, run_all

from ringspan.train import huggingface_model
from ringspan.train.transformers_model import why_not_compiled


def run_compiled(plain: TrainConfig, config: TrainConfig) -> tuple[list[str], int]:
    """Which of torch.compile's backends were asked for, and how many graphs there were; all are run as they are."""
    asked, compile_with = [], torch.compile

    def compiled(function: Any, backend: str, **given: Any) -> Any:
        asked.append(backend)
        return compile_with(function, backend="eager", **given)

    run_all(plain)
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        run_all(config)
    return asked, counters["stats"]["unique_graphs"]


LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 9,
}


def test_compiled_layers_have_no_graph_break_and_the_same_losses(ranks, tmp_path):
    """Inductor takes a minute; what it is given is what counts here."""
    path = folder_of("Gemma3Text", tmp_path / "model", **LAYERS)
    text = write_texts(tmp_path / "text", 5, 90)
    plain, config = (of(tmp_path, f"run-{i}", text, path, pretrained=False, steps=2) for i in range(2))
    config.train.compile, config.train.activations = True, Activations.recompute
    ((asked, graphs),) = ranks(1)(run_compiled, plain, config, timeout=200)
    assert asked == ["eager", "inductor"]  # tried on three tokens first
    assert graphs == 2 * 2  # with a window and without one, each both times
    assert curve(config) == curve(plain)


def test_layers_of_many_models_are_one_graph_and_others_are_refused(tmp_path, monkeypatch):
    for kind in ("Llama", "Qwen3", "Mistral", "Mixtral"):
        model = huggingface_model.loaded(HuggingFaceConfig(path=folder_of(kind, tmp_path / kind), pretrained=False), 0)
        assert why_not_compiled(model) is None, kind
        assert not any("forward" in vars(layer) for layer in model.modules())

    def broken(self, x):
        torch._dynamo.graph_break()
        return x

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.MixtralExperts.forward", broken)
    assert re.match(r"torch\.compile cannot take a layer of it as one graph \(.+\)$", why_not_compiled(model))
