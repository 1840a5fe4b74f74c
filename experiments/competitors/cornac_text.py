"""Cornac's CTR, CDL and CVAE on a published split of CiteULike-t, measured as vectors of experiments.export are.

python3 -m venv DIR && DIR/bin/pip install -r experiments/competitors/cornac.txt
DIR/bin/python experiments/competitors/cornac_text.py --data=FOLDER --train_size=10 --model=cvae --out=cvae_p10.json
DIR/bin/python experiments/competitors/cornac_text.py --data=FOLDER --train_size=10 --vectors=EXPORT --out=ours_p10.json

EXPORT must be written with --history=train, of a run with train.refit "none": the default has the test papers in it.
Every tenth user is left out, since the dataset has their test papers for validation.
Settings are the defaults of the package (CDL: one hidden layer of 200, as in its example). Texts are the words of the
abstracts, as in the papers: compare with the dataset citeulike_t_p10_words. Recall@M is the mean over users with test
papers of hits / test papers, over all papers that are not in the user's train, as in the papers on CDL and CVAE.
"""
# pyright: reportMissingImports=false

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np

KS = (10, 20, 50, 100, 150, 200, 250, 300)
VOCABULARY = 8000
VALID_USERS = 10  # of fused_rec/data/sources/citeulike.py


def lines(path: Path) -> list[str]:
    """The lines of a published file, plain or .gz."""
    packed = path.with_name(f"{path.name}.gz")
    return (gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()).decode().splitlines()


def lists(path: Path) -> list[np.ndarray]:
    """The papers of each user."""
    return [np.array(line.split()[1:], np.int64) for line in lines(path)]


def words(folder: Path) -> list[str]:
    """The words of each abstract, each as often as it occurs."""
    vocabulary = [line.strip() for line in lines(folder / "vocabulary.dat")]
    counted = [[entry.split(":") for entry in line.split()[1:]] for line in lines(folder / "mult.dat")]
    return [" ".join(" ".join([vocabulary[int(word)]] * int(count)) for word, count in entries) for entries in counted]


def recall(users: np.ndarray, items: np.ndarray, train: list[np.ndarray], test: list[np.ndarray]) -> dict[str, float]:
    """Mean Recall@M over the users with test papers, without those of the validation split."""
    found = {k: [] for k in KS}
    for user, (seen, truth) in enumerate(zip(train, test, strict=True)):
        if len(truth) and user % VALID_USERS:
            scores = items @ users[user]
            scores[seen] = -np.inf
            first = np.argpartition(-scores, max(KS))[: max(KS)]
            hits = np.isin(first[np.argsort(-scores[first], kind="stable")], truth)
            for k in KS:
                found[k].append(hits[:k].sum() / len(truth))
    return {f"recall@{k}": float(np.mean(values)) for k, values in found.items()}


def exported(path: Path) -> np.ndarray:
    """The vectors of a file of experiments.export, in the order of the published files."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        ids = np.array(json.loads(file.metadata()["ids"]), np.int64)
        vectors = np.empty(file.get_slice("vectors").get_shape(), np.float32)
        vectors[ids] = file.get_tensor("vectors")
    return vectors


def trained(name: str, train: list[np.ndarray], texts: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """User and item vectors of a model of Cornac."""
    from cornac.data import Dataset, TextModality
    from cornac.models import CDL, CTR, CVAE

    users = {str(user): user for user in range(len(train))}
    items = {str(item): item for item in range(len(texts))}
    rows = [(str(user), str(item), 1.0) for user, papers in enumerate(train) for item in papers]
    bags = TextModality(corpus=texts, ids=list(items), max_vocab=VOCABULARY, max_doc_freq=0.5, stop_words="english")
    bags.build(id_map=items)
    dataset = Dataset.build(rows, global_uid_map=users, global_iid_map=items, seed=seed)
    dataset.add_modalities(item_text=bags)
    model = {
        "ctr": lambda: CTR(k=50, seed=seed),
        "cdl": lambda: CDL(k=50, autoencoder_structure=[200], vocab_size=VOCABULARY, seed=seed),
        "cvae": lambda: CVAE(z_dim=50, input_dim=VOCABULARY, vae_layers=[200, 100], seed=seed),
    }[name]().fit(dataset)
    return np.asarray(model.U), np.asarray(model.V)


def main():
    """Measures one model, and writes one JSON."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=Path, required=True, help="folder of the published files")
    flags.add_argument("--train_size", type=int, choices=(1, 10), required=True, help="P of the published split")
    measured_side = flags.add_mutually_exclusive_group(required=True)
    measured_side.add_argument("--model", choices=("ctr", "cdl", "cvae"))
    measured_side.add_argument("--vectors", type=Path, help="folder of experiments.export --history=train")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, required=True)
    given = flags.parse_args()
    train, test = (lists(given.data / f"cf-{part}-{given.train_size}-users.dat") for part in ("train", "test"))
    began = time.monotonic()
    if given.vectors:
        users, items = (exported(given.vectors / f"{name}.safetensors") for name in ("users", "items"))
    else:
        users, items = trained(given.model, train, words(given.data), given.seed)
    seconds = time.monotonic() - began
    measured = {"model": given.model or "vectors", "train_size": given.train_size, "seed": given.seed}
    measured |= {"seconds": seconds} | recall(users.astype(np.float32), items.astype(np.float32), train, test)
    given.out.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
