"""Hugging Face's Trainer on rows that all ranks share, with LoRA: torchrun --nproc_per_node=2 examples/hf_trainer.py

With a model's folder or name as an argument it is that one, else a tiny Llama drawn at random.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train.transformers_trainer import RingTrainer

TINY = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def rows(n: int, tokens: int, vocabulary: int = 17) -> list[dict[str, torch.Tensor]]:
    """They count on by 3 from token to token."""
    starts = torch.randint(vocabulary, (n, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (starts + 3 * torch.arange(tokens)) % vocabulary]


def train(path: str | None = None, lora: bool = True, tokens: int = 101) -> list[float]:
    cuda = torch.cuda.is_available()
    mesh = Mesh.create(1, dist.get_world_size(), 1, "cuda" if cuda else "cpu")  # one ring of all ranks
    torch.manual_seed(0)
    if path:
        model = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            max_steps=20,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not cuda,
            disable_tqdm=True,
        )
        attend = SequenceAttention(mesh, "balanced")
        trainer = RingTrainer(model, arguments, train_dataset=rows(80, tokens), attend=attend)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank())
    print(f"rank {dist.get_rank()}, every fourth loss: {train(*sys.argv[1:])[::4]}")
    dist.destroy_process_group()
