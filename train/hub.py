"""Where a model of Hugging Face's is: in a folder, or under a name on the hub; itself, or as adapters of another.

place("meta-llama/Llama-3.1-8B")            # of its small files; the hub's cache is enough where there is no network
place("my_adapters", weights=True)          # and of what they adapt, with its weights
"""

import importlib
import json
import re
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # OWNER/NAME
ADAPTERS = "adapter_config.json"  # peft's


class Place(NamedTuple):
    folder: Path  # with config.json
    adapters: Path | None = None  # the folder of those to put into it

    def tokenizer(self) -> str | None:
        files = [folder / "tokenizer.json" for folder in (self.adapters, self.folder) if folder]
        return next((str(file) for file in files if file.exists()), None)


def is_name(name: str) -> bool:
    """Whether it may be a name on the hub: not what lies, or would lie, in a folder that is here."""
    path = Path(name)
    return bool(NAME.fullmatch(name)) and not path.exists() and (len(path.parts) == 1 or not path.parent.exists())


def place(name: str, weights: bool = False) -> Place:
    """Downloads what the hub's cache does not have. ValueError, without the name: why there is none."""
    folder = _folder(name, weights)
    if not (folder / ADAPTERS).exists():
        return Place(folder)
    try:
        base = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f"its {ADAPTERS} does not say base_model_name_or_path, which model it is for")
    try:
        return Place(_folder(base, weights), folder)
    except ValueError as error:
        raise ValueError(f"has adapters of {base}, as base_model_name_or_path there says: {error}") from error


def _folder(name: str, weights: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if not is_name(name):
        raise ValueError("no such folder")
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"] if weights else ["*.json"]))
    except (OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(
            f"no such folder, and no model of that name in the hub's cache, {hub.constants.HF_HUB_CACHE}, or to be "
            f"had from the hub ({why}); where there is a network: hf download {name}"
        ) from error
