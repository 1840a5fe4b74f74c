"""Every config is a task that can be prepared; new users and items are ranked by what is known of them."""

import dataclasses
import importlib
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from pretrained import model_of_width

from experiments import configs
from fused_rec.config import Config, SplitConfig, from_dict
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.node_texts import ITEM, node_texts
from fused_rec.data.sources.registry import load
from fused_rec.data.splits import SPLIT_NAMES, Split, observe, split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.studies.tune import with_settings
from fused_rec.text import features
from fused_rec.training import inputs as preparing
from fused_rec.training import trainer
from fused_rec.training.evaluate import evaluate_mean, scorer
from fused_rec.training.inputs import Prepared
from fused_rec.training.train_step import TrainState

TASKS = sorted(file.stem for file in Path(configs.__file__).parent.glob("*.py") if file.stem != "__init__")


def config_of(config_name: str) -> Config:
    return from_dict(importlib.import_module(f"experiments.configs.{config_name}").get_config().to_dict())


@pytest.mark.parametrize("config_name", TASKS)
def test_a_task_says_how_to_run_it(config_name):
    texts_given = importlib.import_module(f"experiments.configs.{config_name}").__doc__
    assert texts_given is not None
    assert config_name == "tables" or f"--config=experiments/configs/{config_name}.py" in texts_given
    config_of(config_name)


def new_items(data_split: Split) -> np.ndarray:
    """The items that a new-items split holds back."""
    assert data_split.valid_candidates is not None and data_split.test_candidates is not None
    return np.concatenate([data_split.valid_candidates, data_split.test_candidates])


# Rows of train, valid and test; users of the test part, and those of them who hold nothing that may be seen; items of
# the test part, and those of them that nobody holds that may be seen.
COUNTS = {
    "amazon": (6207, 1515, 2539, 1429, 0, 790, 10),
    "amazon_time": (7396, 812, 2053, 586, 157, 700, 12),
    "citeulike_t": (97099, 10789, 26972, 6004, 52, 13435, 1332),
    "douban_book": (430857, 47873, 119690, 10882, 221, 19075, 104),
    "epinions": (246551, 27395, 64454, 18202, 0, 25428, 1925),
    "gowalla": (729115, 81013, 217242, 29858, 0, 38546, 1),
    "insurance": (48951, 5329, 5855, 4887, 4126, 16, 0),
    "lastfm": (66840, 7427, 18567, 1881, 0, 6440, 2410),
    "lastfm_lightgcn": (37921, 4214, 10533, 1858, 2, 3285, 31),
    "lastfm_new_items": (66034, 7766, 19034, 1880, 1, 3526, 3526),
    "ml_100k": (79228, 10333, 10439, 943, 0, 1256, 20),
    "stocknet": (56378, 6263, 15659, 1317, 653, 1553, 130),
    "synthetic": (19409, 2157, 5391, 1667, 0, 394, 0),
    "synthetic_new_items": (18718, 2217, 6022, 1762, 0, 80, 80),
    "synthetic_new_users": (19226, 2135, 5596, 400, 400, 398, 0),
}


def test_every_task_is_counted():
    assert sorted(COUNTS) == [config_name for config_name in TASKS if config_name != "tables"]


@pytest.mark.parametrize("config_name", COUNTS)
def test_a_task_splits_as_it_says(config_name):
    config = config_of(config_name)
    if config.data.name != "synthetic" and "FUSED_REC_DATA" not in os.environ:
        pytest.skip("set FUSED_REC_DATA to the folder of the real datasets")
    dataset = load(config.data)
    data_split = split(dataset, config.split)
    user, item = (column(dataset.interactions, name) for name in ("user", "item"))
    known = observe(dataset, data_split)
    users, items = (np.unique(of_row[data_split.test]) for of_row in (user, item))
    counted = (
        *(len(getattr(data_split, part)) for part in SPLIT_NAMES),
        *(len(users), len(np.setdiff1d(users, known.user)), len(items), len(np.setdiff1d(items, known.item))),
    )
    assert counted == COUNTS[config_name]
    if config.split.kind == "new_items":  # their words are all that is known
        texts_given = node_texts(dataset, known)
        assert np.isin(new_items(data_split), texts_given.links[ITEM].nodes).all()


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to the folder of the real datasets")
def test_douban_book_takes_steps(tmp_path):
    config = with_settings(config_of("douban_book"), {"model.dim": 4, "model.num_layers": 1, "train.batch_size": 32})
    dataset, data_split = preparing.read(config)
    prepared = preparing.prepare(config, dataset, data_split)
    assert {relation.name for relation, count in prepared.graph_inputs.graph.relations if count} == {
        *("holds", "held_by", "trust")  # mutual, every one
    }
    state, _ = trainer.fit(config, prepared, tmp_path, steps=2)
    assert int(state.step) == 2


