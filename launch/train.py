"""Train a model.

torchrun --nproc_per_node=4 launch/train.py seq_len=65536    torchrun starts the workers; with --max-restarts=3 a run
                                                             goes on from its newest checkpoint when a rank has died
python launch/train.py seq_len=65536                         one process
python launch/train.py nproc=4 seq_len=65536                 starts 4 workers itself
python launch/train.py -m nproc=4 seq_len=16384,32768        a sweep: fresh workers for each job, 2 at once on 8 GPUs
python launch/train.py nproc=4 seq_len=65536 check=true      looks at configuration, data, memory and communication
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ringspan.parallel.mesh import across_hosts
from ringspan.parallel.workers import (
    Job,
    Place,
    check_devices,
    count_workers,
    first_to_tell,
    gpus,
    hand_over,
    launch,
    process_group,
    receive,
    run_on,
    tell,
    torchrun_place,
    under_torchrun,
)
from ringspan.train import restart, sweep
from ringspan.train.checkup import checkup
from ringspan.train.command import CONF, run_hydra
from ringspan.train.config import TrainConfig, check, typed
from ringspan.train.launcher import side_by_side, sweeps
from ringspan.train.loop import train

Task = Callable[[TrainConfig, str], object]


def main() -> int:
    if not under_torchrun():
        return with_hydra(run)
    place = torchrun_place()
    if place.rank == 0:
        return lead(place)
    job = receive(place.store)
    return work(place, *job) if job else 0


def run(config: TrainConfig, run_dir: str) -> object:
    """Here, if one process will do; the jobs of a sweep on fresh workers always, so that nothing leaks between them."""
    nproc = count_workers(config.nproc)
    check_machine(config, nproc, nproc)
    job = Job(*work_of(config, run_dir), nproc)
    if is_sweep() and side_by_side():
        return job
    if nproc < gpus():
        say(f"nproc={nproc} leaves {gpus() - nproc} of {gpus()} GPUs idle; nproc=0 takes all")
    if is_sweep():
        return launch(job.task, *job.args, nproc=nproc)
    return run_on(nproc, job.task, *job.args)


def work_of(config: TrainConfig, run_dir: str) -> tuple[Callable[..., object], tuple[object, ...]]:
    return (checkup, (config,)) if config.check else (train, (config, run_dir))


def lead(place: Place) -> int:
    """Rank 0 under torchrun reads the configuration, for all: one run folder, one message about a mistake."""
    handed_over = False

    def give(job: tuple[TrainConfig, str] | None) -> None:
        nonlocal handed_over
        if not handed_over:
            hand_over(place.store, job)
        handed_over = True

    def on_job(config: TrainConfig, run_dir: str) -> object:
        local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        if is_sweep():  # every job needs fresh processes, which this one starts; the others may go home
            if place.world > local_world:
                sys.exit("A sweep under torchrun runs on one node: start it on each node, or without torchrun.")
            give(None)
            config.nproc = local_world
            return run(config, run_dir)
        check_machine(config, place.world, local_world)
        restart.remember(config.name, run_dir)
        give((config, run_dir))
        if code := work(place, config, run_dir):
            sys.exit(code)
        return None

    try:
        sys.argv[1:] = restart.arguments(sys.argv[1:])
        return with_hydra(on_job)
    except ValueError as error:
        say(tell(error))
        return 1
    finally:
        give(None)  # --help, --cfg or a mistake: there is no job


def work(place: Place, config: TrainConfig, run_dir: str) -> int:
    """A worker under torchrun. Of all that fail, the first alone says why."""
    try:
        task, args = work_of(config, run_dir)
        with process_group(place):
            task(*args)
        return 0
    except Exception as error:
        if first_to_tell(place.store):
            say(tell(error))
        return 1


def check_machine(config: TrainConfig, world: int, local_world: int) -> None:
    check_devices(local_world)
    check(config, world, "cuda" if gpus() else "cpu")
    hosts = [f"host {rank // local_world}" for rank in range(world)]
    if warning := across_hosts(config.parallel.ulysses, hosts):
        say(f"WARNING: {warning}")


def is_sweep() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def with_hydra(task: Task) -> int:
    """Call ``task(config, run_dir)`` for the command line: once, or for each job of a sweep. Returns the exit code."""

    @hydra.main(version_base="1.3", config_path=CONF, config_name="train" if gpus() else "train_cpu")
    def on_job(cfg: DictConfig) -> object:
        if is_sweep():
            return in_sweep(task, cfg)
        try:
            return task(*settled(cfg))
        except Exception as error:
            say(tell(error))
            sys.exit(1)
        finally:
            forget_if_empty(Path(HydraConfig.get().runtime.output_dir))

    with sweeps(say) as folders:
        try:
            return run_hydra(on_job, "train.py", TrainConfig)
        except Exception as error:
            if isinstance(error, OSError):  # Hydra keeps a copy of the command in the run's folder
                say(f"run_dir: {error.strerror} ({error.filename}); give a folder that can be written")
            elif not folders:
                raise
            elif not any(row["status"] == "failed" for folder in folders for row in sweep.results(folder)):
                say(tell(error))  # else it is a job's, which has been told
            return 1
        finally:
            for table in filter(None, map(sweep.finish, folders)):
                print(table, flush=True)


def in_sweep(task: Task, cfg: DictConfig) -> object:
    """What Hydra goes on from, and sweepers learn from: the result, an exception, or a Job for later."""
    h, later = HydraConfig.get(), side_by_side()
    try:
        return sweep.noted(h.runtime.output_dir, h.job.num, h.overrides.task, lambda: task(*settled(cfg)), later=later)
    except Exception as error:
        say(f"job {job_name()} failed: {tell(error)}")
        raise


def settled(cfg: DictConfig) -> tuple[TrainConfig, str]:
    """The checked configuration of a job, and its folder."""
    config, run_dir = typed(cfg), HydraConfig.get().runtime.output_dir
    config.run_dir = run_dir
    if is_sweep():
        if config.check:
            raise ValueError("check=true: looks at one run; all of a sweep are checked before its first starts")
        config.logger.group = config.logger.group or Path(HydraConfig.get().sweep.dir).name
        config.name = f"{config.name}-{HydraConfig.get().job.num}"
    return config, run_dir


def job_name() -> str:
    job = HydraConfig.get().job
    return f"{job.num} ({job.override_dirname})"


def forget_if_empty(run_dir: Path) -> None:
    """A run that never started, or was looked at, leaves no folder: it has no file but Hydra's copy of the command."""
    if all(path.is_dir() or path.parent.name == ".hydra" for path in run_dir.rglob("*")):
        shutil.rmtree(run_dir)


def say(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
