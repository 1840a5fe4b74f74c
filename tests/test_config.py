"""Settings: their way to JSON and back, and what every refusal says."""

import dataclasses
import json
import runpy
import typing
from pathlib import Path

import numpy as np
import pytest

from fused_rec import config as C  # noqa: N812
from fused_rec.config import (
    Config,
    DataConfig,
    GraphConfig,
    ModelConfig,
    SplitConfig,
    TextConfig,
    TrainConfig,
    differing,
    from_dict,
    to_dict,
)

CHANGED = Config(
    data=DataConfig(name="lastfm", path="somewhere", repair=True, k_core=5, seed=3, min_value=-1.5),
    split=SplitConfig(kind="time", test=0.3, valid=0.05, seed=1),
    text=TextConfig(tfidf_dim=0, features="shuffled"),
    graph=GraphConfig(attributes=("sector", "issuer"), text_knn=0),
    model=ModelConfig(
        variant="text",
        dim=8,
        num_layers=0,
        score="dot",
        relation_gates=False,
        popularity_weight=1.0,
        id_embedding_dropout=0.0,
    ),
    train=TrainConfig(loss="bpr", temperature=1.0, metric="recall@20", refit="valid"),
)

# The module as users run it: the type checker of the tests would refuse an unknown choice before config.py can.
UNCHECKED = runpy.run_path(str(Path(__file__).parents[1] / "fused_rec" / "config.py"))


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["defaults", "changed"])
def test_round_trip_through_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_what_is_absent_takes_its_default():
    assert from_dict({}) == Config()
    assert from_dict({"model": {"dim": 8}, "train": {}}) == Config(model=ModelConfig(dim=8))


def test_every_section_and_setting_is_in_the_dictionary():
    values = to_dict(Config())
    assert list(values) == ["data", "split", "text", "graph", "model", "train", "card"]
    for name, section in values.items():
        assert list(section) == [field.name for field in dataclasses.fields(getattr(Config(), name))]


def test_a_least_value_is_a_number_or_none():
    assert Config().data.min_value is None and from_dict({"data": {"min_value": None}}) == Config()
    least = from_dict({"data": {"min_value": 4}}).data.min_value
    assert (least, type(least)) == (4.0, float)
    assert from_dict({"data": {"min_value": 0.0}}).data.min_value == 0.0  # not the same as none
    for wrong in ("4", True, float("nan"), [4]):
        with pytest.raises(ValueError, match=r"data\.min_value is .*; it must be a number, or None"):
            from_dict({"data": {"min_value": wrong}})


def test_an_int_will_do_for_a_float():
    temperature = from_dict({"train": {"temperature": 1}}).train.temperature
    assert (temperature, type(temperature)) == (1.0, float)


@pytest.mark.parametrize("number", [np.int64(64), np.int32(64), np.uint8(64)])
def test_numpy_numbers_are_numbers(number):
    config = from_dict({"model": {"dim": number}})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    for section in (config.model, UNCHECKED["ModelConfig"](dim=number)):
        assert (section.dim, type(section.dim)) == (64, int)
    loose = {"train": {"temperature": np.float32(0.5)}, "model": {"late_fusion": np.bool_(True)}}
    found = from_dict(loose | {"data": {"name": np.str_("lastfm")}})
    assert [type(value) for value in (found.train.temperature, found.model.late_fusion, found.data.name)] == [
        float,
        bool,
        str,
    ]
    with pytest.raises(ValueError, match=r"model\.dim is 3\.0; it must be of type int"):
        from_dict({"model": {"dim": np.float64(3)}})


def test_settings_that_differ_are_named_with_both_values():
    there = json.loads(json.dumps(to_dict(Config())))
    assert differing(Config(), there) == {}
    found = differing(CHANGED, there)
    assert found["data.name"] == ("synthetic", "lastfm") and found["graph.attributes"] == ([], ["sector", "issuer"])
    assert "text.model" not in found


