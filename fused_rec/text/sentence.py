"""Config files of Sentence Transformers: their settings are applied or refused by name.

Unknown settings are refused, since nearly every setting of these files changes vectors.
"""

import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fused_rec.text.encoders.config_fields import field, require
from fused_rec.text.encoders.pooling import Pooling

# The first that exists and is not empty is read, as in Sentence Transformers.
SENTENCE_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
CHAIN = ("Transformer", "Pooling", "Normalize")
PACKAGE = "sentence_transformers."
# Constructor arguments of the original that change device and speed, not vectors.
LOADING = frozenset(
    ("attn_implementation", "cache_dir", "code_revision", "device_map", "dtype", "local_files_only")
    + ("low_cpu_mem_usage", "revision", "token", "torch_dtype", "trust_remote_code", "unpad_inputs", "use_auth_token")
    + ("use_cache", "use_fast", "use_memory_efficient_attention", "use_safetensors", "add_pooling_layer")
)
TOKENIZER_ARGUMENTS = ("model_max_length", "truncation_side", "padding_side")
# Required values of settings other than token limit, lower case and constructor arguments.
TRANSFORMER: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "processing_kwargs": {},
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
}
TEXT_MODALITY = {"method": "forward", "method_output_name": "last_hidden_state"}
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Transformer(NamedTuple):
    """Settings of sentence_bert_config.json.

    Attributes:
      max_tokens: token limit of a text, None where not set.
      lowercase: whether texts are lower-cased before tokenization.
      tokenizer: settings that override tokenizer_config.json.
    """

    max_tokens: Any
    lowercase: bool
    tokenizer: Mapping[str, Any]


def only(stored: Mapping[str, Any], supported: Iterable[str], of: str = "it") -> None:
    """Checks that no unknown setting is present.

    Args:
      stored: content of a file.
      supported: names of the supported settings.
      of: the object with the settings, for the message.

    Raises:
      ValueError: a setting is unknown.
    """
    if unknown := sorted(set(stored) - set(supported)):
        raise ValueError(f"{of} sets {', '.join(unknown)[:200]}, unknown here, which may change vectors; remove it")


