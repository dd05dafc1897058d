"""Kill toy runs at dangerous moments and resume them; print as JSON what differs.

    PYTHONPATH=tests/engine python tests/engine/kill_runs.py DIRECTORY STRIDE

kills at every STRIDE-th moment before or after a write, sync, rename or halfway through a
checkpoint (1 = at all of them), and at random times. Every run is a forked child, so that the
imports are paid once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from runs import differences, toy_config

from replknet.engine.logs import MetricLog
from replknet.engine.train import main

RANDOM_RUNS, KILLS_OF_A_RUN = 3, 4


def child(action: Callable[[], object], kill_after: float | None = None) -> bool:
    """Run ``action`` in a fork; whether it came to its end."""
    process = os.fork()
    if process == 0:
        action()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"a run failed with status {status}")
    return os.WIFEXITED(status)


class Moments:
    """Counts the moments at which a kill could hurt, and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count = kill_at, 0
        for owner, name in (
            *((os, name) for name in ("replace", "fsync", "rename")),
            (MetricLog, "write"),
        ):
            setattr(owner, name, self.before_and_after(getattr(owner, name)))
        torch.save = self.halfway(torch.save)

    def moment(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_and_after(self, function):
        def wrapped(*args, **kwargs):
            self.moment()
            result = function(*args, **kwargs)
            self.moment()
            return result

        return wrapped

    def halfway(self, save):
        def wrapped(content, file):
            file.write(b"half of a checkpoint")
            file.flush()
            self.moment()
            file.seek(0)
            save(content, file)

        return wrapped


def kill_runs(directory: Path, stride: int) -> dict[str, object]:
    """Kill, resume and compare with a run that was left alone."""

    def train(name: str) -> Callable[[], object]:
        return lambda: main(toy_config(directory / name))

    def train_and_count() -> None:
        moments = Moments(None)
        train("whole")()
        (directory / "count").write_text(str(moments.count))

    child(train_and_count)
    moments = int((directory / "count").read_text())
    found: dict[str, object] = {"moments": moments, "killed": 0, "differences": []}

    def check(name: str) -> None:
        child(train(name))
        wrong = differences(directory / name, directory / "whole")
        wrong += [str(path) for path in (directory / name).rglob("*.partial")]
        if wrong:
            found["differences"].append([name, wrong])

    for moment in range(1, moments + 1, stride):
        name = f"moment{moment}"

        def train_until_killed(moment: int = moment, name: str = name) -> None:
            Moments(moment)
            train(name)()

        found["killed"] += not child(train_until_killed)
        check(name)
    chance = random.Random(0)
    for number in range(RANDOM_RUNS):
        name = f"random{number}"
        for _ in range(KILLS_OF_A_RUN):
            found["killed"] += not child(train(name), kill_after=chance.uniform(0.05, 0.4))
        check(name)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_runs(Path(sys.argv[1]), int(sys.argv[2]))))
