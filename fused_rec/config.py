"""Every setting and its default, once. Frozen, validated on construction, to and from JSON."""

import codecs
import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

SplitKind = Literal["time", "per_user", "random", "new_items", "new_users", "published"]
Variant = Literal["fused", "graph", "text"]
KS = (5, 10, 20, 50)  # ranks at which lists are cut
METRICS = (
    "accuracy",
    *(f"{name}@{k}" for name in ("recall", "precision", "hitrate", "ndcg", "mrr", "map") for k in KS),
)
Score = Literal["cosine", "dot"]
Readout = Literal["learned", "even", "heard"]
Loss = Literal["softmax", "sampled_softmax", "bpr"]
Compute = Literal["float32", "bfloat16"]
TextControl = Literal["true", "shuffled", "random"]
TextTraining = Literal["frozen", "lora", "full"]
Ties = Literal["true", "rewired", "none"]
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

    name: str = "synthetic"  # a key of fused_rec.data.readers.READERS
    path: str = ""
    repair: bool = False  # mend what can be mended (each repair counted and printed) instead of refusing
    core: int = 1  # keep users and items with at least this many interactions, repeated until stable
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
        _require(self.core >= 1, "data.core", self.core, "at least 1")
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
    lexical: int = 256  # TF-IDF directions beside the language model's: names and terms of the trade; 0 = none
    control: TextControl = "true"  # or words that say nothing: another node's, or a random vector (train.seed draws)
    attributes: tuple[str, ...] = ()  # columns that describe users and items without a text, in words
    train: TextTraining = "frozen"  # the language model: as published, by low-rank adapters, or all of its weights
    rank: int = 8  # of the adapters
    learning_rate: float = 1e-4  # of the language model where it is trained (docs/JOINT.md); 2e-5 is usual for full
    texts_per_step: int = 64  # so many are encoded with gradient; the others' vectors date from the last evaluation

    def __post_init__(self):
        _require_sane("text", self)
        controls = typing.get_args(TextControl)
        _require(self.control in controls, "text.control", self.control, f"one of {controls}")
        _require(self.lexical >= 0, "text.lexical", self.lexical, "0 or more")
        _require(self.max_tokens >= 0, "text.max_tokens", self.max_tokens, "0 or more")
        _require(self.batch_tokens >= 512, "text.batch_tokens", self.batch_tokens, "at least 512")
        trainings = typing.get_args(TextTraining)
        _require(self.train in trainings, "text.train", self.train, f"one of {trainings}")
        _require(self.rank >= 1, "text.rank", self.rank, "at least 1")
        _require(self.learning_rate > 0, "text.learning_rate", self.learning_rate, "above 0")
        _require(self.texts_per_step >= 1, "text.texts_per_step", self.texts_per_step, "at least 1")


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """Which relations are derived besides the holdings and the ties that the tables give."""

    attributes: tuple[str, ...] = ()  # item columns whose values become nodes of their own, such as "sector"
    similar_text: int = 10  # each user and item hears so many others of its type with the nearest words; 0 = none
    ties: Ties = "true"  # or ties that say nothing: others of the same degrees (train.seed draws), or none

    def __post_init__(self):
        _require_sane("graph", self)
        _require(self.ties in typing.get_args(Ties), "graph.ties", self.ties, f"one of {typing.get_args(Ties)}")
        _require(self.similar_text >= 0, "graph.similar_text", self.similar_text, "0 or more")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The text-conditioned propagation and its parts. `variant` text and graph switch the other's input off."""

    variant: Variant = "fused"
    dim: int = 64
    rounds: int = 3
    score: Score = "cosine"
    gates: bool = True  # words and degree of a node open and close each relation for it
    readout: Readout = "learned"  # factors of rounds and relations; even: all the same; heard: inputs count for nothing
    noise: float = 0.0  # length of a random step that every row takes in each round of a training step
    popularity: float = 0.5  # weight of log(1 + holders) in the logits: 0 = none, 1 = their share of all holdings
    half_life: float = 0.0  # days after which a holding counts half towards popularity; 0 = it always counts in full
    spectrum: float = 0.0  # weight of the closed-form part in what is ranked, beside the towers; 0 = none
    spectrum_rank: int = 1024  # singular directions of the holdings that it keeps
    spectrum_l2: float = 100.0  # its ridge, as of EASE
    affinity: bool = False  # words at both ends of an edge scale its message
    user_ids: bool = True  # False: a user is what they hold, say and whom they know, with no row of their own
    user_words: bool = True  # False: what a user says only opens gates and finds those who say the like
    holding_dropout: float = 0.0  # share of holdings left out of a step's messages, so that they must be inferred
    id_dropout: float = 0.1  # share of id rows left out in a step, so that words learn to stand alone
    id_scale: float = 0.1  # standard deviation of the initial id rows

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
        _require(self.rounds >= 0, "model.rounds", self.rounds, "0 or more")
        readouts = typing.get_args(Readout)
        _require(self.readout in readouts, "model.readout", self.readout, f"one of {readouts}")
        fits = self.readout == "learned" or not self.gates
        _require(fits, "model.readout", self.readout, "learned where model.gates is True")
        fits = self.readout != "heard" or self.rounds > 0
        _require(fits, "model.readout", self.readout, "learned or even where model.rounds is 0")
        _require(self.noise >= 0, "model.noise", self.noise, "0 or more")
        for name in ("holding_dropout", "id_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)")
        for name in ("popularity", "half_life", "spectrum"):
            _require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "0 or more")
        fits = not self.spectrum or self.variant != "text"
        _require(fits, "model.spectrum", self.spectrum, "0 where model.variant is text, which knows words alone")
        _require(self.spectrum_rank >= 1, "model.spectrum_rank", self.spectrum_rank, "at least 1")
        _require(self.spectrum_l2 > 0, "model.spectrum_l2", self.spectrum_l2, "above 0")
        _require(self.id_scale > 0, "model.id_scale", self.id_scale, "above 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Loss, optimiser and when to stop. A step sees `batch_users` users with up to `positives` of their items."""

    loss: Loss = "softmax"
    temperature: float = 0.15  # divides the scores in every loss; 1 for LightGCN's BPR over dot products
    batch_users: int = 512
    positives: int = 64
    negatives: int = 16  # a user; sampled_softmax shares the batch's, bpr draws one a positive instead
    neighbours: int = 0  # a node hears at most so many of a relation, drawn for each step; 0 = all (docs/SCALE.md)
    contrast: float = 0.0  # weight of an InfoNCE between the readout and the first round, both with model.noise
    learning_rate: float = 0.01
    weight_decay: float = 0.1  # decoupled, of AdamW
    compute: Compute = "float32"  # what a step multiplies and sends; parameters, sums and all that is ranked: float32
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
        computes = typing.get_args(Compute)
        _require(self.compute in computes, "train.compute", self.compute, f"one of {computes}")
        _require(self.temperature > 0, "train.temperature", self.temperature, "above 0")
        for name in ("batch_users", "positives", "negatives", "max_steps", "eval_every", "patience"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.neighbours >= 0, "train.neighbours", self.neighbours, "0 or more")
        fits = self.loss != "softmax" or not self.neighbours
        bound = "sampled_softmax or bpr where train.neighbours is above 0: softmax takes every item for an alternative"
        _require(fits, "train.loss", self.loss, bound)
        _require(self.metric in METRICS, "train.metric", self.metric, f"one of {METRICS}")
        _require(self.contrast >= 0, "train.contrast", self.contrast, "0 or more")
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
        fits = not self.train.contrast or self.model.rounds > 0
        _require(fits, "train.contrast", self.train.contrast, "0 where model.rounds is 0")
        fits = self.text.train == "frozen" or self.model.variant != "graph"
        _require(fits, "text.train", self.text.train, "frozen where model.variant is graph, which reads no words")
        fits = self.text.train == "frozen" or not self.train.neighbours
        _require(
            fits, "text.train", self.text.train, "frozen where train.neighbours is above 0: texts of a sample stay"
        )
        fits = self.text.train == "frozen" or self.text.control != "random"
        _require(fits, "text.train", self.text.train, "frozen where text.control is random, which encodes nothing")


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
