"""Models of Transformers in generation and evaluation, against their own eager forward."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import exit_code
from test_parity import write_texts
from torch import Tensor
from torch.nn.functional import cross_entropy

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train.config import TrainConfig
from ringspan.train.data import prepare
from ringspan.train.generate import Generator, Sampling, pick
from ringspan.train.hub import is_name
from ringspan.train.huggingface import export
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.long_context import EvaluateConfig, evaluate
from ringspan.train.measured import Measured
from ringspan.train.packing import IGNORE
from ringspan.train.pretrained import find_model, load_model
from ringspan.train.rows import Text

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from test_huggingface_model import DEEPSEEK, folder_of, newest, of, run_all  # noqa: E402

from ringspan.train import huggingface_model  # noqa: E402

SAMPLING = Sampling(temperature=1.0, seed=3)
PROMPTS = [[5, 9, 2] * 7, [7], list(range(30))]
# Windows, softcaps, sinks, experts, positions that are learned, dropout that is training's
FOLDERS = {
    "Gemma2": {"sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "GptOss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 2},  # sinks
    "GPT2": {},  # learned positions
    "DeepseekV3": DEEPSEEK,  # values narrower than keys
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Models whose numbers are so large that what they say depends on all of them."""
    root = tmp_path_factory.mktemp("models")
    for kind, fields in FOLDERS.items():
        path = folder_of(kind, root / kind, **fields)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15 if p.dim() > 1 else 0.7)
        model.save_pretrained(path)
    return [str(root / kind) for kind in FOLDERS]


def written(ranks: int, n: int, *paths: str) -> list[Tensor]:
    """Of each model (prompts, n) tokens."""
    mesh, found = Mesh.create(1, ranks, 1), []
    for one in map(find_model, map(Path, paths)):
        attend = SequenceAttention(mesh, "balanced")
        model = load_model(one, attend, torch.device("cpu"), torch.float32, 64, 200, losses=False)
        found.append(torch.stack(list(Generator(model, mesh)(PROMPTS, n, SAMPLING)), dim=1))
    return found


@torch.no_grad()
def eager(model: "transformers.PreTrainedModel", n: int) -> Tensor:
    """The same from whole rows, over all that there is so far."""
    length, draws = max(map(len, PROMPTS)), torch.Generator().manual_seed(SAMPLING.seed)
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    model.eval().set_attn_implementation("eager")
    for _ in range(n):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, pick(logits, SAMPLING, draws)[:, None]], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids[:, length:]


def test_tokens_on_a_ring_are_those_of_eager(folders, ranks):
    expected = [eager(transformers.AutoModelForCausalLM.from_pretrained(path), 7) for path in folders]
    for found in ranks(2)(written, 2, 7, *folders):
        for tokens, wanted, path in zip(found, expected, folders, strict=True):
            assert len(set(wanted.flatten().tolist())) > 9, path
            assert torch.equal(tokens, wanted), path


@pytest.fixture(scope="module")
def run(tmp_path_factory, ranks) -> TrainConfig:
    """Adapters in a Mistral with a window, after two steps."""
    root = tmp_path_factory.mktemp("run")
    text, path = write_texts(root / "text", 20, 400), folder_of("Mistral", root / "model", sliding_window=9)
    config = of(root, "adapted", text, path, lora=3, pretrained=False, steps=2)
    config.data.held_out, config.optim.lr, config.optim.warmup_steps = 0.3, 1.0, 1
    ranks(1)(run_all, config, timeout=200)
    return config


@pytest.fixture(scope="module")
def adapted(run, tmp_path_factory) -> "transformers.PreTrainedModel":
    """What of it peft makes."""
    folder = tmp_path_factory.mktemp("export") / "adapters"
    export(newest(run), folder, torch.float32)
    base = huggingface_model.loaded(replace(run.model, lora=None), run.seed)
    return peft.PeftModel.from_pretrained(base, folder).merge_and_unload()


def test_adapters_write_from_their_checkpoint_what_peft_makes_of_them(run, adapted, ranks):
    plain = eager(huggingface_model.loaded(replace(run.model, lora=None), run.seed), 5)
    expected = eager(adapted, 5)
    assert not torch.equal(expected, plain)
    for (found,) in ranks(2)(written, 2, 5, run.run_dir):
        assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def named(tmp_path_factory, folders) -> tuple[Path, Path, str]:
    """A hub's cache that has a Mistral alone, peft's adapters of it, and what both are together."""
    root = tmp_path_factory.mktemp("named")
    hub = root / "hub" / "models--me--tiny"
    snapshot = hub / "snapshots" / "0123abc"
    config = transformers.AutoConfig.from_pretrained(folder_of("Mistral", snapshot, sliding_window=9))
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123abc")
    both = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    both.peft_config["default"].base_model_name_or_path = "me/tiny"
    both.save_pretrained(root / "adapters")
    both.merge_and_unload().save_pretrained(root / "merged")
    return root / "hub", root / "adapters", str(root / "merged")


