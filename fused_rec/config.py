"""Every setting and its default, once. Frozen, validated on construction, to and from JSON."""

import codecs
import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

SplitKind = Literal["time", "per_user", "random", "new_items", "new_users", "predefined"]
Variant = Literal["fused", "graph", "text"]
KS = (5, 10, 20, 50)  # ranks at which lists are cut
METRICS = (
    "auc",
    *(f"{name}@{k}" for name in ("recall", "precision", "hitrate", "ndcg", "mrr", "map") for k in KS),
)
Score = Literal["cosine", "dot"]
LayerCombination = Literal["learned", "mean", "mean_without_input"]
Loss = Literal["softmax", "sampled_softmax", "bpr"]
ComputeDtype = Literal["float32", "bfloat16"]
TextFeatureSource = Literal["real", "shuffled", "random"]
Finetuning = Literal["frozen", "lora", "full"]
SocialEdges = Literal["observed", "rewired", "none"]
PLACES = (("data", "path"), ("text", "cache"))  # settings that are folders of this machine
# Settings that say where or how fast, and change no result (`text.batch_tokens`: but for rounding). Tables that moved
# are known by their digest. A run goes on with any of these changed; README.md, "Commands", lists them for users.
NEUTRAL = (*PLACES, ("text", "offline"), ("text", "batch_tokens"), ("train", "wandb"))
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # surrogates: of a name that was not UTF-8


def _require(condition: bool, setting: str, value: object, bound: str) -> None:
    if not condition:
        raise ValueError(f"{setting} is {_shown(value)}; it must be {bound}")


def _require_sane(section: str, config: Any) -> None:
    """Bounds of every number and text: what is beyond them overflows in the arithmetic or cannot be written down."""
    for field in dataclasses.fields(config):
        setting, given = f"{section}.{field.name}", getattr(config, field.name)
        if (value := _plain(given)) is not given:
            object.__setattr__(config, field.name, value)
        if isinstance(value, float):
            _require(not math.isinf(value), setting, value, "finite")
        elif isinstance(value, int):
            _require(abs(value) < 2**63, setting, value, "of 64 bits")
        for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
            _require(not _UNWRITABLE.search(text), setting, value, "text without NUL or surrogates")


