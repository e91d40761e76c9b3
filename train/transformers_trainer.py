"""Hugging Face's Trainer, with rows sharded over ranks.

    attend = SequenceAttention(Mesh.create(1, 4, 1), "balanced")       # a ring of 4 ranks: they share every row
    trainer = RingTrainer(model, arguments, train_dataset=rows, attend=attend)     # on all ranks; else as always
    trainer.train()

Collators give whole rows, as they do on one process, and each rank keeps its part of them. Loss and gradients are those
of one process, for whole models and for adapters. Ranks of one ring have the same rows, and rings different ones: a
step is over per_device_train_batch_size x mesh.data x gradient_accumulation_steps rows.

What one rank cannot hold is shared by all, whatever the mesh: TrainingArguments(deepspeed=...) with ZeRO 1 to 3, or
fsdp=True. Neither is told anything of the ring: to them all ranks are data-parallel ones.
"""

from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from itertools import islice, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer

from ringspan.parallel.attention import SequenceAttention
from ringspan.train.transformers_attention import NAME, register, shard_batch
from ringspan.train.transformers_model import fused_loss, why_not_apart, why_not_fused

READ = ("input_ids", "labels", "attention_mask", "position_ids")  # of what a collator gives


class RingTrainer(Trainer):
    """``attend`` says how ranks share rows; all else is Trainer's. From here on the model's attention is ours.

    With ``fused`` its logits are never whole: a chunk of them at a time, as in our loop.
    ValueError: a model that cannot do so, or whose tokens see one another by more than attention; what needs whole rows
    or their logits on a rank, such as metrics and label smoothing; labels weighed by rank
    (``average_tokens_across_devices=False``); rows that come as a stream.
    """

    def __init__(self, *args: Any, attend: SequenceAttention, fused: bool = True, **kwargs: Any) -> None:
        self.attend, self.fused = attend, fused
        super().__init__(*args, **kwargs)
        for what, asked in (
            ("compute_metrics", self.compute_metrics),
            ("compute_loss_func", self.compute_loss_func),
            ("label_smoothing_factor", self.args.label_smoothing_factor),
            ("average_tokens_across_devices=False", not self.args.average_tokens_across_devices),
            ("train_sampling_strategy=batch_rebalance", self.args.train_sampling_strategy == "batch_rebalance"),
            ("Transformers' or Accelerate's own tensor or sequence parallelism", self.shares_already()),
            ("a model whose loss takes no num_items_in_batch", not self.model_accepts_loss_kwargs),
        ):
            if asked:
                raise ValueError(f"{what}: not possible where a rank has a part of each row; leave it out")
        register()
        model: Any = self.model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside peft's
        model.set_attn_implementation(NAME)
        if why := why_not_apart(self.causal):
            raise ValueError(f"{type(self.causal).__name__}: {why}")
        if fused and (why := why_not_fused(self.causal)):
            raise ValueError(f"{type(self.causal).__name__}: {why}; RingTrainer(..., fused=False) makes whole logits")

    def shares_already(self) -> bool:
        """Whether ranks share tensors or rows beside ``attend``."""
        by_model = getattr(self.model, "is_distributed_loading_by_transformers", False)
        return by_model or self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        fused = fused_loss(self.causal, inputs["shift_labels"], num_items_in_batch) if self.fused else nullcontext()
        with fused:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """This rank's parts of the batches of a step, and how many labels all ranks have in them."""
        batches = [self.sharded(batch) for batch in islice(epoch_iterator, num_batches)]
        return batches, self.labels_of_all(batches)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of this rank's part, scaled so that the mean over all ranks is that of the rows."""
        batch = self.sharded(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = cast(Tensor, self.compute_loss(model, batch, num_items_in_batch=self.labels_of_all([batch])))
        return loss.detach(), None, None

    def sharded(self, batch: dict[str, Any]) -> dict[str, Any]:
        if unknown := batch.keys() - set(READ):
            raise ValueError(f"{', '.join(sorted(unknown))}: the collator may give {', '.join(READ)}")
        if "labels" not in batch:
            raise ValueError("labels: the collator gives none; DataCollatorForLanguageModeling(..., mlm=False) does")
        host = {name: x.cpu() for name, x in batch.items()}
        ids, labels = host["input_ids"], host["labels"]
        lengths = documents(ids.shape, host.get("attention_mask"), host.get("position_ids"))
        return shard_batch(self.attend, ids, labels=labels, lengths=lengths, device=self.args.device)

    def labels_of_all(self, batches: list[dict[str, Any]]) -> Tensor:
        """Each rank of a ring knows how many its rows have."""
        mesh = self.attend.mesh
        mine = torch.tensor([sum(batch["num_items_in_batch"] for batch in batches)], device=self.args.device)
        return self.accelerator.reduce(mine, "sum")[0] / (mesh.ring * mesh.ulysses)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(dataset).__name__}: ranks share rows by their numbers; give a dataset with a length"
            )
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        # SharedRows has whole batches alone; else Accelerate would leave out some ranks' losses of an evaluation's last
        cast(Any, loader)._drop_last = True
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return self.shared(cast(Sampler, super()._get_train_sampler(train_dataset)), self._train_batch_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return self.shared(SequentialSampler(eval_dataset), self.args.eval_batch_size)

    def shared(self, sampler: Sampler, batch: int) -> Sampler:
        mesh, a = self.attend.mesh, self.args
        first = a.seed if a.data_seed is None else a.data_seed

        def seed() -> int:
            # Not what Accelerate tells a sampler: that is nothing in the epoch in which a run is taken up again
            return first + int(self.state.epoch or 0)

        return SharedRows(sampler, batch, mesh.data, mesh.ring * mesh.ulysses, seed, a.dataloader_drop_last)


class SharedRows(Sampler[int]):
    """The rows of another sampler, each batch as often as ranks share it.

    Accelerate gives batch after batch to rank after rank, and the ranks that share a row stand side by side. The last
    batches are filled up with the first rows, as Accelerate does, or left out. The order follows from ``seed()`` alone.
    """

    def __init__(
        self, sampler: Sampler, batch: int, groups: int, sharing: int, seed: Callable[[], int], drop_last: bool
    ) -> None:
        self.sampler, self.batch, self.sharing, self.seed = sampler, batch, sharing, seed
        n, together = len(cast(Sized, sampler)), batch * groups
        self.rows = (n if drop_last else n + together - 1) // together * together

    def __len__(self) -> int:
        return self.rows * self.sharing

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed())
            rows = list(self.sampler)
        rows = [rows[i % len(rows)] for i in range(self.rows)]
        for start in range(0, self.rows, self.batch):
            yield from rows[start : start + self.batch] * self.sharing


def documents(shape: torch.Size, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """Lengths of each row's documents: they begin where positions do, and padding is one of its own."""
    begins = torch.zeros(shape, dtype=torch.bool)
    begins[:, 0] = True
    if positions is not None:
        begins |= positions == 0
    if mask is not None:
        begins[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return [[b - a for a, b in pairwise([*row.nonzero()[:, 0].tolist(), shape[1]])] for row in begins]
