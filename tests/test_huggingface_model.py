"""model=hf: Transformers' models in our loop. Tiny ones, drawn at random."""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import curve, job, write_texts

from ringspan.kernels.spans import Spans
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.windows import WindowedAttention
from ringspan.train.activations import Activations, Offload
from ringspan.train.checkpoint import Reader
from ringspan.train.config import TrainConfig
from ringspan.train.engine import Dtype
from ringspan.train.health import watched
from ringspan.train.huggingface import export
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.initial import find_weights
from ringspan.train.loop import Trainer, train, watchdog
from ringspan.train.manifest import read_manifest
from ringspan.train.optim import Optimizer
from ringspan.train.phases import Phase

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from ringspan.train import huggingface_model  # noqa: E402
from ringspan.train.transformers_model import why_not_apart, why_not_fused  # noqa: E402

SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 48,
}


def folder_of(kind: str, folder: Path, **fields: Any) -> str:
    """A model's config.json; its weights are drawn."""
    getattr(transformers, f"{kind}Config")(**{**SIZES, **fields}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def text(root):
    return write_texts(root / "text", 5, 90)


def of(root, name, text, path, steps=4, lora=None, pretrained=True, **given) -> TrainConfig:
    config = job(root, name, text, steps=steps, **given)
    config.model = HuggingFaceConfig(path=str(path), lora=lora, pretrained=pretrained)
    return config


def newest(config: TrainConfig) -> Path:
    return max(Path(config.run_dir, "checkpoints").iterdir())


def run_all(*configs: TrainConfig) -> None:
    for config in configs:
        train(config, config.run_dir)


def run_gpt_and_llama(start: TrainConfig, *configs: TrainConfig) -> None:
    """Both from what the GPT has become after a step."""
    run_all(start)
    export(newest(start), Path(configs[-1].model.path), torch.float32)
    run_all(*configs)


def test_a_llama_has_the_losses_of_the_same_gpt_on_every_mesh(root, text, ranks):
    gpt = replace(job(root, "gpt", text, steps=4), init=str(root / "start" / "checkpoints" / "step-00000001"))
    alone = of(root, "llama-alone", text, root / "llama")
    for one in (gpt, alone):
        one.data.held_out, one.evaluation.every = 0.1, 4
    ranks(1)(run_gpt_and_llama, job(root, "start", text, steps=1), gpt, alone, timeout=200)
    assert [*map(list, curve(alone))] == [pytest.approx(list(one), rel=1e-5) for one in curve(gpt)]
    found, expected = (Path(one.run_dir, "evaluations.jsonl").read_text() for one in (alone, gpt))
    assert json.loads(found)["eval/loss"] == pytest.approx(json.loads(expected)["eval/loss"], rel=1e-5)
    ring = of(root, "llama-ring", text, root / "llama", mesh=(1, 2, 1), zero=3, activations=Activations.recompute)
    heads = of(root, "llama-heads", text, root / "llama", mesh=(1, 1, 2), zero=2)
    rows = of(root, "llama-rows", text, root / "llama", mesh=(2, 1, 1), zero=0, accumulation=2)
    for one in (ring, heads, rows):
        one.data.held_out = 0.1
    ranks(2)(run_all, ring, heads, rows, timeout=200)
    for config in (ring, heads, rows):
        print(config.name, curve(config))
        assert [*map(list, curve(config))] == [pytest.approx(list(one), rel=1e-5) for one in curve(gpt)]


def eager_loss(trainer: Trainer) -> float:
    """Of the first step's rows from the definition: each document by itself, in Transformers' own model."""
    whole = huggingface_model.loaded(trainer.config.model, trainer.config.seed)
    whole.set_attn_implementation("eager")
    loss, labels = 0.0, 0
    for row in trainer.batches.rows_after(0)[0]:
        ids, wanted, _ = (torch.from_numpy(x) for x in trainer.batches.rows.load(row, torch.arange(64).numpy()))
        for n in trainer.batches.rows.lengths(row):
            logits = whole(ids[None, :n]).logits[0]
            loss += torch.nn.functional.cross_entropy(logits, wanted[:n], reduction="sum").item()
            labels += int((wanted[:n] >= 0).sum())
            ids, wanted = ids[n:], wanted[n:]
    return loss / labels


@contextmanager
def trainer_of(config: TrainConfig) -> Iterator[Trainer]:
    with closing(watchdog(config, config.run_dir)) as watch, closing(Trainer(config, config.run_dir, watch)) as trainer:
        yield trainer


def adapted(config: TrainConfig) -> tuple[float, list[str]]:
    """Train; the loss of the first step by the definition, and the parameters that have changed."""
    with trainer_of(config) as trainer:
        expected = eager_loss(trainer)
        # Under ZeRO-3 this rank's part of each
        mine = {name: getattr(p, "ds_tensor", p).detach() for name, p in trainer.engine.model.named_parameters()}
        before = {name: x.clone() for name, x in mine.items()}
        trainer.run(lambda: False)
    return expected, [name for name, x in mine.items() if not torch.equal(x, before[name])]


def test_adapters_alone_learn_in_windows_on_any_mesh_and_go_on(root, text, ranks):
    path = folder_of("Mistral", root / "mistral", sliding_window=9)
    ring = of(root, "lora", text, path, lora=3, pretrained=False, steps=6, save_every=3, mesh=(1, 2, 1), zero=3)
    ring.optim.lr = 0.05
    for expected, changed in ranks(2)(adapted, ring, timeout=200):
        losses = [loss for loss, _ in curve(ring)]
        assert losses[0] == pytest.approx(expected, rel=1e-5)
        assert losses[-1] < losses[0] - 0.1
        assert changed
        assert all("lora_" in name for name in changed)
        assert set(read_manifest(newest(ring)).parameters) == set(changed)
    rows = of(root, "lora-rows", text, path, lora=3, pretrained=False, steps=6, mesh=(2, 1, 1), zero=0)
    rows.optim.lr, rows.resume = 0.05, str(newest(ring).with_name("step-00000003"))
    ranks(2)(run_all, rows, timeout=200)
    assert [*map(list, curve(rows))] == [pytest.approx(list(one), rel=1e-4) for one in curve(ring)[3:]]

    export(newest(ring), root / "adapters", torch.float32)
    base = huggingface_model.loaded(replace(ring.model, lora=None), ring.seed)
    both = dict(peft.PeftModel.from_pretrained(base, root / "adapters").named_parameters())
    reader = Reader(newest(ring), read_manifest(newest(ring)))
    for name in changed:
        found = both[f"base_model.{name}"]
        assert torch.equal(found.flatten(), reader.read("master", name, 0, found.numel()))


def test_what_is_exported_is_what_was_trained(root, text, ranks):
    """A Gemma: embeddings that are scaled and tied, two windows."""
    path = folder_of(
        "Gemma3Text", root / "gemma", sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    )
    config = of(root, "gemma-run", text, path, pretrained=False, steps=1)
    ranks(1)(run_all, config, timeout=200)
    export(newest(config), root / "exported", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "exported")
    reader = Reader(newest(config), read_manifest(newest(config)))
    for name, p in model.named_parameters():
        assert torch.equal(p.flatten(), reader.read("master", f"model.{name}", 0, p.numel())), name
    assert huggingface_model.loaded(HuggingFaceConfig(path=str(root / "exported")), 0) is not None


def rounded(config: TrainConfig) -> tuple[set[torch.dtype], set[torch.dtype], list[str]]:
    """Of parameters and of rotary frequencies in bf16, and the layers that `watched` looks at."""
    with trainer_of(config) as trainer:
        model = trainer.engine.model
        (mb,) = trainer.next_micro_batches()
        with watched(model) as layers:
            trainer.engine.loss_sum(mb.tokens, mb.labels, mb.positions, mb.ring_plan)
    return {p.dtype for p in model.parameters()}, {b.dtype for b in model.buffers()}, [*layers]


@pytest.mark.parametrize("zero", [1, 3])
def test_positions_stay_exact_in_bf16(zero, root, text, ranks):
    config = of(root, f"bf16-{zero}", text, folder_of("Llama", root / "bf16"), zero=zero, pretrained=False)
    config.engine.dtype = Dtype.bf16
    (found,) = ranks(1)(rounded, config, timeout=200)
    assert found[:2] == ({torch.bfloat16}, {torch.float32})
    layers = ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "norm"]
    assert found[2] == [*(f"model.model.{name}" for name in layers), "head"]