@contextmanager
def offline(hub: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def written_offline(hub: Path, *names: str) -> list[Tensor]:
    with offline(hub):
        return written(2, 5, *names)


def test_names_on_the_hub_and_adapters_of_them_write_what_the_whole_models_do(named, ranks):
    hub, adapters, merged = named
    paths = (str(hub / "models--me--tiny" / "snapshots" / "0123abc"), merged)
    expected = [eager(transformers.AutoModelForCausalLM.from_pretrained(path), 5) for path in paths]
    assert not torch.equal(*expected)
    for found in ranks(2)(written_offline, hub, "me/tiny", str(adapters)):
        assert [*map(torch.equal, found, expected)] == [True, True]


def test_adapters_are_merged_into_the_model_that_training_starts_from(named):
    hub, adapters, merged = named
    expected = dict(huggingface_model.loaded(HuggingFaceConfig(path=merged), 0).named_parameters())
    with offline(hub):
        config = HuggingFaceConfig(path=str(adapters))
        config.check(TrainConfig(name="x", run_dir="x"))
        found = dict(huggingface_model.loaded(config, 0).named_parameters())
        with pytest.raises(ValueError, match=r"has adapters, .* give that, or model\.lora=null and"):
            replace(config, lora=3).check(TrainConfig(name="x", run_dir="x"))
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert torch.equal(p, expected[name]), name


def test_what_would_lie_in_a_folder_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    names = "me/tiny", "tiny", "runs", "runs/typo", "me/tiny/more", "./tiny", "/tiny"
    assert [name for name in names if is_name(name)] == ["me/tiny", "tiny"]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"base_model_name_or_path": None}, "does not say base_model_name_or_path"),
        (
            {"base_model_name_or_path": "me/other"},
            "has adapters of me/other, .*: no such folder, .* hf download me/other",
        ),
        ({"r": 4}, r"its adapters cannot be merged into .*\(size mismatch for .*lora_"),
        ({"peft_type": "LOHA"}, r"cannot be merged into .*hada_w1_a\.default is not in both"),
        ({"target_modules": ["q_proj"]}, r"cannot be merged into .*lora_A\.weight is not in both"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, why, named, tmp_path):
    hub, adapters, _ = named
    shutil.copytree(adapters, tmp_path / "adapters")
    told = json.loads((adapters / "adapter_config.json").read_text())
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps({**told, **change}))
    with offline(hub), pytest.raises(ValueError, match=why) as error:
        huggingface_model.loaded(HuggingFaceConfig(path=str(tmp_path / "adapters")), 0)
    assert "\n" not in str(error.value)


def evaluated(config: EvaluateConfig) -> Measured:
    mesh = Mesh.create(1, torch.distributed.get_world_size(), 1)
    return evaluate(config, mesh, torch.device("cpu")).measured


@torch.no_grad()
def by_hand(config: TrainConfig, model: "transformers.PreTrainedModel", n: int, length: int) -> float:
    """The mean loss of held-out rows, each piece of a document by itself."""
    rows, losses = Text(prepare(config.data), config.data).held_out(config.seq_len), []
    model.set_attn_implementation("eager")
    for row in rows.order(0, n):
        tokens, labels, _ = (torch.from_numpy(x) for x in rows.load(row, np.arange(config.seq_len)))
        for document, wanted in zip(*(x.split(rows.lengths(row)) for x in (tokens, labels)), strict=True):
            for ids, these in zip(document.split(length), wanted.split(length), strict=True):
                losses.append(cross_entropy(model(ids[None]).logits[0], these, reduction="none")[these != IGNORE])
    return torch.cat(losses).mean().item()


def test_adapters_are_evaluated_from_their_checkpoint(run, adapted, ranks):
    asked = EvaluateConfig(checkpoint=run.run_dir, rows=3, lengths=[64, 20], needles=False)
    for found in ranks(2)(evaluated, asked):
        for length in (20, 64):
            assert found.by_length[length] == pytest.approx(by_hand(run, adapted, 3, length), rel=1e-5)


def test_launched(run, folders, tmp_path, capfd):
    """Both commands, of a run and of a folder."""
    assert exit_code("generate.py", f"checkpoint={run.run_dir}", "prompt=[one two]", "tokens=4") == 0
    assert "7 tokens of prompt in" in capfd.readouterr().err
    given = (f"checkpoint={folders[-1]}", "tokenizer=bytes", f"text={run.data.path}", f"out={tmp_path}/out")
    assert exit_code("evaluate.py", *given, "lengths=[64]", "rows=1", "needles=false") == 0
    assert (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    "script, kind, why",
    [
        ("evaluate.py", "Gemma2", "its logits are not hidden states times its head's matrix"),
        ("generate.py", "Mamba", "it has 2 layers, and 0 of them ask Transformers for attention"),
        ("generate.py", "Llama", "no file named model.safetensors"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(script, kind, why, run, folders, tmp_path, capfd):
    path = folders[0] if kind == "Gemma2" else folder_of(kind, tmp_path)
    given = {"evaluate.py": f"text={run.data.path}", "generate.py": "prompt=[one]"}[script]
    assert exit_code(script, f"checkpoint={path}", "tokenizer=bytes", given) == 1
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith(f"{script}: checkpoint={path}: ")
    assert why in told
