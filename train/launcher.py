"""What Hydra makes sweeps with: our launcher, jobs side by side on one machine, and the watch over what it makes.

All jobs are composed and checked first, so that a mistake in the last is told before the first one trains; then they
run in order, each on fresh workers and GPUs of its own, as many at once as there are GPUs for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ringspan.parallel.workers import Job, WorkerError, gpus, launch_all, visible_gpus
from ringspan.train.sweep import last_loss, note

SAMPLERS = "optuna.samplers."  # what a sweep may be configured with besides a launcher and a sweeper


@dataclass
class SideBySideConfig:
    _target_: str = "ringspan.train.launcher.SideBySide"
    at_once: int | None = None  # jobs that run at once, at most; null: as there are GPUs for, 1 on a machine without


ConfigStore.instance().store(group="hydra/launcher", name="side_by_side", node=SideBySideConfig, provider="ringspan")


def side_by_side() -> bool:
    """Whether the job that is being composed is `SideBySide`'s: then its task returns a Job, to run later."""
    return HydraConfig.get().launcher._target_ == SideBySideConfig._target_


@contextmanager
def sweeps(say: Callable[[str], None]) -> Iterator[list[Path]]:
    """Inside, Hydra has our launcher, and the list gets the folder of each sweep, whatever launches its jobs.

    Hydra finds launchers in the namespace hydra_plugins alone, which would have to be installed; and it makes objects
    of any ``_target_`` below a launcher or a sweeper, of which we refuse all but Optuna's samplers.
    """
    folders: list[Path] = []
    launcher_of, sweeper_of = Plugins.instantiate_launcher, Plugins.instantiate_sweeper

    def instantiate_sweeper(plugins: Plugins, *, config: DictConfig, **given: Any) -> Sweeper:
        refuse_code(config)
        folders.append(Path(config.hydra.sweep.dir).absolute())
        return sweeper_of(plugins, config=config, **given)

    def instantiate_launcher(plugins: Plugins, *, config: DictConfig, **given: Any) -> Launcher:
        asked = config.hydra.launcher
        if asked._target_ != SideBySideConfig._target_:
            return launcher_of(plugins, config=config, **given)
        launcher = SideBySide(asked.at_once, say)
        launcher.setup(config=config, **given)
        return launcher

    changed: Any = Plugins
    changed.instantiate_launcher, changed.instantiate_sweeper = instantiate_launcher, instantiate_sweeper
    try:
        yield folders
    finally:
        changed.instantiate_launcher, changed.instantiate_sweeper = launcher_of, sweeper_of


def refuse_code(config: DictConfig) -> None:
    """HydraException: a launcher or a sweeper has an object of code in it, or names a function."""
    if OmegaConf.select(config, "hydra.sweeper.custom_search_space"):
        raise HydraException("hydra.sweeper.custom_search_space: a configuration cannot run code here; delete that key")
    for part in ("launcher", "sweeper"):
        for key, target in _targets(OmegaConf.to_container(config.hydra[part]), f"hydra.{part}"):
            if not (key == "hydra.sweeper.sampler" and str(target).startswith(SAMPLERS)):
                raise HydraException(f"{key}: a configuration cannot run code here; delete that key")


def _targets(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, _target_) of all parts below ``key``, whose own is the plugin."""
    for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(part, dict | list):
            if isinstance(part, dict) and "_target_" in part:
                yield f"{key}.{name}", part["_target_"]
            yield from _targets(part, f"{key}.{name}")


class SideBySide(Launcher):
    """``say`` gets a line when a job starts beside others, and when one fails."""

    def __init__(self, at_once: int | None, say: Callable[[str], None]) -> None:
        self.at_once, self.say = at_once, say

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """ValueError: fewer than one job at once."""
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"hydra.launcher.at_once={self.at_once}: must be 1 or more, or null for as many as fit")
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """The results of the jobs, in order: of each the loss, or the exception that says why there is none."""
        setup_globals()
        all_ = [self._compose(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        ready = [one for one in all_ if one.status is JobStatus.COMPLETED]
        at_once = min(self.at_once or (len(ready) if gpus() else 1), len(ready))

        def told(number: int, *outcome: object) -> None:
            if outcome:
                self._ended(ready[number], *outcome)
            else:
                self._starts(ready[number], at_once)

        launch_all([self._job(one, at_once) for one in ready], at_once, visible_gpus(), told)
        return all_

    def _compose(self, number: int, overrides: Sequence[str]) -> JobReturn:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _job(self, one: JobReturn, at_once: int) -> Job:
        """What several print at once would be a muddle: each has a file for it then."""
        job: Job = one.return_value
        return job._replace(output=str(Path(_folder(one), "output.log"))) if at_once > 1 else job

    def _starts(self, one: JobReturn, at_once: int) -> None:
        note(_folder(one), "running")
        if at_once > 1:
            self.say(f"job {_name(one)} starts; it prints to {_folder(one)}/output.log")

    def _ended(self, one: JobReturn, outcome: object) -> None:
        status = "stopped" if isinstance(outcome, SystemExit) else "failed" if _is_error(outcome) else "done"
        if status == "stopped":  # as at train.max_hours: it has a loss too
            outcome = last_loss(_folder(one))
        if _is_error(outcome):
            one.status = JobStatus.FAILED
        if status == "failed":
            self.say(f"job {_name(one)} failed: {outcome}")
        one.return_value = outcome
        note(_folder(one), status, str(outcome) if _is_error(outcome) else "")


def _is_error(outcome: object) -> bool:
    return isinstance(outcome, WorkerError)


def _folder(one: JobReturn) -> str:
    assert one.hydra_cfg is not None
    return one.hydra_cfg.hydra.runtime.output_dir


def _name(one: JobReturn) -> str:
    assert one.hydra_cfg is not None
    return f"{one.hydra_cfg.hydra.job.num} ({one.hydra_cfg.hydra.job.override_dirname})"
