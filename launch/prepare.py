"""Tokenise text once, into shards that training reads; killed, the same command goes on where it was.

python launch/prepare.py data.path=books/ out=prepared              a byte a token
python launch/prepare.py data.path=books/ out=prepared bpe=32768    trains a tokenizer on the text first
python launch/prepare.py data.path=hub:OWNER/NAME data.tokenizer=tokenizer.json out=prepared
python launch/train.py data.path=prepared
"""

import os
import signal
import sys
import time

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from tqdm import tqdm

from ringspan.train.command import CONF, run_hydra, values
from ringspan.train.corpus import Corpus
from ringspan.train.prepare import PrepareConfig, Read, prepare_folder

ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)
NAMED = 10  # of what was left out


def main() -> int:
    return run_hydra(on_job, "prepare.py", PrepareConfig, __doc__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="prepare")
def on_job(cfg: DictConfig) -> None:
    started = time.perf_counter()
    try:
        config = values(cfg, PrepareConfig)
        with Bars() as bars:
            corpus = prepare_folder(config, bars.start)
    except ValueError as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        os._exit(128 + signal.SIGINT)  # at once: else this process would wait until `train_bpe` is done
    say(summary(corpus, config.out, time.perf_counter() - started))


class Bars:
    """A progress bar for each part of the work, one after the other; none where nobody sees them."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def start(self, what: str, total: int | None) -> Read:
        self.close()
        # disable=None: only on a terminal
        self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, mininterval=0.5)
        return self.bar.update

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def summary(corpus: Corpus, out: str, seconds: float) -> str:
    n_tokens, n_bytes = len(corpus.tokens), int(corpus.bytes.sum())
    left_out = ", ".join(corpus.skipped[:NAMED]) + (", ..." if corpus.n_skipped > NAMED else "")
    return "\n".join(
        [
            f"{corpus.name}: {n_tokens:,} tokens, {len(corpus.bytes):,} documents"
            + (f", {n_bytes / n_tokens:.2f} bytes a token" if n_bytes else ""),
            *([f"left out: {corpus.n_skipped:,} files or rows: {left_out}"] if corpus.n_skipped else []),
            f"written in {seconds:.0f} s; to train: python launch/train.py data.path={out}",
        ]
    )


def say(text: str) -> None:
    print(f"prepare.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
