"""Models in Hugging Face's layout: to transformers and back, and what is refused."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_manifest import FILE, saved
from test_parity import SEQ_LEN, job, write_texts

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.train.huggingface import INDEX, SINGLE, Folder, config_json, export, parts
from ringspan.train.loop import train
from ringspan.train.manifest import Manifest, checkpoints_in, write_manifest
from ringspan.train.metrics import plain
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.tensors import Entry, write

ROOT = Path(__file__).parents[1]
VOCABULARY = 50
SHAPE = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "mlp_dim": 36, "rope_base": 1000.0}


def model_of(**changes):
    config = ModelConfig(**{**SHAPE, **changes})
    model = GPT(config, VOCABULARY, attention, seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(1.0, 0.2)  # ones would hide a norm that is left out
    return model


def checkpoint_of(model, folder):
    """As two ranks would have written it: each parameter cut in the middle."""
    folder.mkdir(parents=True)
    files, shapes = {}, {name: list(p.shape) for name, p in model.named_parameters()}
    for rank in range(2):
        runs = {}
        for name, p in model.named_parameters():
            half, flat = p.numel() // 2 + 1, p.detach().flatten()
            runs[f"master/{name}/{rank * half}"] = flat[half:] if rank else flat[:half]
        file = FILE.replace("0.", f"{rank}.")
        entries = {name: Entry(run.dtype, tuple(run.shape)) for name, run in runs.items()}
        files[file] = write(folder / file, entries, runs.values())
    config = {"model": plain(asdict(model.config)), "seq_len": 64}
    told = saved(vocab_size=VOCABULARY, config=config)
    write_manifest(folder, Manifest(saved=told, parameters=shapes, kinds=["master"], scalars={}, files=files))
    return folder


def logits(model, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    got = []
    model.norm.register_forward_hook(lambda *_: got.append(_[2]))
    model(tokens, torch.full_like(tokens, -100), positions, Spans.causal(tokens.shape[1]))
    return got[0] @ model.head.weight.T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("qk_norm", "name"), [(False, "LlamaForCausalLM"), (True, "Qwen3ForCausalLM")])
def test_transformers_loads_it_and_gives_the_same_logits(qk_norm, name, tied, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = model_of(qk_norm=qk_norm, tie_embeddings=tied)
    export(checkpoint_of(model, tmp_path / "from"), tmp_path / "to", torch.float32)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "to", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(loaded).__name__ == name
    assert not any(told.values()), told
    tokens = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = logits(model, tokens), loaded(tokens).logits
    # fp32 sums of 24 to 40 products in another order; logits are of size 1
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5)
    assert ours.std() > 0.05


@pytest.mark.parametrize("shard_bytes", [5 << 30, 8000])
def test_what_is_exported_is_read_back_by_any_run(shard_bytes, tmp_path):
    model = model_of()
    names = export(checkpoint_of(model, tmp_path / "from"), tmp_path / "to", torch.float32, shard_bytes)
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == sorted(names)
    assert (INDEX in names) == (SINGLE not in names) == (shard_bytes == 8000)
    assert all((tmp_path / "to" / name).stat().st_size < 2 * 8000 for name in names) or shard_bytes > 8000
    folder = Folder(tmp_path / "to")
    folder.require(model.config)
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        assert torch.equal(folder.read("master", name, 0, len(flat)), flat), name
        for start, stop in ((1, 2), (len(flat) // 3, len(flat) - 1)):
            assert torch.equal(folder.read("master", name, start, stop), flat[start:stop]), name


def test_a_model_that_transformers_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = model_of(qk_norm=True)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config_json(model.config, VOCABULARY)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    folder = Folder(tmp_path / "theirs")
    folder.require(model.config)
    weights = theirs.state_dict()
    for name, tensors in parts(model.config, VOCABULARY).items():
        expected = torch.cat([weights[there].flatten() for there in tensors])
        assert torch.equal(folder.read("master", name, 0, len(expected)), expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 25}, "hidden_size is 25, not 24"),
        ({"model_type": "llama"}, "model_type is llama, not qwen3"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0}}, "rope_parameters is"),
        ({"rope_scaling": {"factor": 8}}, "we do not scale"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_another_model_is_refused_with_the_difference(change, message, tmp_path):
    model = model_of()
    export(checkpoint_of(model, tmp_path / "from"), tmp_path / "to", torch.bfloat16)
    path = tmp_path / "to" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path / "to").require(model.config)


def test_files_outside_of_the_folder_and_other_tensors_are_refused(tmp_path):
    model = model_of()
    export(checkpoint_of(model, tmp_path / "from"), tmp_path / "to", torch.float32, 8000)
    index = json.loads((tmp_path / "to" / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (tmp_path / "to" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '../elsewhere.safetensors', which is no file of that folder"):
        Folder(tmp_path / "to")
    del index["weight_map"]["lm_head.weight"]
    (tmp_path / "to" / INDEX).write_text(json.dumps(index))
    found = Folder(tmp_path / "to")
    del found.files["model.norm.weight"]
    with pytest.raises(ValueError, match=r"is not the model of this configuration: .* is not \("):
        found.require(model.config)
    with pytest.raises(ValueError, match="is there already: give the name of a new folder"):
        export(tmp_path / "from", tmp_path / "to", torch.float32)
    with pytest.raises(ValueError, match="no model in Hugging Face's layout"):
        Folder(tmp_path)


def test_a_model_that_transformers_has_not_is_refused(tmp_path):
    folder = checkpoint_of(model_of(), tmp_path / "from")
    manifest = replace(saved(), config={"model": {**plain(asdict(model_of().config)), "sinks": True}, "seq_len": 8})
    write_manifest(folder, Manifest(saved=manifest, parameters={}, kinds=[], scalars={}))
    with pytest.raises(ValueError, match=r"model\.sinks=True: there is no way yet to tell Hugging Face's models of it"):
        export(folder, tmp_path / "to", torch.float32)
    assert not (tmp_path / "to").exists()


def run(config):
    try:
        return train(config, config.run_dir)
    except ValueError as error:
        return str(error)


def losses(config):
    return [json.loads(line)["train/loss"] for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]


def test_training_starts_from_a_folder_or_a_checkpoint_of_the_same_model(tmp_path, ranks):
    text = write_texts(tmp_path / "text", 5, 90)
    first = job(tmp_path, "first", text, mesh=(1, 2, 1), zero=2, steps=6)
    ranks(2)(run, first, timeout=200)
    (source,) = checkpoints_in(first.run_dir)
    command = [sys.executable, str(ROOT / "launch" / "export.py"), first.run_dir, str(tmp_path / "model")]
    done = subprocess.run([*command, "--dtype", "fp32"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(source) in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)
    for number, init in enumerate((tmp_path / "model", source)):
        config = replace(job(tmp_path, f"second-{number}", text, zero=3, steps=2), init=str(init))
        ranks(1)(run, config, timeout=200)
        assert losses(config)[0] < losses(first)[0] - 1  # it has learnt
    assert losses(config) == losses(replace(config, run_dir=str(tmp_path / "second-0")))
    other = replace(config, model=ModelConfig(dim=32, n_layers=1), run_dir=str(tmp_path / "other"))
    assert "is not the model of this configuration: model.n_layers is 2, not 1" in ranks(1)(run, other)[0]
    file = source / FILE
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged: rank-00000.safetensors has" in ranks(1)(run, replace(config, run_dir=str(tmp_path / "x")))[0]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["max_position_embeddings"] == SEQ_LEN
