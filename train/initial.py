"""What training starts from where it does not draw its weights: a model's folder, or a checkpoint of another run."""

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ringspan.train.agree import of_every_rank
from ringspan.train.checkpoint import Reader
from ringspan.train.huggingface import SHAPE, Folder
from ringspan.train.manifest import MANIFEST, damage, read_manifest
from ringspan.train.model import AnyModel, ModelConfig


class Checkpoint:
    """The weights of a checkpoint, as `Folder` has those of a model. ValueError: it is of another model."""

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.path, self.told = path, read_manifest(path)
        was, now = self.told.saved.config["model"], asdict(model)
        # Not what is no weight: a longer context may begin with other rotations
        differ = [f"model.{key} is {was.get(key)}, not {now[key]}" for key in SHAPE if was.get(key) != now[key]]
        if differ:
            raise ValueError(f"init={path} is not the model of this configuration: {'; '.join(differ)}")
        self.vocab_size = self.told.saved.vocab_size

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        return self.reader.read(kind, name, start, stop)

    def open(self, rank: int, world: int) -> str | None:
        """What is wrong with this rank's share of the files."""
        if problem := damage(self.path, self.told, rank, world):
            return f"init={self.path} is damaged: {problem}"
        self.reader = Reader(self.path, self.told)
        return None


def find_weights(init: str | None, model: AnyModel) -> Folder | Checkpoint | None:
    """ValueError: the folder holds neither, or another model: all differences are told. Reads no weights yet."""
    if init is None:
        return None
    if not isinstance(model, ModelConfig):
        raise ValueError(f"init={init}: model=hf has its first weights from model.path; give that, and leave out init")
    path = Path(init)
    if (path / MANIFEST).exists():
        return Checkpoint(path, model)
    if not (path / "config.json").exists():
        what = "it has no config.json" if path.is_dir() else "no such folder"
        raise ValueError(
            f"init={init}: {what}; give a model's folder in Hugging Face's layout, or a checkpoint's, such as "
            "runs/NAME/checkpoints/step-00000100"
        )
    folder = Folder(path)
    folder.require(model)
    return folder


def open_weights(init: str | None, model: AnyModel, corpus_vocab_size: int) -> Folder | Checkpoint | None:
    """The first weights, verified by all ranks together. ValueError: as `find_weights`, damaged, or too few tokens."""
    source = find_weights(init, model)
    if source is None:
        return None
    if source.vocab_size < corpus_vocab_size:
        raise ValueError(
            f"init={init} knows {source.vocab_size} tokens, and data.tokenizer has {corpus_vocab_size}: "
            "give the tokenizer of that model"
        )
    problem = source.open(dist.get_rank(), dist.get_world_size()) if isinstance(source, Checkpoint) else None
    for told in of_every_rank(problem):
        if told:
            raise ValueError(told)
    return source