def test_neutral_settings_are_settings():
    values = to_dict(Config())
    assert all(name in values[section] for section, name in C.NEUTRAL) and set(C.PLACES) <= set(C.NEUTRAL)


def test_a_config_cannot_be_changed_and_can_be_a_key():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert len({Config(), from_dict({}), CHANGED}) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"config is \['modle'\]; it must be made of the sections \['card', 'data', .*'train'\]"),
        ({"model": {"width": 3}}, r"config section model is \['width'\]; it must be made of the settings \['dim'"),
        ({"model": {"dim": 3.0}}, r"model\.dim is 3\.0; it must be of type int"),
        ({"model": {"dim": "3"}}, r"model\.dim is '3'; it must be of type int"),
        ({"model": {"dim": True}}, r"model\.dim is True; it must be of type int"),
        ({"model": {"relation_gates": 1}}, r"model\.relation_gates is 1; it must be of type bool"),
        ({"train": {"temperature": True}}, r"train\.temperature is True; it must be of type float"),
        ({"graph": {"attributes": "sector"}}, r"graph\.attributes is 'sector'; it must be a list of strings"),
        ({"graph": {"attributes": [3]}}, r"graph\.attributes is \[3\]; it must be a list of strings"),
        ({"train": {"loss": None}}, r"train\.loss is None; it must be of type str"),
    ],
)
def test_unknown_names_and_types(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_dict(values)


@pytest.mark.parametrize(
    ("section", "setting", "value", "bound"),
    [
        ("data", "k_core", 0, "at least 1"),
        ("data", "seed", -1, "0 or more"),
        ("split", "seed", -1, "0 or more"),
        ("split", "kind", "weekly", f"one of {typing.get_args(C.SplitKind)}"),
        ("split", "test", 0.0, "between 0 and 1"),
        ("split", "test", 1.0, "between 0 and 1"),
        ("split", "valid", -0.1, "between 0 and 1"),
        ("split", "valid", float("nan"), "between 0 and 1"),
        ("split", "history", -1, "0 or more"),
        ("split", "new_item_share", 1.0, "in [0, 1)"),
        ("split", "new_item_share", -0.1, "in [0, 1)"),
        ("text", "max_tokens", -1, "0 or more"),
        ("text", "batch_tokens", 511, "at least 512"),
        ("text", "compute_dtype", "auto", "one of ('float32', 'bfloat16')"),
        ("text", "tfidf_dim", -1, "0 or more"),
        ("text", "features", "none", "one of ('real', 'shuffled', 'random')"),
        ("graph", "text_knn", -1, "0 or more"),
        ("graph", "social_edges", "random", "one of ('observed', 'rewired', 'none')"),
        ("model", "variant", "both", "one of ('fused', 'graph', 'text')"),
        ("model", "score", "euclid", "one of ('cosine', 'dot')"),
        ("model", "text_projection", "cubic", "one of ('linear', 'mlp')"),
        ("model", "text_propagation", "nowhere", "one of ('to_users', 'both_ways')"),
        ("model", "text_alignment", -0.1, "0 or more"),
        ("model", "text_reconstruction", -0.1, "0 or more"),
        ("model", "dim", 0, "at least 1"),
        ("model", "num_layers", -1, "0 or more"),
        ("model", "id_embedding_dropout", 1.0, "in [0, 1)"),
        ("model", "id_embedding_dropout", -0.1, "in [0, 1)"),
        ("model", "edge_dropout", 1.0, "in [0, 1)"),
        ("model", "edge_dropout", -0.1, "in [0, 1)"),
        ("model", "popularity_weight", -0.1, "0 or more"),
        ("model", "popularity_weight", float("nan"), "0 or more"),
        ("model", "id_init_std", 0.0, "above 0"),
        ("train", "weight_decay", -0.1, "0 or more"),
        ("train", "seed", -1, "in [0, 2^31)"),
        ("train", "loss", "hinge", "one of ('softmax', 'sampled_softmax', 'bpr')"),
        ("train", "temperature", -0.1, "above 0, or 0 to choose it"),
        ("train", "batch_size", 0, "at least 1"),
        ("train", "positives_per_user", 0, "at least 1"),
        ("train", "num_negatives", 0, "at least 1"),
        ("train", "max_steps", 0, "at least 1"),
        ("train", "eval_every", 0, "at least 1"),
        ("train", "patience", 0, "at least 1"),
        ("train", "metric", "gain", f"one of {C.METRICS}"),
        ("train", "learning_rate", 0.0, "above 0"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_bound(section, setting, value, bound):
    with pytest.raises(ValueError) as error:
        UNCHECKED["from_dict"]({section: {setting: value}})
    assert str(error.value) == f"{section}.{setting} is {value!r}; it must be {bound}"


@pytest.mark.parametrize("change", [{"id_embedding_dropout": 0.0}, {"variant": "text"}])
def test_text_is_reconstructed_where_id_embeddings_are_dropped(change):
    with pytest.raises(ValueError, match=r"model\.text_reconstruction is 0\.1; it must be 0 where no ID embeddings"):
        C.ModelConfig(text_reconstruction=0.1, **change)


@pytest.mark.parametrize("limit", [{"history": 3}, {"new_item_share": 0.1}])
def test_a_refit_would_bring_back_what_the_split_drops(limit):
    with pytest.raises(ValueError, match=r"train\.refit is 'valid'; it must be none where split\.history or split"):
        from_dict({"split": limit, "train": {"refit": "valid"}})
    assert from_dict({"split": limit}).split.drops_rows and not Config().split.drops_rows


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("split", "history", 1),
        ("data", "k_core", 1),
        ("text", "batch_tokens", 512),
        ("graph", "text_knn", 0),
        ("model", "dim", 1),
        ("model", "num_layers", 0),
        ("model", "id_embedding_dropout", 0.0),
        ("model", "popularity_weight", 0.0),
        ("text", "tfidf_dim", 0),
        ("train", "patience", 1),
        *(("text", "features", control) for control in typing.get_args(C.TextFeatureSource)),
        *(("graph", "social_edges", ties) for ties in typing.get_args(C.SocialEdges)),
        *(("split", "kind", kind) for kind in typing.get_args(C.SplitKind)),
        *(("train", "metric", metric) for metric in ("auc", "recall@5", "precision@50", "map@10", "ndcg@20")),
    ],
)
def test_the_bound_itself_is_allowed(section, setting, value):
    assert to_dict(from_dict({section: {setting: value}}))[section][setting] == value


@pytest.mark.parametrize(
    ("variant", "ids", "text", "fused", "layers"),
    [("fused", True, True, True, 3), ("graph", True, False, False, 3), ("text", False, True, False, 1)],
)
def test_what_a_variant_uses(variant, ids, text, fused, layers):
    model = C.ModelConfig(variant=variant, num_layers=3)
    assert (model.uses_ids, model.uses_text, model.fuses_text, model.effective_layers) == (ids, text, fused, layers)
    assert C.ModelConfig(variant=variant, num_layers=0, relation_gates=False).effective_layers == 0
    assert C.Config(model=model).encodes_text == text
    assert not C.Config(model=model, text=C.TextConfig(features="random")).encodes_text
    assert model.text_branch() == C.ModelConfig(variant="text", num_layers=3)
    both = C.ModelConfig(variant=variant, num_layers=3, text_propagation="both_ways")
    assert (both.users_start_as_items, both.effective_layers) == (variant == "text", 3)
    assert not model.users_start_as_items
    assert (model.hops, both.hops) == (layers, 4 if variant == "text" else 3)
    aligned = C.ModelConfig(variant=variant, text_alignment=0.1)
    assert (model.reads_text, aligned.reads_text, C.Config(model=aligned).encodes_text) == (text, True, True)
    assert aligned.uses_text == text
    assert not aligned.text_branch().text_alignment
    if ids:
        predicted = C.ModelConfig(variant=variant, text_reconstruction=0.1)
        assert predicted.reads_text and not predicted.text_branch().text_reconstruction