# --- new users and items of a small market, its texts encoded by a made-up encoder


@pytest.fixture(scope="module", autouse=True)
def encoder():
    """Words of 12 numbers, each text's own."""

    def embed(texts, model, **_):
        vectors = [np.random.default_rng(list(text.encode())).standard_normal(12) for text in texts]
        return np.stack(vectors).astype(np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "open_model", lambda name, **_: model_of_width(12))
        patch.setattr(features, "encode_texts", embed)
        yield


SMALL = {
    **{"model.dim": 8, "model.num_layers": 2, "graph.text_knn": 0},
    **{"train.batch_size": 32, "train.max_steps": 4, "train.eval_every": 4, "train.learning_rate": 0.05},
}


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table.schema.field(name).type))


def without(dataset: Dataset, users: np.ndarray, *, words: bool, ties: bool) -> Dataset:
    """The dataset in which these users have no words of their own, or no ties."""
    if words:
        texts = dataset.users.column("text").to_pylist()
        texts_given = [None if row in users else text for row, text in enumerate(texts)]
        dataset = dataclasses.replace(dataset, users=replaced(dataset.users, "text", texts_given))
    if ties:
        tied = np.isin(column(dataset.ties, "source"), users) | np.isin(column(dataset.ties, "target"), users)
        dataset = dataclasses.replace(dataset, ties=dataset.ties.filter(pa.array(~tied)))
    return dataset


@pytest.fixture(scope="module")
def new_users() -> tuple[Dataset, Split, np.ndarray]:
    """Four users of the test part: 0 has words and ties, 1 words alone, 2 ties alone, 3 nothing at all."""
    market = make_synthetic(0, n_users=120, n_items=25)
    data_split = split(market, SplitConfig(kind="new_users"))
    held = np.setdiff1d(column(market.interactions, "user")[data_split.train], [])
    source, target = (column(market.ties, name) for name in ("source", "target"))
    asked = source[np.isin(target, held)]  # they have a neighbor with interactions
    reported = np.flatnonzero(np.array(market.users.column("text").is_valid()))
    test = np.unique(column(market.interactions, "user")[data_split.test])
    four = np.intersect1d(np.intersect1d(test, asked), reported)[:4]
    assert len(four) == 4
    market = without(market, four[[1]], words=False, ties=True)
    market = without(market, four[[2]], words=True, ties=False)
    market = without(market, four[[3]], words=True, ties=True)
    return market, data_split, four


def trained(config: Config, dataset: Dataset, data_split: Split, folder: Path) -> tuple[Prepared, TrainState]:
    prepared = preparing.prepare(config, dataset, data_split)
    return prepared, trainer.fit(config, prepared, folder)[0]


@pytest.mark.parametrize("user_id_embedding", [False, True])
def test_new_users_are_scored_by_their_words_and_ties(new_users, tmp_path, user_id_embedding):
    dataset, data_split, four = new_users
    config = with_settings(Config(), SMALL | {"model.user_id_embedding": user_id_embedding})
    prepared, state = trained(config, dataset, data_split, tmp_path)
    assert not np.isin(four, prepared.observed.user).any()
    scores = np.asarray(scorer(config, prepared, state)(jnp.asarray(four, jnp.int32)))
    assert np.isfinite(scores).all()
    # Nothing but how many hold them tells products apart for a user of whom nothing is known, id row or not.
    held = np.bincount(prepared.observed.item, minlength=dataset.n_items)
    popularity = config.model.popularity_weight * config.train.temperature * np.log1p(held)
    spread = (scores - popularity).std(axis=1)
    assert (spread[:3] > 1e-3).all()
    np.testing.assert_allclose(scores[3], popularity, rtol=1e-5, atol=1e-6)
    assert 0 < evaluate_mean(prepared, scorer(config, prepared, state), "test")["auc"] < 1


