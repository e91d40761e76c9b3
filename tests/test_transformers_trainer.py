"""Hugging Face's Trainer on rows that ranks share, against itself on one process with eager attention."""

import os
from typing import Any

import pytest
import torch
from test_examples import losses
from test_transformers import model_of
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train.engine import import_deepspeed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
data_loader = pytest.importorskip("accelerate.data_loader", reason="accelerate is not installed")

from ringspan.train.transformers_trainer import RingTrainer, SharedRows, documents  # noqa: E402

ALONE = Mesh(1, 1, 1, 0, 0, 0, None, None)  # type: ignore[arg-type]  # needs no process group until it attends


@pytest.fixture
def alone(monkeypatch) -> None:
    """This process is the only one, whatever an earlier test's launch has left in its environment."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


class Gradients(transformers.TrainerCallback):
    """Of the first step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        self.found = self.found or {name: p.grad.clone() for name, p in named if p.grad is not None}


def rows(n: int) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 46, (n,), generator=drawn).tolist()
    ids = [torch.randint(1, 101, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def padded(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of unlike lengths, filled on the right."""
    longest = max(len(one["input_ids"]) for one in features)

    def whole(name: str, fill: int) -> Tensor:
        return torch.tensor([one[name] + [fill] * (longest - len(one[name])) for one in features])

    ids = whole("input_ids", 0)
    return {"input_ids": ids, "labels": whole("labels", -100), "attention_mask": (ids != 0).long()}


def model_for(kind: str, path: str | None = None) -> torch.nn.Module:
    """With a path it is read, and is made in shards where ZeRO-3 is on."""
    if path is None:
        model = model_of("mistral" if kind == "whole" else "llama")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if kind == "whole":
        return model
    adapters = {"init_lora_weights": False} if kind == "lora" else {"modules_to_save": ["lm_head"]}
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", **adapters))


def trainer_of(
    kind: str, folder: str, mesh: Mesh | None, path: str | None = None, **given: Any
) -> tuple[transformers.Trainer, Gradients]:
    """``mesh`` None: Transformers' own, with eager attention."""
    arguments = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2 // mesh.data if mesh else 2,
        "per_device_eval_batch_size": 2 // mesh.data if mesh else 2,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "max_grad_norm": 0.0,  # no clipping
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        **given.pop("arguments", {}),
    }
    seen = Gradients()
    kwargs = {
        "train_dataset": rows(9),
        "eval_dataset": rows(6),
        # Rows that are filled up; or documents end to end, which positions tell apart
        "data_collator": padded if kind == "whole" else transformers.DataCollatorWithFlattening(),
        "callbacks": [seen],
        **given,
    }
    made = transformers.TrainingArguments(folder, **arguments)
    pretend(made)
    model = model_for(kind, path)
    if mesh is None:
        return transformers.Trainer(model, made, **kwargs), seen
    return RingTrainer(model, made, attend=SequenceAttention(mesh, "zigzag"), **kwargs), seen


def trained(kind: str, folder: str, sizes: tuple[int, int, int] | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps and of an evaluation, and the first gradients; adapters alone have changed."""
    trainer, seen = trainer_of(kind, folder, sizes and Mesh.create(*sizes))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) == (kind == "lora" and "lora_" not in name), name
    return [*losses, trainer.evaluate()["eval_loss"]], seen.found


@pytest.mark.parametrize("kind, meshes", [("whole", [(1, 2, 1)]), ("lora", [(1, 2, 1), (2, 1, 1)])])
def test_losses_and_gradients_are_those_of_one_process(kind, meshes, ranks, tmp_path, alone):
    expected, grads = trained(kind, str(tmp_path), None)
    assert len(expected) == 3
    assert all("lora_" in name for name in grads) == (kind == "lora")
    for mesh in meshes:
        for found_losses, found in ranks(2)(trained, kind, str(tmp_path), mesh):
            assert found_losses == pytest.approx(expected, rel=1e-4)  # logged with four digits behind the point
            assert found.keys() == grads.keys()
            for name, grad in grads.items():
                farthest = (found[name] - grad).abs().max()
                assert farthest <= 64 * torch.finfo(torch.float32).eps * grad.abs().max(), name


def zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # else all stays
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


SHARDED = {
    "ZeRO-2": ("lora", {"deepspeed": zero(2)}),
    "ZeRO-3": ("whole", {"deepspeed": zero(3)}),
    "FSDP": ("lora and head", {"fsdp": True, "fsdp_config": {"version": 2}}),
}


def pretend(arguments: transformers.TrainingArguments) -> None:
    """Accelerate knows no FSDP on CPUs, and does without, unless it takes them for GPUs."""
    if arguments.fsdp:
        assert arguments.device.type == "cpu"
        accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU


def share(p: Tensor) -> int:
    """Elements of it that this rank has."""
    return (p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p)).numel()


def stepped(kind: str, folder: str, sharing: dict[str, Any], ranks: int) -> tuple[list[float], float]:
    """Losses and norms of clipped gradients of two steps, and an evaluation's loss; this rank's share of the model."""
    environment = dict(os.environ)
    import_deepspeed(torch.device("cpu"))
    given = {"max_grad_norm": 0.5, "learning_rate": 0.5, **sharing}
    try:
        mesh = Mesh.create(1, 2, 1) if ranks else None
        torch.manual_seed(0)
        trainer, _ = trainer_of(kind, folder, mesh, path=f"{folder}/model", arguments=given)
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
        trainer.train()
        mine = sum(share(p) for p in trainer.model.parameters())
        told = [line[name] for name in ("loss", "grad_norm") for line in trainer.state.log_history if name in line]
        return [*told, trainer.evaluate()["eval_loss"]], mine / whole
    finally:  # Accelerate's and Transformers' settings are those of the process
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)


def all_stepped(folder: str) -> list[tuple[list[float], float]]:
    return [stepped(kind, folder, sharing, 2) for kind, sharing in SHARDED.values()]


def test_ranks_that_share_a_model_have_the_losses_and_gradients_of_one_process(ranks, tmp_path, alone):
    model_of("llama").save_pretrained(tmp_path / "model")
    expected = [stepped(kind, str(tmp_path), {}, 0)[0] for kind, _ in SHARDED.values()]
    for found in ranks(2)(all_stepped, str(tmp_path)):
        for (told, mine), wanted, how in zip(found, expected, SHARDED, strict=True):
            assert len(told) == 5, how
            assert told == pytest.approx(wanted, rel=1e-5), how
            assert mine == pytest.approx(1.0 if how == "ZeRO-2" else 0.5, abs=0.01), how


def of_one_batch(folder: str, fused: bool, bf16: bool) -> tuple[float, list[Tensor], int]:
    """Loss and gradients, and how large what is called logits is."""
    mesh = Mesh.create(1, 1, 1)
    trainer, _ = trainer_of("lora", folder, mesh, fused=fused, arguments={"bf16": bf16})
    model = trainer.accelerator.prepare(trainer.model)
    batch = trainer.sharded(transformers.DataCollatorWithFlattening()(rows(4)))
    count = trainer.labels_of_all([batch])
    loss, out = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=count)
    loss.backward()
    assert not trainer.causal.get_output_embeddings().__dict__.get("forward")  # who calls it next has its logits
    return loss.item(), [p.grad for p in model.parameters() if p.requires_grad], out["logits"].numel()


def of_both(folder: str, bf16: bool) -> list[tuple[float, list[Tensor], int]]:
    return [of_one_batch(folder, fused, bf16) for fused in (False, True)]


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_are_not_needed(bf16, ranks, tmp_path):
    ((expected, grads, logits), (found, ours, instead)) = ranks(1)(of_both, str(tmp_path), bf16)[0]
    eps = 2.0**-8 if bf16 else 2.0**-23
    assert instead == 1
    assert logits % 101 == 0
    assert found == pytest.approx(expected, rel=4 * eps)
    for x, y in zip(ours, grads, strict=True):
        assert (x - y).abs().max() <= 64 * eps * y.abs().max()


def test_models_whose_loss_is_not_ours_are_refused_and_may_do_without(ranks, tmp_path, alone):
    def trainer(model: Any, **given: Any) -> RingTrainer:
        arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        return RingTrainer(model, arguments, attend=SequenceAttention(ALONE, "zigzag"), **given)

    gemma = model_of("gemma2")
    with pytest.raises(
        ValueError, match=r"Gemma2ForCausalLM: its logits are not hidden .*; RingTrainer\(..., fused=Fa"
    ):
        trainer(gemma)
    assert not trainer(gemma, fused=False).fused
    adapted = peft.get_peft_model(model_of("llama"), peft.LoraConfig(r=3, target_modules=["lm_head"]))
    with pytest.raises(
        ValueError, match="LlamaForCausalLM: its head has adapters, of which the fused loss knows nothing"
    ):
        trainer(adapted)


@pytest.mark.parametrize("n", [12, 10, 1])
@pytest.mark.parametrize("groups, sharing, batch", [(2, 2, 3), (1, 4, 2), (3, 1, 1)])
def test_ranks_of_a_ring_have_the_same_rows_and_rings_have_all(n, groups, sharing, batch):
    seeds = iter([0, 0, 1] * groups * sharing)
    world, epochs = groups * sharing, [[], [], []]
    for rank in range(world):
        sampler = SharedRows(RandomSampler(range(n)), batch, groups, sharing, lambda: next(seeds), False)
        mine = data_loader.BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), world, rank)
        for epoch in epochs:
            torch.manual_seed(rank)  # ranks may be anywhere in their random numbers
            epoch.append(list(mine))
            assert len(mine) == len(epoch[-1]) == -(-n // (batch * groups))
    first, again, other = epochs
    assert first == again
    assert first != other or n == 1
    for epoch in epochs:
        for rank in range(world):
            assert epoch[rank] == epoch[rank // sharing * sharing]
        seen = [row for group in epoch[::sharing] for rows_ in group for row in rows_]
        assert set(seen) == set(range(n))
        assert len(seen) == -(-n // (batch * groups)) * batch * groups


@pytest.mark.parametrize("n", [2, 6, 11])
def test_rows_left_over_are_left_out_if_asked_for(n):
    rows_ = list(SharedRows(SequentialSampler(range(n)), 3, 2, 2, lambda: 0, True))
    once, twice = rows_[:3], rows_[3:6]
    assert once == twice == ([0, 1, 2] if n >= 6 else [])
    assert set(rows_) == set(range(n // 6 * 6))
    assert len(rows_) == n // 6 * 12


def test_documents_begin_where_positions_do_and_padding_is_one_more():
    shape = torch.Size((2, 6))
    assert documents(shape, None, None) == [[6], [6]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert documents(shape, mask, None) == [[2, 4], [5, 1]]
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    assert documents(shape, None, positions) == [[2, 3, 1], [6]]
    assert documents(shape, mask, positions) == [[2, 3, 1], [5, 1]]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows(3)


def without_labels(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {"input_ids": padded(features)["input_ids"]}


def with_images(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {**padded(features), "pixel_values": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"compute_metrics": len}, "compute_metrics: not possible where a rank has a part of each row"),
        ({"compute_loss_func": len}, "compute_loss_func: not possible"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor: not possible"),
        ({"arguments": {"average_tokens_across_devices": False}}, "average_tokens_across_devices=False: not possible"),
        ({"arguments": {"train_sampling_strategy": "batch_rebalance"}}, "train_sampling_strategy=batch_rebalance: not"),
        ({"train_dataset": Stream()}, "Stream: ranks share rows by their numbers"),
        ({"data_collator": without_labels}, "labels: the collator gives none"),
        ({"data_collator": with_images}, "pixel_values: the collator may give input_ids, labels"),
    ],
)
def test_what_needs_whole_rows_is_refused(given, message, tmp_path, alone):
    with pytest.raises(ValueError, match=message):
        trainer_of("whole", str(tmp_path), ALONE, **given)[0].train()


def test_rows_that_are_shared_in_another_way_too_are_refused(monkeypatch, tmp_path, alone):
    monkeypatch.setattr(RingTrainer, "get_sp_size", lambda self: 2)  # as TrainingArguments(parallelism_config=) may say
    with pytest.raises(ValueError, match="Accelerate's own tensor or sequence parallelism: not possible"):
        trainer_of("whole", str(tmp_path), ALONE)


def test_the_example_learns(ranks):
    for found in ranks(2)(losses, "hf_trainer"):
        assert found[-1] < 0.5 * found[0]
