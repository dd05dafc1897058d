"""Train on a Slurm cluster with submitit (``pip install submitit``).

    python examples/train_on_slurm.py --nodes 4 --gpus 8 --partition gpu -- \
        --config replknet_31b_1k_pretrain_224 --data.root /data/imagenet

What follows ``--`` is what ``replknet train`` takes. ``--cluster local`` starts the processes on
this machine instead. A job that is preempted or reaches its time limit is queued again, and
continues its run at the step it had reached.
"""

from __future__ import annotations

import argparse
import sys

import submitit

from replknet.cli.main import main


class Train:
    """One process of the job."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> int:
        # RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, which are all that training looks at
        submitit.helpers.TorchDistributedEnvironment().export()
        return main(["train", *self.arguments])

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called before preemption: the same call again, as a run resumes by itself."""
        return submitit.helpers.DelayedSubmission(self)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the job, and those of ``replknet train`` after ``--``."""
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="processes of each node")
    parser.add_argument("--cpus", type=int, default=10, help="processors of each process")
    parser.add_argument("--minutes", type=int, default=60 * 24)
    parser.add_argument("--partition")
    parser.add_argument("--logs", default="runs/slurm")
    return parser.parse_args(words[:split]), words[split + 1 :]


def submit(words: list[str]) -> None:
    """Queue the job and print its number."""
    options, training = parse(words)
    executor = submitit.AutoExecutor(options.logs, cluster=options.cluster)
    on_slurm = options.cluster == "slurm"
    executor.update_parameters(
        nodes=options.nodes,
        tasks_per_node=options.gpus,
        gpus_per_node=options.gpus if on_slurm else 0,
        cpus_per_task=options.cpus,
        timeout_min=options.minutes,
        **({"slurm_partition": options.partition} if options.partition else {}),
    )
    job = executor.submit(Train(training))
    print(f"job {job.job_id}, logs in {options.logs}")
    if not on_slurm:
        print(job.results())


if __name__ == "__main__":
    submit(sys.argv[1:])