def test_the_id_row_of_a_user_of_whom_nothing_is_known_is_never_trained(new_users, tmp_path):
    """What it gives is the draw it started from, shrunk by weight decay; friends train the row of one who is tied."""
    dataset, data_split, four = new_users
    config = with_settings(Config(), SMALL | {"model.user_id_embedding": True, "train.weight_decay": 0.0})
    prepared, state = trained(config, dataset, data_split, tmp_path)
    before = np.asarray(trainer.init_state(config, prepared).params["main"]["id_user"])[four]
    after = np.asarray(state.params["main"]["id_user"])[four]
    np.testing.assert_array_equal(after[[1, 3]], before[[1, 3]])
    assert (np.abs(after - before)[[0, 2]].max(1) > 1e-3).all()


def test_new_items_are_ranked_by_their_words_alone(tmp_path):
    """Two new items that exchange their words exchange their scores, which the text branch gives alone."""
    market = make_synthetic(0, n_users=120, n_items=25)
    data_split = split(market, SplitConfig(kind="new_items"))
    assert data_split.test_candidates is not None
    one, other = data_split.test_candidates[:2].tolist()
    texts = market.items.column("text").to_pylist()
    texts[one], texts[other] = texts[other], texts[one]
    swapped = dataclasses.replace(market, items=replaced(market.items, "text", texts))

    config = with_settings(Config(), SMALL | {"train.weight_decay": 0.0})
    prepared, state = trained(config, market, data_split, tmp_path)
    new = new_items(data_split)
    assert not np.isin(new, prepared.observed.item).any()
    assert not np.asarray(prepared.graph_inputs.trained_items)[new].any()
    start = np.asarray(trainer.init_state(config, prepared).params["main"]["id_item"])
    np.testing.assert_array_equal(np.asarray(state.params["main"]["id_item"])[new], start[new])

    users = jnp.arange(120, dtype=jnp.int32)
    scores = np.asarray(scorer(config, prepared, state)(users))
    again = np.asarray(scorer(config, preparing.prepare(config, swapped, data_split), state)(users))
    assert (scores[:, [one, other]].std(axis=0) > 1e-3).all()
    assert np.abs(scores[:, one] - scores[:, other]).max() > 1e-3
    np.testing.assert_allclose(scores[:, [one, other]], again[:, [other, one]], atol=1e-5)

    by_words = with_settings(config, {"model.variant": "text"})
    branch = dataclasses.replace(state, params={"main": state.params["words"]})
    alone = np.asarray(scorer(by_words, prepared, branch)(users))
    np.testing.assert_allclose(scores[:, new], alone[:, new], atol=1e-5)
    held = np.setdiff1d(np.arange(25), new)
    assert (np.abs(scores - alone)[:, held].max(axis=0) > 1e-3).all()


def test_items_that_no_user_is_seen_to_hold_are_no_alternatives_in_training():
    """Held back by the split or held by nobody at all; with the validation part seen, its items are there."""
    market = make_synthetic(0, n_users=40, n_items=25)
    kept = np.isin(column(market.interactions, "item"), [3, 7], invert=True)
    market = dataclasses.replace(market, interactions=market.interactions.filter(pa.array(kept)))
    data_split = split(market, SplitConfig(kind="new_items"))
    assert data_split.valid_candidates is not None and data_split.test_candidates is not None
    item = column(market.interactions, "item")
    for parts, rows in (
        (("train",), data_split.train),
        (("train", "valid"), np.concatenate([data_split.train, data_split.valid])),
    ):
        there = preparing.trained_item_mask(market, observe(market, data_split, parts))
        assert there.dtype == bool
        assert np.flatnonzero(there).tolist() == sorted(set(item[rows].tolist()))
        assert not there[[3, 7]].any() and not there[data_split.test_candidates].any()
        assert there[np.setdiff1d(data_split.valid_candidates, [3, 7])].any() == ("valid" in parts)
