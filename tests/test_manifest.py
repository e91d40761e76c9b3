import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ringspan.train.manifest import (
    MANIFEST,
    Manifest,
    Saved,
    _digest,
    damage,
    discard,
    find,
    read_manifest,
    require_same,
    superfluous,
    write_manifest,
)
from ringspan.train.tensors import Written, sha256_of

FILE = "rank-00000.safetensors"


def saved(step=3, **changes):
    config = {"model": {"dim": 8, "qk_norm": True}, "seq_len": 16, "name": "x", "optim": {"lr": 0.1}}
    shape = {"mesh": {"data": 2, "ring": 2, "ulysses": 1}, "zero": 1, "dtype": "torch.float32", "vocab_size": 320}
    numbers = {"tokens": 48, "rows_seen": 3, "loss": 2.5, "skipped": 1}
    return replace(Saved(step=step, data="d1", config=config, **numbers, **shape), **changes)


def checkpoint(run_dir, step, seconds=1.0, loss=2.5):
    """A whole one, as far as manifests know."""
    folder = Path(run_dir, "checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"weights %d" % step)
    told = Written((folder / FILE).stat().st_size, sha256_of(folder / FILE))
    content = {"parameters": {"w": [2, 3]}, "kinds": ["master"], "scalars": {"step": 2.0}, "files": {FILE: told}}
    manifest = Manifest(saved=saved(step, seconds=seconds, loss=loss), **content)
    write_manifest(folder, manifest)
    return folder


def rewrite(folder, change):
    """Change a manifest as an attacker would, checksum and all."""
    told = json.loads((folder / MANIFEST).read_text())
    change(told["content"])
    told["sha256"] = _digest(told["content"])
    (folder / MANIFEST).write_text(json.dumps(told))


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    folder = checkpoint(tmp_path, 3)
    manifest = read_manifest(folder)
    assert (manifest.saved, manifest.saved.world) == (saved(seconds=1.0), 4)
    assert (manifest.parameters, manifest.kinds, manifest.scalars) == ({"w": [2, 3]}, ["master"], {"step": 2.0})
    assert damage(folder, manifest) is None
    write_manifest(folder, replace(manifest, saved=saved(loss=math.nan)))
    assert math.isnan(read_manifest(folder).saved.loss)
    assert "NaN" not in (folder / MANIFEST).read_text()


@pytest.mark.parametrize(
    "name",
    [
        "../rank-00000.safetensors",
        "/etc/passwd",
        "a/rank-00000.safetensors",
        "rank-00000.safetensors/../../x",
        "rank-0.pt",
    ],
)
def test_no_name_in_a_manifest_leaves_its_folder(tmp_path, name):
    folder = checkpoint(tmp_path, 3)
    rewrite(folder, lambda content: content.update(files={name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(ValueError, match="which is no file of this folder"):
        read_manifest(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = checkpoint(tmp_path, 3)
    (folder / FILE).rename(tmp_path / "elsewhere")
    (folder / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is no file of this folder"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"rows_seen": 3', '"rows_seen": 4'), "has changed since it was written"),
        (lambda text: text[: text.index('"seconds"')], "Expecting property name"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "its format is 2, and this Ringspan reads 1"),
        (lambda text: "[]", "not as it should be"),
        (lambda text: '{"format": 1}', "not as it should be: KeyError"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused_and_says_why(tmp_path, change, message):
    older, folder = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)
    found, refused = find(str(tmp_path), "auto")
    assert found == [older]
    assert list(refused) == [folder.name]


def test_unknown_fields_are_refused(tmp_path):
    folder = checkpoint(tmp_path, 3)
    rewrite(folder, lambda content: content["saved"].update(_target_="os.system"))
    with pytest.raises(ValueError, match="not as it should be: TypeError"):
        read_manifest(folder)


def test_damage_is_named(tmp_path):
    folder = checkpoint(tmp_path, 3)
    manifest, content = read_manifest(folder), (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-1])
    assert damage(folder, manifest) == f"{FILE} has 8 bytes instead of 9"
    (folder / FILE).write_bytes(content[:-1] + b"x")
    assert damage(folder, manifest) == f"{FILE} has another SHA-256 than when it was written"
    (folder / FILE).unlink()
    assert damage(folder, manifest) == f"{FILE}: No such file or directory"
    assert damage(folder, manifest, rank=1, world=2) is None  # that file is rank 0's to read


def test_auto_takes_the_newest_and_no_half_written_one(tmp_path):
    assert find(str(tmp_path), "auto") == ([], {})
    older = checkpoint(tmp_path, 20, seconds=50.0)
    newest = checkpoint(tmp_path, 10, seconds=60.0)  # the run has started again from an older one
    for name in ("step-00000030.half", "step-00000005.old", "step-3"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert find(str(tmp_path), "auto") == ([newest, older], {})
    assert find(str(tmp_path), "none") == ([], {})
    assert find("elsewhere", str(older)) == ([older], {})
    with pytest.raises(ValueError, match=r"resume=.*/checkpoints: not a whole checkpoint .*; give auto, none or"):
        find("elsewhere", str(tmp_path / "checkpoints"))


def test_the_policy_keeps_the_last_every_nth_and_the_best(tmp_path):
    for step, loss in ((10, 3.0), (20, 1.0), (25, 2.0), (30, math.nan), (35, 2.5)):
        checkpoint(tmp_path, step, seconds=step, loss=loss)

    def gone(**policy):
        return [int(path.name[5:]) for path in superfluous(str(tmp_path), **policy)]

    assert gone(keep=2, every=0, best=False) == [25, 20, 10]
    assert gone(keep=2, every=0, best=True) == [25, 10]
    assert gone(keep=1, every=10, best=False) == [25]
    assert gone(keep=1, every=10, best=True) == [25]
    assert gone(keep=0, every=0, best=False) == []
    discard(superfluous(str(tmp_path), keep=1, every=0, best=True))
    assert sorted(path.name for path in Path(tmp_path, "checkpoints").iterdir()) == ["step-00000020", "step-00000035"]


def changed(**parts):
    config = saved().config
    return {**config, **{name: {**config[name], **x} if isinstance(x, dict) else x for name, x in parts.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 384}, "vocabulary was 320 and is 384"),
        ({"data": "d2"}, r"data \(digest of its tokens\) was d1 and is d2"),
        ({"config": changed(optim={"name": "muon"})}, "optim.name was adamw and is muon"),
        (
            {"config": changed(model={"dim": 16, "qk_norm": False})},
            "model.dim was 8 and is 16, model.qk_norm was True and",
        ),
    ],
)
def test_another_model_or_other_data_is_refused_with_the_difference(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        require_same(saved(), saved(**changes), Path("run/checkpoints/step-00000003"))
    assert "\n" not in str(error.value)


def test_another_mesh_stage_dtype_or_length_is_welcome_and_told():
    run = saved(zero=3, dtype="torch.bfloat16", mesh={"data": 1, "ring": 1, "ulysses": 1})
    assert require_same(saved(), run, Path("any")) == []
    run = saved(config=changed(seq_len=99, optim={"lr": 0.2}, name="y"))
    assert require_same(saved(), run, Path("any")) == ["seq_len was 16 and is 99", "optim.lr was 0.1 and is 0.2"]


def test_all_of_saved_is_written():
    assert set(asdict(saved())) >= {"step", "tokens", "rows_seen", "loss", "skipped", "mesh", "data", "config"}
