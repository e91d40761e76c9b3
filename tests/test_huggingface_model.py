"""model=hf: Transformers' models in our loop. Tiny ones, drawn at random."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_parity import curve, job, write_texts

from ringspan.train.huggingface_config import HuggingFaceConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from ringspan.train.huggingface import export  # noqa: E402
from ringspan.train.loop import Trainer, train  # noqa: E402
from ringspan.train.manifest import read_manifest  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def text(root):
    return write_texts(root / "text", 5, 90)


def run_all(configs):
    for config in configs:
        config.model.check(config)
        train(config, config.run_dir)


def newest(config):
    return sorted(Path(config.run_dir, "checkpoints").iterdir())[-1]


def test_a_llama_trains_as_the_gpt_does(root, text, ranks):
    """From the same weights: those of the GPT, exported, on one process and on meshes."""
    start = job(root, "start", text, steps=1)
    gpt = replace(job(root, "gpt", text, steps=4))
    ranks(1)(run_all, [start], timeout=200)
    export(newest(start), root / "llama", torch.float32)
    gpt.init = str(newest(start))
    def of(name, **given):
        config = job(root, name, text, steps=4, **given)
        config.model = HuggingFaceConfig(path=str(root / "llama"))
        return config
    ranks(1)(run_all, [gpt, of("hf")], timeout=200)
    print(curve(gpt), curve(of("hf")))
    for mesh in [(1,2,1),(2,1,1),(1,1,2)]:
        for zero in (0,1,2,3):
            c = of(f"hf-{mesh}-{zero}", mesh=mesh, zero=zero)
            ranks(2)(run_all, [c], timeout=200)
            print(mesh, zero, curve(c))
