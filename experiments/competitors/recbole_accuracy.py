"""RecBole's models, trained and measured by RecBole on a split of ours (docs/RESULTS.md, MovieLens 100k).

    python experiments/competitors/recbole_accuracy.py FOLDER MODEL [SETTING=VALUE ...]

FOLDER has pairs/pairs.{train,valid,test}.inter, each with the columns user_id:token and item_id:token. Settings that
are not given are RecBole's defaults. It needs the environment of recbole.txt, and prints one line of JSON.
"""
# pyright: reportMissingImports=false

import copy
import json
import sys

import yaml


def measured(folder: str, model: str, settings: dict) -> dict:
    """Trains on the file `train`, stops by `valid`, and returns RecBole's metrics on `valid` and `test`."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    files = {"data_path": folder, "benchmark_filename": ["train", "valid", "test"]}
    shown = {"use_gpu": False, "state": "WARNING", "show_progress": False, "metric_decimal_place": 4}
    columns = {"load_col": {"inter": ["user_id", "item_id"]}}
    config = Config(model=model, dataset="pairs", config_dict=files | shown | columns | settings)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, get_model(model)(config, train.dataset))
    # The best state is kept here: RecBole 1.2.1 writes it as a pickle, which torch no longer reads by default.
    best = {}
    trainer._save_checkpoint = lambda *_, **__: best.update(copy.deepcopy(trainer.model.state_dict()))
    _, found = trainer.fit(train, valid, verbose=False, show_progress=False)
    trainer.model.load_state_dict(best)
    return {"valid": found, "test": trainer.evaluate(test, load_best_model=False, show_progress=False)}


if __name__ == "__main__":
    folder, model, *changed = sys.argv[1:]
    sys.argv = sys.argv[:1]  # RecBole reads them too
    settings = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in changed)}
    print(json.dumps({"model": model, **settings, **measured(folder, model, settings)}))