def read_modules(content: list[Any]) -> dict[str, str]:
    """Reads modules.json.

    Args:
      content: its content, empty where the file is missing.

    Returns:
      Subfolder by kind of module.

    Raises:
      ValueError: a module has custom code or is of another kind, their order is not supported, or a folder is outside
        of the model's.
    """
    try:
        modules = [(entry["type"], entry["path"]) for entry in content]
        inside = all(".." not in Path(path).parts and not Path(path).is_absolute() for _, path in modules)
        kinds = [kind.rsplit(".", 1)[-1] for kind, _ in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("it must be a list of objects with type and path; fetch the file again") from error
    if not inside:
        raise ValueError(f"it names folders outside of the model's: {[path for _, path in modules]}; they are not read")
    if other := [kind for kind, _ in modules if not kind.startswith(PACKAGE)]:
        raise ValueError(f"it asks to run {other[0]!r:.80}, which is no part of Sentence Transformers; it is not run")
    for entry in content:
        only(entry, ("idx", "name", "path", "type", "kwargs"), "a module")
        if entry.get("kwargs"):
            raise ValueError(f"a module is called with {entry['kwargs']!r:.60} (kwargs); supported is none")
    if kinds and tuple(kinds) not in (CHAIN, CHAIN[:2]):
        raise ValueError(f"it chains {' > '.join(kinds)}; supported is {' > '.join(CHAIN)}, the last optional")
    return dict(zip(kinds, (path for _, path in modules), strict=True))


def read_transformer(stored: Mapping[str, Any]) -> Transformer:
    """Reads sentence_bert_config.json.

    Args:
      stored: its content.

    Returns:
      The settings.

    Raises:
      ValueError: a setting is not supported.
    """
    arguments = [
        ("model_args", "model_kwargs"),
        ("config_args", "config_kwargs"),
        ("tokenizer_args", "processor_kwargs"),
    ]
    names = [name for pair in arguments for name in pair]
    only(stored, ("max_seq_length", "do_lower_case", "unpad_inputs", "modality_config", *TRANSFORMER, *names))
    require(stored, **TRANSFORMER)
    modalities = field(stored, "modality_config", dict, {"text": TEXT_MODALITY})
    if modalities.get("text") != TEXT_MODALITY:
        raise ValueError(f"modality_config is {modalities!r:.60}; supported is {TEXT_MODALITY} for text")
    given = {new: field(stored, old, dict, field(stored, new, dict, {})) for old, new in arguments}
    for name, allowed in [("model_kwargs", ()), ("config_kwargs", ()), ("processor_kwargs", TOKENIZER_ARGUMENTS)]:
        only({key: v for key, v in given[name].items() if v is not None}, LOADING | set(allowed), name)
    tokenizer = {key: given["processor_kwargs"][key] for key in TOKENIZER_ARGUMENTS if key in given["processor_kwargs"]}
    limit = stored.get("max_seq_length")
    limit = tokenizer.get("model_max_length") if limit is None else limit
    return Transformer(limit, field(stored, "do_lower_case", bool, False), tokenizer)


def read_pooling(stored: Mapping[str, Any], prompt: str) -> Pooling:
    """Reads the config of a Pooling module.

    Args:
      stored: its content.
      prompt: text prepended to each text; with one, it must be included in pooling.

    Returns:
      The pooling.

    Raises:
      ValueError: a setting is not supported.
    """
    only(
        {key: value for key, value in stored.items() if not (key.startswith("pooling_mode_") and value is False)},
        ("word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *POOLING_FLAGS),
    )
    mode = stored.get("pooling_mode")
    if mode is None:  # before Sentence Transformers 6: one flag per mode, mean where none is set
        mode = [name for flag, name in POOLING_FLAGS.items() if field(stored, flag, bool, False)] or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    for supported in typing.get_args(Pooling):
        if mode == supported:
            # The last token is never in the prompt.
            if supported != "lasttoken" and prompt and not field(stored, "include_prompt", bool, True):
                raise ValueError("include_prompt is False, and there is a prompt; supported is True")
            return supported
    names = ", ".join(typing.get_args(Pooling))
    raise ValueError(f"the pooling is {mode!r}; supported are {names}, one at a time")


def check_normalize(stored: Mapping[str, Any]) -> None:
    """Checks the config of a Normalize module.

    Args:
      stored: its content.

    Raises:
      ValueError: it normalizes something else than the vector of the text.
    """
    require(stored, module_input_name="sentence_embedding", module_output_name="sentence_embedding")


def read_prompt(stored: Mapping[str, Any], name: str, folder: Path) -> str:
    """Reads a prompt from config_sentence_transformers.json.

    Args:
      stored: its content.
      name: name of the prompt; empty = the default prompt, if any.
      folder: folder of the model, for messages.

    Returns:
      Text of the prompt, empty without one.

    Raises:
      ValueError: there is no such prompt, or a setting is not supported.
    """
    metadata = ("__version__", "model_type", "requirements", "similarity_fn_name", "truncate_dim")
    only(stored, ("prompts", "default_prompt_name", *metadata))
    require(stored, model_type="SentenceTransformer")
    if stored.get("truncate_dim") is not None:
        raise ValueError(
            f"truncate_dim is {stored['truncate_dim']!r:.60}, which keeps the first numbers of a vector alone; "
            "supported is null, all of them"
        )
    prompts = stored.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError("prompts must map names to texts; fetch the file again")
    default = stored.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ValueError(f"default_prompt_name is {default!r:.60}, which is not in prompts; set it to null")
    if name and name not in prompts:
        has = f"those of {folder} are {', '.join(prompts)}" if prompts else f"{folder} names none"
        raise ValueError(f"the prompt {name!r} does not exist; {has}")
    text = prompts.get(name or default, "")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt is no valid Unicode ({error}); fetch the file again") from error
    return text
