"""What every test gets: a quiet and offline environment, the pool of ranks, and no GPU tests where there is no GPU."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

# Before anything imports torch, wandb or datasets; subprocesses and ranks inherit it.
os.environ.update(
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_CONSOLE="off",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # ranks and launches share few cores
    TOKENIZERS_PARALLELISM="false",
)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ringspan-tests-")  # no cache read or left in the user's home

import pytest
import torch
from ranks import Ranks

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for one, and says so on each rank


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., Ranks]]:
    """`ranks(world)` is a pool of that many gloo processes, `ranks(world, cuda=True)` one with a GPU for each."""
    pools: dict[tuple[int, bool], Ranks] = {}

    def of(world: int, cuda: bool = False) -> Ranks:
        if cuda and torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs, and there are {torch.cuda.device_count()}")
        for pool in pools.values():
            if pool.open and pool.crowded:
                pool.close(kill=True)
        if (world, cuda) not in pools or not pools[world, cuda].open:
            pools[world, cuda] = Ranks(world, cuda)
        return pools[world, cuda]

    yield of
    for pool in pools.values():
        if pool.open:
            pool.close()
