"""Write a checkpoint's weights as Hugging Face's transformers reads them: config.json and safetensors.

python launch/export.py runs/NAME my_model                             the newest whole checkpoint of a run, in bf16
python launch/export.py runs/NAME/checkpoints/step-00000100 my_model   one checkpoint
python launch/export.py runs/NAME my_model --dtype fp32

A model without qk_norm loads there as Llama, one with it as Qwen3. Training starts from such a folder by init=my_model.
"""

import argparse
import sys
from pathlib import Path

from ringspan.train.huggingface import FLOATS, export
from ringspan.train.pretrained import newest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's folder, or a checkpoint's")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=list(FLOATS), default="bf16")
    asked = parser.parse_args()
    try:
        checkpoint = newest(asked.source)
        files = export(checkpoint, asked.target, FLOATS[asked.dtype])
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    print(f"{checkpoint} -> {asked.target}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