def _plain(value: Any) -> Any:
    """The Python value of a NumPy scalar, as a sweep over `np.arange` gives it; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _is_encoding(name: str) -> bool:
    try:
        return not name or codecs.lookup(name).incrementaldecoder is not None and b"a".decode(name) is not None
    except (LookupError, ValueError):
        return name.lower().startswith(("utf", "u1", "u3"))  # of two or four bytes a character


def _shown(value: object) -> str:
    return repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tables are read. `path` empty means the reader's own folder under $FUSED_REC_DATA."""

    name: str = "synthetic"  # a key of fused_rec.data.sources.registry.READERS
    path: str = ""
    repair: bool = False  # mend what can be mended (each repair counted and printed) instead of refusing
    k_core: int = 1  # keep users and items with at least this many interactions, repeated until stable
    seed: int = 0  # of the synthetic market
    min_value: float | None = None  # rows whose `value` is below it are no interactions; None = all are
    delimiter: str = ""  # of your own tables as text; empty = comma, semicolon, tab or pipe, found from the header
    encoding: str = ""  # of those that are not UTF-8 and do not say theirs: cp1252 in Western Europe's Windows

    def __post_init__(self):
        _require_sane("data", self)
        fits = self.min_value is None or not math.isnan(self.min_value)
        _require(fits, "data.min_value", self.min_value, "a number, or None")
        fits = re.fullmatch(r'(?a:[^\w"\r\n\x80-\U0010ffff])?', self.delimiter) is not None
        _require(fits, "data.delimiter", self.delimiter, "empty or one ASCII character, no letter, digit or quote")
        _require(_is_encoding(self.encoding), "data.encoding", self.encoding, "empty or an encoding, such as cp1252")
        _require(self.k_core >= 1, "data.k_core", self.k_core, "at least 1")
        _require(self.seed >= 0, "data.seed", self.seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """What is held out. Fractions are of the interactions (of the users or items for new_users, new_items)."""

    kind: SplitKind = "random"
    test: float = 0.2  # unused by a published split, which names its own test part
    valid: float = 0.1  # carved from what the test part leaves
    seed: int = 0

    def __post_init__(self):
        _require_sane("split", self)
        _require(
            self.kind in typing.get_args(SplitKind), "split.kind", self.kind, f"one of {typing.get_args(SplitKind)}"
        )
        for name in ("test", "valid"):
            value = getattr(self, name)
            _require(0 < value < 1, f"split.{name}", value, "between 0 and 1")
        _require(self.seed >= 0, "split.seed", self.seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which language model encodes the texts, and where its vectors are kept."""

    model: str = "all-MiniLM-L6-v2"  # the installed MiniLM package, a Hugging Face folder, or ORG/NAME@COMMIT
    prompt: str = ""  # which of the prompts that the model names is put before each text; empty = its default, if any
    cache: str = "~/.cache/fused_rec"
    max_tokens: int = 0  # a text is cut after so many tokens; 0 = the model's own limit
    batch_tokens: int = (
        2048  # padded tokens a device encodes at once; more is slower on a CPU, faster on an accelerator
    )
    offline: bool = True  # False lets a hub revision be downloaded
    tfidf_dim: int = 256  # TF-IDF directions beside the language model's: names and terms of the trade; 0 = none
    # or words that say nothing: another node's, or a random vector (train.seed draws)
    features: TextFeatureSource = "real"
    attributes: tuple[str, ...] = ()  # columns that describe users and items without a text, in words
    finetune: Finetuning = "frozen"  # the language model: as published, by low-rank adapters, or all of its weights
    lora_rank: int = 8  # of the adapters
    # of the language model where it is trained (docs/FINETUNING.md); 2e-5 is usual for full
    finetune_learning_rate: float = 1e-4
    # so many are encoded with gradient; the others' vectors date from the last evaluation
    finetune_texts_per_step: int = 64

    def __post_init__(self):
        _require_sane("text", self)
        controls = typing.get_args(TextFeatureSource)
        _require(self.features in controls, "text.features", self.features, f"one of {controls}")
        _require(self.tfidf_dim >= 0, "text.tfidf_dim", self.tfidf_dim, "0 or more")
        _require(self.max_tokens >= 0, "text.max_tokens", self.max_tokens, "0 or more")
        _require(self.batch_tokens >= 512, "text.batch_tokens", self.batch_tokens, "at least 512")
        trainings = typing.get_args(Finetuning)
        _require(self.finetune in trainings, "text.finetune", self.finetune, f"one of {trainings}")
        _require(self.lora_rank >= 1, "text.lora_rank", self.lora_rank, "at least 1")
        _require(self.finetune_learning_rate > 0, "text.finetune_learning_rate", self.finetune_learning_rate, "above 0")
        _require(
            self.finetune_texts_per_step >= 1,
            "text.finetune_texts_per_step",
            self.finetune_texts_per_step,
            "at least 1",
        )


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """Which relations are derived besides the holdings and the ties that the tables give."""

    attributes: tuple[str, ...] = ()  # item columns whose values become nodes of their own, such as "sector"
    text_knn: int = 10  # each user and item hears so many others of its type with the nearest words; 0 = none
    # or ties that say nothing: others of the same degrees (train.seed draws), or none
    social_edges: SocialEdges = "observed"

    def __post_init__(self):
        _require_sane("graph", self)
        _require(
            self.social_edges in typing.get_args(SocialEdges),
            "graph.social_edges",
            self.social_edges,
            f"one of {typing.get_args(SocialEdges)}",
        )
        _require(self.text_knn >= 0, "graph.text_knn", self.text_knn, "0 or more")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The text-conditioned propagation and its parts. `variant` text and graph switch the other's input off."""

    variant: Variant = "fused"
    dim: int = 64
    num_layers: int = 3
    score: Score = "cosine"
    relation_gates: bool = True  # words and degree of a node open and close each relation for it
    # factors of rounds and relations; even: all the same; heard: inputs count for nothing
    layer_combination: LayerCombination = "learned"
    embedding_noise: float = 0.0  # length of a random step that every row takes in each round of a training step
    # weight of log(1 + holders) in the logits: 0 = none, 1 = their share of all holdings
    popularity_weight: float = 0.5
    # days after which a holding counts half towards popularity; 0 = it always counts in full
    popularity_half_life: float = 0.0
    ease_weight: float = 0.0  # weight of the closed-form part in what is ranked, beside the towers; 0 = none
    ease_rank: int = 1024  # singular directions of the holdings that it keeps
    ease_l2: float = 100.0  # its ridge, as of EASE
    user_id_embedding: bool = True  # False: a user is what they hold, say and whom they know, with no row of their own
    user_text_input: bool = True  # False: what a user says only opens gates and finds those who say the like
    edge_dropout: float = 0.0  # share of holdings left out of a step's messages, so that they must be inferred
    id_embedding_dropout: float = 0.1  # share of id rows left out in a step, so that words learn to stand alone
    id_init_std: float = 0.1  # standard deviation of the initial id rows

    def __post_init__(self):
        _require_sane("model", self)
        _require(
            self.variant in typing.get_args(Variant),
            "model.variant",
            self.variant,
            f"one of {typing.get_args(Variant)}",
        )
        _require(self.score in typing.get_args(Score), "model.score", self.score, f"one of {typing.get_args(Score)}")
        _require(self.dim >= 1, "model.dim", self.dim, "at least 1")
        _require(self.num_layers >= 0, "model.num_layers", self.num_layers, "0 or more")
        readouts = typing.get_args(LayerCombination)
        _require(
            self.layer_combination in readouts, "model.layer_combination", self.layer_combination, f"one of {readouts}"
        )
        fits = self.layer_combination == "learned" or not self.relation_gates
        _require(fits, "model.layer_combination", self.layer_combination, "learned where model.relation_gates is True")
        fits = self.layer_combination != "mean_without_input" or self.num_layers > 0
        _require(fits, "model.layer_combination", self.layer_combination, "learned or mean where model.num_layers is 0")
        _require(self.embedding_noise >= 0, "model.embedding_noise", self.embedding_noise, "0 or more")
        for name in ("edge_dropout", "id_embedding_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)")
        for name in ("popularity_weight", "popularity_half_life", "ease_weight"):
            _require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "0 or more")
        fits = not self.ease_weight or self.variant != "text"
        _require(fits, "model.ease_weight", self.ease_weight, "0 where model.variant is text, which knows words alone")
        _require(self.ease_rank >= 1, "model.ease_rank", self.ease_rank, "at least 1")
        _require(self.ease_l2 > 0, "model.ease_l2", self.ease_l2, "above 0")
        _require(self.id_init_std > 0, "model.id_init_std", self.id_init_std, "above 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Loss, optimiser and when to stop. A step sees `batch_size` users with up to `positives_per_user` of their
    items.
    """

    loss: Loss = "softmax"
    temperature: float = 0.15  # divides the scores in every loss; 1 for LightGCN's BPR over dot products
    batch_size: int = 512
    positives_per_user: int = 64
    num_negatives: int = 16  # a user; sampled_softmax shares the batch's, bpr draws one a positive instead
    num_neighbors: int = 0  # a node hears at most so many of a relation, drawn for each step; 0 = all (docs/SCALE.md)
    # weight of an InfoNCE between the readout and the first round, both with model.embedding_noise
    contrastive_weight: float = 0.0
    learning_rate: float = 0.01
    weight_decay: float = 0.1  # decoupled, of AdamW
    # what a step multiplies and sends; parameters, sums and all that is ranked: float32
    compute_dtype: ComputeDtype = "float32"
    max_steps: int = 2000
    eval_every: int = 50
    patience: int = 5  # evaluations without a better validation value before training stops
    metric: str = "ndcg@10"  # on validation; chooses the step
    wandb: str = ""  # project of Weights & Biases that curves and results are sent to as well; empty = none
    refit: bool = False  # having chosen the step, train anew on train and valid for as many, then read the test part
    seed: int = 0

    def __post_init__(self):
        _require_sane("train", self)
        _require(self.loss in typing.get_args(Loss), "train.loss", self.loss, f"one of {typing.get_args(Loss)}")
        computes = typing.get_args(ComputeDtype)
        _require(self.compute_dtype in computes, "train.compute_dtype", self.compute_dtype, f"one of {computes}")
        _require(self.temperature > 0, "train.temperature", self.temperature, "above 0")
        for name in ("batch_size", "positives_per_user", "num_negatives", "max_steps", "eval_every", "patience"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.num_neighbors >= 0, "train.num_neighbors", self.num_neighbors, "0 or more")
        fits = self.loss != "softmax" or not self.num_neighbors
        bound = (
            "sampled_softmax or bpr where train.num_neighbors is above 0: softmax takes every item for an alternative"
        )
        _require(fits, "train.loss", self.loss, bound)
        _require(self.metric in METRICS, "train.metric", self.metric, f"one of {METRICS}")
        _require(self.contrastive_weight >= 0, "train.contrastive_weight", self.contrastive_weight, "0 or more")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "above 0")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        fits = len(self.wandb) <= 128 and not set(self.wandb) & set("/\\#?%:")
        _require(fits, "train.wandb", self.wandb, "a project's name, of up to 128 letters and none of / \\ # ? % :")
        _require(0 <= self.seed < 2**31, "train.seed", self.seed, "in [0, 2^31)")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `from_dict` and `to_dict` carry it to JSON, checkpoints and absl flags."""

    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    text: TextConfig = TextConfig()
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        fits = not self.train.contrastive_weight or self.model.num_layers > 0
        _require(fits, "train.contrastive_weight", self.train.contrastive_weight, "0 where model.num_layers is 0")
        fits = self.text.finetune == "frozen" or self.model.variant != "graph"
        _require(fits, "text.finetune", self.text.finetune, "frozen where model.variant is graph, which reads no words")
        fits = self.text.finetune == "frozen" or not self.train.num_neighbors
        _require(
            fits,
            "text.finetune",
            self.text.finetune,
            "frozen where train.num_neighbors is above 0: texts of a sample stay",
        )
        fits = self.text.finetune == "frozen" or self.text.features != "random"
        _require(
            fits, "text.finetune", self.text.finetune, "frozen where text.features is random, which encodes nothing"
        )


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionaries, as JSON and ml_collections take them."""
    return dataclasses.asdict(config)


def differing(config: Config, there: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Compares a config with the `to_dict` of another one, read back from JSON.

    Returns:
      Value there and here of each setting that differs, by its name, `section.setting`.
    """
    found = {}
    for section, settings in to_dict(config).items():
        for name, value in settings.items():
            here = list(value) if isinstance(value, tuple) else value  # as JSON has it
            other = there.get(section, {}).get(name)
            other = list(other) if isinstance(other, tuple) else other
            if other != here:
                found[f"{section}.{name}"] = other, here
    return found


def portable(config: Config) -> dict[str, dict[str, Any]]:
    """`to_dict` without the settings that name places on this machine, to be shown to others."""
    values = to_dict(config)
    for section, setting in PLACES:
        del values[section][setting]
    return values


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of `to_dict`; settings that are absent take their defaults.

    Raises:
      ValueError: an unknown section or setting, or a value out of its bounds.
    """
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    _require(isinstance(values, Mapping), "config", values, "a dictionary of sections")
    unknown = set(values) - set(sections)
    _require(not unknown, "config", sorted(map(str, unknown)), f"made of the sections {sorted(sections)}")
    return Config(**{name: _section(name, sections[name], settings) for name, settings in values.items()})


def _section(name: str, kind: Any, settings: Mapping[str, Any]) -> Any:
    known = {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind)}
    _require(isinstance(settings, Mapping), f"config section {name}", settings, "a dictionary of settings")
    unknown = set(settings) - set(known)
    _require(not unknown, f"config section {name}", sorted(map(str, unknown)), f"made of the settings {sorted(known)}")
    typed = {}
    for setting, given in settings.items():
        default, value = known[setting], _plain(given)
        if isinstance(default, tuple):
            words = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
            _require(words, f"{name}.{setting}", value, "a list of strings")
            value = tuple(map(str, value))  # NumPy's strings too
        elif default is None and value is None:
            typed[setting] = None
            continue
        elif (default is None or isinstance(default, float)) and isinstance(value, int) and not isinstance(value, bool):
            _require(abs(value) < 2**63, f"{name}.{setting}", value, "of 64 bits")  # float() overflows elsewhere
            value = float(value)
        wanted, bound = (float, "a number, or None") if default is None else (type(default), "")
        _require(type(value) is wanted, f"{name}.{setting}", value, bound or f"of type {wanted.__name__}")
        typed[setting] = value
    return kind(**typed)