def test_what_a_model_is_like_is_seen(tmp_path):
    config = HuggingFaceConfig(path=folder_of("Llama", tmp_path))
    assert TrainConfig(model=config).train.policy("cuda").compiler is None
    gpt = job(tmp_path, "x", "", n_layers=2).model
    assert config.sizes == gpt.sizes  # the MLP's width among them
    assert config.matmul_parameters(261) == gpt.matmul_parameters(261)
    assert config.parameters(261) == gpt.parameters(261) + 5 * 32  # and the norms
    assert config.vocabulary(257) == 261
    with pytest.raises(ValueError, match=r"knows 261 tokens, and data\.tokenizer has 262: give the tokenizer of that"):
        config.vocabulary(262)
    lora = replace(config, lora=3)
    assert lora.frozen_parameters == config.matmul_parameters(261)
    assert lora.matmul_parameters(261) == lora.frozen_parameters + lora.parameters(261)
    experts = folder_of("Mixtral", tmp_path, num_local_experts=8, num_experts_per_tok=2)
    dense = gpt.matmul_parameters(261)
    mlp = 2 * 3 * 32 * 48
    assert HuggingFaceConfig(path=experts).matmul_parameters(261) == dense + mlp + 2 * 8 * 32  # two, and the router


def test_rows_beyond_learned_positions_are_refused(tmp_path):
    for kind, fields in {"GPT2": {}, "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48}, "Llama": {}}.items():
        config = HuggingFaceConfig(path=folder_of(kind, tmp_path / kind, max_position_embeddings=64, **fields))
        with torch.device("meta"):
            whole = huggingface_model.skeleton(config, huggingface_model.described(config), torch.float32)
        model = huggingface_model.CausalModel(whole, 0.0)
        model.expect(64)
        if kind == "Llama":
            model.expect(65)
            continue
        with pytest.raises(
            ValueError, match="rows of 65 tokens: the model has learned positions, of which there are 64"
        ):
            model.expect(65)


def test_of_a_mixture_of_experts_attention_has_adapters(tmp_path):
    for kind in ("Mixtral", "Qwen3Moe"):
        path = folder_of(kind, tmp_path / kind)
        config = HuggingFaceConfig(path=path, lora=3, pretrained=False)
        model = huggingface_model.loaded(config, 0)
        names = {name.split(".lora_")[0].split(".", 3)[3] for name, p in model.named_parameters() if p.requires_grad}
        assert names == {f"self_attn.{x}_proj" for x in "qkvo"}
        assert why_not_apart(model) is why_not_fused(model) is None
        # q and out; k and v
        assert config.parameters(261) == 2 * 3 * (2 * (32 + 32) + 2 * (32 + 16))
        assert config.frozen_parameters == replace(config, lora=None).matmul_parameters(261)
    dense_too = folder_of("DeepseekV3", tmp_path / "x", **DEEPSEEK, first_k_dense_replace=1)
    with pytest.raises(ValueError, match=r"model\.lora=3: peft takes its .* for experts too, .* give null"):
        HuggingFaceConfig(path=dense_too, lora=3).check(TrainConfig(name="x", run_dir="x"))


def test_counts_are_means_of_the_layers():
    attend = WindowedAttention((3, None, 3), Mesh(1, 1, 1, 0, 0, 0, None, None), "contiguous")  # type: ignore[arg-type]
    spans = Spans.packed([[5, 2], [1, 6]])
    within, whole = (sum(min(i + 1, w) for n in (5, 2, 1, 6) for i in range(n)) for w in (3, 9))
    assert attend.pairs(spans) == pytest.approx((2 * within + whole) / 3)
    assert set(attend.plans(spans, "cpu", attend.layout(spans)).plans) == {3, None}  # made beside the data


CANNOT = {  # a folder's config.json, and why not
    "Llama": ({"attention_dropout": 0.1}, r"attention_dropout=0\.1: ranks would drop unlike parts; set it to 0\.0"),
    "Llama4Text": (
        {"attention_chunk_size": 16, "num_local_experts": 2},
        "Llama4TextAttention: sees keys by another rule",
    ),
    "Mamba": ({}, "it has 2 layers, and 0 of them ask Transformers for attention"),
    "Bloom": ({"hidden_dropout": 0.0, "attention_dropout": 0.0}, "its forward does not run on our attention"),
    "T5": ({"dropout_rate": 0.0}, "no causal language model of T5Config"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_models_that_cannot_are_refused_before_a_worker_starts(kind, tmp_path):
    fields, why = CANNOT[kind]
    path = folder_of(kind, tmp_path, **fields)
    with pytest.raises(ValueError, match=why) as told:
        HuggingFaceConfig(path=path).check(TrainConfig(name="x", run_dir="x"))
    assert str(told.value).startswith(f"model.path={path}: ")


def why_refused(config: HuggingFaceConfig) -> str:
    """Before a worker starts, or in the numbers of the model."""
    try:
        config.check(TrainConfig(name="x", run_dir="x"))
    except ValueError as error:
        return str(error).partition(": ")[2]
    model = huggingface_model.loaded(config, 0)
    return why_not_apart(model) or why_not_fused(model) or ""


@pytest.mark.parametrize(
    "kind, fields, why",
    [
        ("Phi", {}, "its head adds a bias to the logits"),
        ("Gemma2", {"head_dim": 8}, "its logits are not hidden states times its head's matrix"),
        (
            "FalconH1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4},
            # Of Transformers 5.12 the forward cannot be tried on the meta device
            "its tokens see one another by more than attention|its forward does not run on our attention",
        ),
    ],
)
def test_what_would_go_wrong_in_silence_is_found_in_the_numbers(kind, fields, why, tmp_path):
    config = HuggingFaceConfig(path=folder_of(kind, tmp_path, **fields), pretrained=False)
    assert re.match(why, why_refused(config))


@pytest.mark.parametrize(
    "change, why",
    [
        (
            {"train.activations": Activations.recompute_keep_attention},
            "not with model=hf, which takes keep or recompute",
        ),
        ({"train.recompute_layers": 2}, r"train\.recompute_layers=2: not with model=hf, which takes 1"),
        ({"train.offload": Offload.cpu}, r"train\.offload=cpu: not with model=hf, which takes none"),
        ({"train.mlp_tile": 8}, r"train\.mlp_tile=8: not with model=hf, which takes 0"),
        (
            {"train.compile": True, "engine.zero": 3},
            r"train\.compile=true: not with model=hf and engine\.zero=3, .* give train\.compile=false, or another",
        ),
        ({"optim.name": Optimizer.muon}, r"optim\.name=muon: not with model=hf, which takes adamw"),
        ({"phases": [Phase(step=3, seq_len=64, rope_base=1e6)]}, "which takes phases without rope_base"),
        ({"model.path": ""}, "model.path: give the folder of a model or of adapters, or the name of one"),
        ({"model.path": "/no/such/folder"}, r"model\.path=/no/such/folder: no such folder"),
        ({"model.path": str(Path(__file__).parent)}, r"there is no config\.json in "),
        (
            {"model.path": "owner/not_in_the_cache"},
            "=owner/not_in_the_cache: no such folder, .* hf download owner",
        ),
    ],
)
def test_what_is_not_there_for_such_models_is_refused(change, why, tmp_path):
    config = TrainConfig(name="x", run_dir="x", model=HuggingFaceConfig(path=folder_of("Llama", tmp_path)))
    for key, value in change.items():
        part, _, name = key.rpartition(".")
        setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(ValueError, match=why):
        config.model.check(config)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(
        ValueError, match=r"data\.tokenizer=bytes: the model has learned other tokens; give .*/tokenizer\.json"
    ):
        HuggingFaceConfig(path=str(tmp_path)).check(config)
    with pytest.raises(ValueError, match=r"init=x: model=hf has its first weights from model\.path"):
        find_weights("x", config.model)


def test_packages_and_weights_that_are_missing_are_told(tmp_path, monkeypatch):
    config = HuggingFaceConfig(path=folder_of("Llama", tmp_path), lora=2)
    with pytest.raises(ValueError, match=r"model\.path=.*; model\.pretrained=false draws the weights"):
        huggingface_model.loaded(config, 0)
    with pytest.raises(ValueError, match=r"model\.lora=0: must be 1 or more, or null"):
        replace(config, lora=0)
    for package, asks in (("peft", r"model\.lora=2"), ("transformers", "model=hf")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=package: None if name == missing else name
        )
        with pytest.raises(ValueError, match=f"{asks} needs {package}, which is not installed: pip install {package}"):
            config.model()
