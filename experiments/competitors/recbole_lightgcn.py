"""RecBole's LightGCN: its dataset, its trainer's step, its full ranking."""
# pyright: reportMissingImports=false

from collections.abc import Callable

import numpy as np
from protocol import Arrays, Job, answer

NEEDS = ("torch", "recbole.trainer", "recbole.model.general_recommender")


def opened(job: Job, arrays: Arrays):
    """(trainer, dataset, its held-out part) with the job's rows as embeddings."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.general_recommender import LightGCN
    from recbole.trainer import Trainer

    settings = {
        "data_path": job["atomic"],  # folder; below it pairs/pairs.{train,test}.inter
        "benchmark_filename": ["train", "test", "test"],
        "load_col": {"inter": ["user_id", "item_id"]},
        "embedding_size": arrays["rows"].shape[1],
        "n_layers": job["num_layers"],
        "reg_weight": 1e-4,
        "learning_rate": job["learning_rate"],
        "train_batch_size": arrays["batch_user"].shape[1],
        "eval_batch_size": job["batch"] * int(arrays["shape"][1]),  # RecBole counts scores, not users
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "RO", "group_by": "user", "mode": "full"},
        "metrics": ["Recall", "NDCG"],
        "valid_metric": f"NDCG@{job['k']}",
        "topk": [job["k"]],
        "metric_decimal_place": 8,
        "use_gpu": False,
        "state": "WARNING",
        "checkpoint_dir": job["atomic"],
        "show_progress": False,
    }
    config = Config(model="LightGCN", dataset="pairs", config_dict=settings)
    torch.set_num_threads(job["threads"])
    dataset = create_dataset(config)
    train, _, test = data_preparation(config, dataset)
    model = LightGCN(config, train.dataset)
    n_users = int(arrays["shape"][0])
    tables = (
        (model.user_embedding.weight, arrays["rows"][:n_users]),
        (model.item_embedding.weight, arrays["rows"][n_users:]),
    )
    with torch.no_grad():
        for (weight, rows), place in zip(tables, places(dataset, arrays), strict=True):
            known = place > 0  # 0 is RecBole's padding; who occurs in no pair is not there
            weight[torch.from_numpy(place[known])] = torch.from_numpy(rows[known])
    return Trainer(config, model), dataset, test


def places(dataset, arrays: Arrays) -> list[np.ndarray]:
    """Of each user, and of each item, its number in RecBole; 0 where it has none."""
    found = []
    for field, count in zip(("user_id", "item_id"), arrays["shape"], strict=True):
        tokens = dataset.field2id_token[field][1:].astype(np.int64)
        place = np.zeros(count, np.int64)
        place[tokens] = np.arange(1, len(tokens) + 1)
        found.append(place)
    return found


def step(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """What the trainer does with a batch."""
    import torch
    from recbole.data.interaction import Interaction

    trainer, dataset, _ = opened(job, arrays)
    of_user, of_item = places(dataset, arrays)
    names = "user_id", "item_id", "neg_item_id"
    triples = [
        Interaction({name: torch.from_numpy(ids) for name, ids in zip(names, triple, strict=True)})
        for triple in zip(
            of_user[arrays["batch_user"]], of_item[arrays["batch_item"]], of_item[arrays["batch_other"]], strict=True
        )
    ]
    trainer.model.train()

    def call(number: int) -> float:
        trainer.optimizer.zero_grad()
        loss = trainer.model.calculate_loss(triples[number % len(triples)])
        loss.backward()
        trainer.optimizer.step()
        return float(loss.detach())

    return call


def measure(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """Recall at k (and NDCG, which comes with it) of every user with held-out items, from the given vectors."""
    trainer, _, test = opened(job, arrays)
    model = trainer.model
    # Vectors that are there are not propagated again.
    model.restore_user_e, model.restore_item_e = (
        model.user_embedding.weight.detach(),
        model.item_embedding.weight.detach(),
    )
    return lambda number: trainer.evaluate(test, load_best_model=False)[f"recall@{job['k']}"]


if __name__ == "__main__":
    answer({"step": (NEEDS, step), "measure": (NEEDS, measure)}, ("recbole", "torch", "numpy", "scipy"))
