"""Trains a model on a dataset and evaluates it on the held-out splits.

    python -m experiments.train --config=experiments/configs/lastfm.py --workdir=runs/lastfm

The same command resumes a stopped run. All settings are flags: --config.model.dim=128. --config.model.method names a
published method, such as lightgcn or ease, to be trained in place of the model (docs/commands.md).

For a finished run it reads the tables again and prints the stored results. If tables have changed, it names the changes
and exits with status 3; if they cannot be read, with status 4.

With --init_from, training starts from the parameters of an earlier run; rows of ID embeddings are matched by id
(docs/DAILY.md).

With several processes, each with its own devices, run the same command in each: with --distributed where the cluster
assigns the processes (SLURM, Open MPI, Kubernetes, Cloud TPU), else with --coordinator, --num_processes and
--process_id.
"""

from absl import flags

from fused_rec.commands.launch import command_named, config_of
from fused_rec.commands.places import DEFINE_config, DEFINE_path, existing_folder, new_folder

CONFIG = DEFINE_config()
WORKDIR = DEFINE_path("workdir", new_folder, "Folder of the run: checkpoints, curves, results.json.", required=True)
INIT_FROM = DEFINE_path(
    "init_from", existing_folder, "Folder of a finished run on earlier tables, whose parameters training starts from."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Run as one of several processes, set up from the cluster's environment."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, without a supported cluster.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
SHOWN = ("recall@10", "ndcg@10", "auc")


def main(argv: list[str]) -> None:
    """Trains, and prints the results and the paths."""
    from fused_rec.distributed import processes
    from fused_rec.runs.model_card import describe_training
    from fused_rec.training.trainer import run_training

    config = config_of(CONFIG.value)
    given = COORDINATOR.value, PROCESSES.value, PROCESS.value
    if DISTRIBUTED.value or any(part is not None for part in given):
        processes.connect(*given)
    results = run_training(config, WORKDIR.value, INIT_FROM.value)
    if not processes.is_primary():
        return
    for part in ("valid", "test"):
        print(
            f"{part:5}  "
            + "  ".join(f"{name} {results[part][name]:.4f}" for name in SHOWN if results[part][name] is not None)
        )
    print(f"served model: {describe_training(results)}")
    print(f"finished: {results.get('finished', 'at a time that is not recorded')}")
    print(f"results: {WORKDIR.value}/results.json")
    print(f"rank products: {command_named('recommend')} --workdir={WORKDIR.value} --k=10 --out=ranked.csv")
