"""Writes the split of a config as RecBole's benchmark files, for `recbole_accuracy.py`.

    PYTHONPATH=. python experiments/competitors/split_files.py experiments/configs/ml_100k.py FOLDER

FOLDER/pairs/pairs.{train,valid,test}.inter have the pairs of user and item, without ratings and times.
"""

import runpy
import sys
from pathlib import Path

from fused_rec.commands.launch import config_of
from fused_rec.data.sources.registry import load
from fused_rec.data.splits import SPLIT_NAMES, split

if __name__ == "__main__":
    config = config_of(runpy.run_path(sys.argv[1])["get_config"]())
    dataset = load(config.data)
    parts, folder = split(dataset, config.split), Path(sys.argv[2], "pairs")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = dataset.interactions
    users = dataset.users["user_id"].take(pairs["user"].combine_chunks()).to_pylist()
    items = dataset.items["item_id"].take(pairs["item"].combine_chunks()).to_pylist()
    for name in SPLIT_NAMES:
        rows = "".join(f"{users[row]}\t{items[row]}\n" for row in getattr(parts, name).tolist())
        (folder / f"pairs.{name}.inter").write_text(f"user_id:token\titem_id:token\n{rows}", encoding="utf-8")
