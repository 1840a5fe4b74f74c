"""What a model's own files set: vectors are the original's where it is honoured, and the rest is refused by name."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fused_rec.text import settings
from fused_rec.text.encode import _identity, encode_texts, tokens
from fused_rec.text.encoders.decoder import DecoderConfig
from fused_rec.text.encoders.registry import FAMILIES
from fused_rec.text.pretrained import open_model

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = json.loads((GOLDEN / "families/settings.json").read_text("utf-8"))
TEXTS, CASES = SETTINGS["texts"], SETTINGS["cases"]
# Of each, a text that shows it: another case of the same weights gives that text another vector.
SHOWN = {
    "roberta/cut_left": ("roberta/cut_right", 7),
    "roberta/cut_left_by_json": ("roberta/cut_right", 7),
    "roberta/cut_right": ("roberta/plain", 7),
    "roberta/limit_of_the_module": ("roberta/cut_right", 7),
    "roberta/lower_case": ("roberta/plain", 1),
    "roberta/tokenizer_args": ("roberta/cut_left", 7),
    "roberta/prefix_space": ("roberta/plain", 1),
    "roberta/split_special_tokens": ("roberta/plain", 5),
    "roberta/token_properties": ("roberta/plain", 5),
    "roberta/cls": ("roberta/plain", 1),
    "roberta/prompt": ("roberta/plain", 0),
    "distilbert/cased": ("distilbert/lower", 1),
    "distilbert/accents": ("distilbert/lower", 2),
    "llama/prefix_space": ("llama/bidirectional", 1),
}
NO_DIFFERENCE = {
    "roberta/cut_right_over_json": "roberta/cut_right",
    "roberta/padding_left": "roberta/plain",
    "distilbert/json_is_cased": "distilbert/lower",  # the class's own default goes before tokenizer.json
}


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "families/settings.safetensors")


def change(folder, files):
    """Sets what `files` says of each JSON file of a folder; a file of another content than an object is replaced."""
    for name, changes in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(changes, dict) and file.exists():
            changes = json.loads(file.read_text("utf-8")) | changes
        file.write_text(json.dumps(changes), "utf-8")
    return folder


def copy_of(family, tmp_path, **files):
    """A tiny model with the modules of Sentence Transformers, and further settings."""
    source = GOLDEN / ("tiny_bert" if family == "bert" else f"families/{family}")
    return change(change(Path(shutil.copytree(source, tmp_path / "model")), SETTINGS["files"]), files)


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_sentence_transformers(case, expected, tmp_path):
    model = open_model(str(copy_of(case.split("/")[0], tmp_path, **CASES[case])))
    np.testing.assert_allclose(encode_texts(TEXTS, model, cache=None, progress=False), expected[case], atol=1e-5)


def test_each_setting_matters(expected):
    for case, (other, text) in SHOWN.items():
        assert np.abs(expected[case][text] - expected[other][text]).max() > 0.01, case
    for case, other in NO_DIFFERENCE.items():
        np.testing.assert_allclose(expected[case], expected[other], atol=1e-5)


def test_the_end_that_is_cut_is_part_of_the_cache_key(tmp_path):
    """And the tokens, of which explanations speak, are those that were encoded."""
    words = "one two three four five six seven eight"
    right = open_model(str(copy_of("roberta", tmp_path / "a", **{"tokenizer_config.json": {"model_max_length": 9}})))
    cut = {"tokenizer_config.json": {"model_max_length": 9, "truncation_side": "left"}}
    left = open_model(str(copy_of("roberta", tmp_path / "b", **cut)))
    assert (right.cut, left.cut) == ("right", "left") and right.digest != left.digest
    assert _identity(dataclasses.replace(right, cut="left"), 9) != _identity(right, 9)
    [kept] = tokens([words], left)
    assert words[kept.spans[-2][0] : kept.spans[-2][1]].strip() in "eight" and len(kept.ids) == 9
    vectors = [encode_texts([words], model, cache=tmp_path / "cache", progress=False) for model in (right, left, right)]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    np.testing.assert_array_equal(vectors[0], vectors[2])


MODULES = SETTINGS["files"]["modules.json"]
SENTENCE = "config_sentence_transformers.json"


def kinds(*names, **more):
    return [
        {"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}", **more} for i, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        # modules
        ({"modules.json": [MODULES[0] | {"type": "own.Transformer"}, MODULES[1]]}, "asks to run 'own.Transformer'"),
        (
            {"modules.json": [MODULES[0], MODULES[1] | {"type": "own_code.Pooling"}]},
            "'own_code.Pooling', which is no part",
        ),
        ({"modules.json": [MODULES[0] | {"kwargs": ["task"]}, MODULES[1]]}, "is called with .'task'. .kwargs."),
        ({"modules.json": [MODULES[0] | {"query": 1}, MODULES[1]]}, "a module sets query, unknown here"),
        (
            {"modules.json": [MODULES[0], MODULES[0], MODULES[1]]},
            "chains Transformer > Transformer > Pooling; supported",
        ),
        ({"modules.json": kinds("Transformer", "Normalize", "Pooling")}, "chains Transformer > Normalize > Pooling"),
        *(
            (
                {"modules.json": kinds("Transformer", "Pooling", name)},
                f"chains Transformer > Pooling > {name}; supported",
            )
            for name in ("Dense", "LayerNorm", "WeightedLayerPooling", "CNN", "LSTM")
        ),
        ({"modules.json": kinds("Router", "Pooling")}, "chains Router > Pooling; supported"),
        ({"modules.json": kinds("StaticEmbedding")}, "chains StaticEmbedding; supported"),
        (
            {
                "modules.json": [*MODULES, *kinds("Normalize")],
                "0_Normalize/config.json": {"module_input_name": "tokens"},
            },
            "0_Normalize/config.json: module_input_name is 'tokens'; supported is 'sentence_embedding'",
        ),
        # pooling
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "the pooling is 'weightedmean'; supported are"),
        ({"1_Pooling/config.json": {"pooling_mode": ["max", "mean"]}}, "the pooling is .'max', 'mean'.; supported are"),
        (
            {"1_Pooling/config.json": {"pooling_mode": None, "pooling_mode_mean_sqrt_len_tokens": True}},
            "the pooling is .'mean', 'mean_sqrt_len_tokens'.",
        ),
        ({"1_Pooling/config.json": {"pooling_mode": None, "pooling_mode_cls_token": 1}}, "pooling_mode_cls_token is 1"),
        ({"1_Pooling/config.json": {"layers": 2}}, "1_Pooling/config.json: it sets layers, unknown here"),
        (
            {
                "1_Pooling/config.json": {"pooling_mode": "cls", "include_prompt": False},
                SENTENCE: {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
            },
            "include_prompt is False, and there is a prompt",
        ),
        # config_sentence_transformers.json
        ({SENTENCE: {"truncate_dim": 16}}, f"{SENTENCE}: truncate_dim is 16.*supported is null"),
        (
            {SENTENCE: {"model_type": "SparseEncoder"}},
            "model_type is 'SparseEncoder'; supported is 'SentenceTransformer'",
        ),
        ({SENTENCE: {"whitening": [1]}}, "it sets whitening, unknown here, which may change vectors"),
        # sentence_bert_config.json
        (
            {"sentence_bert_config.json": {"transformer_task": "fill-mask"}},
            "transformer_task is 'fill-mask'; supported",
        ),
        ({"sentence_bert_config.json": {"query_length": 8}}, "query_length is 8; supported is None"),
        ({"sentence_bert_config.json": {"max_seq_length": 0}}, "max_seq_length is 0; it must be between 3 and"),
        (
            {"sentence_bert_config.json": {"model_args": {"num_hidden_layers": 1}}},
            "model_kwargs sets num_hidden_layers",
        ),
        (
            {"sentence_bert_config.json": {"config_args": {"rope_theta": 9}}},
            "config_kwargs sets rope_theta, unknown here",
        ),
        (
            {"sentence_bert_config.json": {"tokenizer_args": {"do_lower_case": True}}},
            "processor_kwargs sets do_lower_case",
        ),
        ({"sentence_bert_config.json": {"processing_kwargs": {"text": {"max_length": 3}}}}, "processing_kwargs is"),
        ({"sentence_bert_config.json": {"modality_config": {"text": {"method": "get_text"}}}}, "modality_config is"),
        ({"sentence_bert_config.json": {"layer": -2}}, "sentence_bert_config.json: it sets layer, unknown here"),
        # tokenizers
        (
            {"tokenizer_config.json": {"truncation_side": "middle"}},
            "truncation_side is 'middle'; supported are right, left",
        ),
        (
            {"tokenizer_config.json": {"tokenizer_class": "BertweetTokenizer"}},
            "is 'BertweetTokenizer', which is Python",
        ),
        ({"tokenizer_config.json": {"add_eos_token": True, "eos_token": "<pad>"}}, "add_eos_token is True.*adds none"),
        (
            {
                "tokenizer_config.json": {
                    "tokenizer_class": "LlamaTokenizer",
                    "add_bos_token": False,
                    "bos_token": "<s>",
                }
            },
            "add_bos_token is False, and the post_processor of tokenizer.json adds it; make the two files agree",
        ),
        ({"tokenizer_config.json": {"cls_token": "</s>"}}, "cls_token is '</s>', and the post_processor .* another"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True}},
            "add_prefix_space is True, and the ByteLevel of tokenizer.json does otherwise",
        ),
        ({"added_tokens.json": {"<new>": 290}}, "gives '<new>' the id 290, and tokenizer.json None; write both again"),
        (
            {"tokenizer_config.json": {"split_special_tokens": "yes"}},
            "split_special_tokens is 'yes'; it must be of type",
        ),
        # config.json
        ({"config.json": {"quantization_config": {"bits": 4}}}, "quantization_config is .*; supported is None"),
        ({"config.json": {"embedding_size": 16}}, "embedding_size is 16; supported is that of hidden_size"),
        ({"config.json": {"add_cross_attention": True}}, "add_cross_attention is True; supported is False"),
        ({"config.json": {"is_causal": True}}, "is_causal is True; supported is False"),
        ({"config.json": {"architectures": ["RobertaBidirectional"]}}, "architectures names 'RobertaBidirectional'"),
        ({"config.json": {"pruned_heads": {"0": [1]}}}, "pruned_heads is .*; supported is {}"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, "adapter_config.json asks for an adapter.*merge it first"),
    ],
)
def test_what_would_change_vectors_is_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_model(str(copy_of("roberta", tmp_path, **files)))


@pytest.mark.parametrize(
    ("family", "files", "message"),
    [
        (
            "distilbert",
            {"tokenizer.json": {"normalizer": {"type": "NFC"}}, "tokenizer_config.json": {"do_lower_case": True}},
            "normalizer is 'NFC', and a DistilBertTokenizer has 'BertNormalizer'; to keep the former, set",
        ),
        (
            "mpnet",
            {"tokenizer_config.json": {"unk_token": "<pad>"}},
            "unk_token is '<pad>' and that of tokenizer.json '.UNK.'",
        ),
        (
            "bert",
            {"tokenizer.json": {"normalizer": {"type": "NFC"}}},
            "normalizer is 'NFC', and a BertTokenizer has 'Bert",
        ),
        (
            "bert",
            {"tokenizer.json": {"pre_tokenizer": {"type": "Whitespace"}}},
            "pre_tokenizer is 'Whitespace', and a Bert",
        ),
        ("llama", {"config.json": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; supported is 1"),
        (
            "llama",
            {"config.json": {"use_bidirectional_attention": True}},
            "use_bidirectional_attention is True; supported",
        ),
        ("llama", {"config.json": {"residual_multiplier": 0.2}}, "residual_multiplier is 0.2; supported is 1"),
        (
            "llama",
            {"config.json": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
            "and rope_scaling .*; remove one",
        ),
        (
            "llama",
            {"config.json": {"rope_parameters": {"rope_type": "default", "mrope_section": [2]}}},
            "sets mrope_section",
        ),
        (
            "llama",
            {
                "config.json": {
                    "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
                    "original_max_position_embeddings": 40,
                }
            },
            "is 40 outside of RoPE scaling, and within None",
        ),
        (
            "modernbert",
            {"config.json": {"sliding_window": 9}},
            "sliding_window is 9 and local_attention 12, of which it",
        ),
    ],
)
def test_settings_of_other_families_are_refused(family, files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_model(str(copy_of(family, tmp_path, **files)))


def test_a_tokenizer_class_that_keeps_tokenizer_json(tmp_path):
    """The remedy that the refusal names."""
    files = {"tokenizer.json": {"normalizer": {"type": "NFC"}}, "tokenizer_config.json": {"do_lower_case": None}}
    files["tokenizer_config.json"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    model = open_model(str(copy_of("bert", tmp_path, **files)))
    assert json.loads(model.tokenizer.to_str())["normalizer"] == {"type": "NFC"}


def test_a_segment_of_its_own_is_refused(tmp_path):
    folder = copy_of("bert", tmp_path, **{"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}})
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    pieces = [{"SpecialToken": {"id": "[CLS]", "type_id": 1}}, {"Sequence": {"id": "A", "type_id": 1}}]
    special = {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    change(folder, {"tokenizer.json": content})
    with pytest.raises(ValueError, match="gives a text other type ids than 0"):
        open_model(str(folder))


def test_a_window_that_a_mistral_leaves_out():
    """The original then has 4,096; null says that there is none."""
    stored = json.loads((GOLDEN / "families/mistral/config.json").read_text("utf-8"))
    reaches = []
    for given in ({}, {"sliding_window": None}):
        config = FAMILIES["mistral"].read({key: v for key, v in stored.items() if key != "sliding_window"} | given)
        assert isinstance(config, DecoderConfig)
        reaches.append(config.windows[0])
    assert reaches[0] == 4096 < reaches[1]


def test_an_unknown_setting_of_a_config_is_reported(tmp_path, caplog):
    folder = copy_of("roberta", tmp_path, **{"config.json": {"zoom_factor": 2}})
    with caplog.at_level(logging.WARNING):
        open_model(str(folder))
    assert "config.json: zoom_factor is unknown and not used" in caplog.text


# Settings of published models, whose values do not matter here, beside those that a family reads.
PUBLISHED = {
    "all-MiniLM-L6-v2, bge, e5, gte": (
        "bert",
        "_name_or_path architectures attention_probs_dropout_prob classifier_dropout gradient_checkpointing "
        "hidden_dropout_prob id2label label2id initializer_range model_type pad_token_id torch_dtype "
        "transformers_version use_cache",
    ),
    "bert-base-multilingual": (
        "bert",
        "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_type",
    ),
    "all-mpnet-base-v2": ("mpnet", "attention_probs_dropout_prob bos_token_id eos_token_id pad_token_id torch_dtype"),
    "multilingual-e5, bge-m3": ("xlm-roberta", "output_past bos_token_id eos_token_id use_cache"),
    "distiluse": (
        "distilbert",
        "attention_dropout dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_",
    ),
    "modernbert-embed-base": (
        "modernbert",
        "attention_dropout bos_token_id classifier_activation classifier_bias classifier_dropout classifier_pooling "
        "cls_token_id decoder_bias deterministic_flash_attn embedding_dropout eos_token_id initializer_cutoff_factor "
        "layer_norm_eps mlp_dropout pad_token_id position_embedding_type reference_compile repad_logits_with_grad "
        "sep_token_id sparse_pred_ignore_index sparse_prediction tie_word_embeddings",
    ),
    "Qwen3-Embedding": ("qwen3", "attention_dropout bos_token_id eos_token_id initializer_range torch_dtype use_cache"),
    "Qwen2.5": ("qwen2", "attention_dropout bos_token_id eos_token_id initializer_range use_mrope attention_bias"),
    "SmolLM2": ("llama", "is_llama_config pretraining_tp rope_interleaved transformers.js_config attention_dropout"),
    "e5-mistral-7b": ("mistral", "attention_dropout bos_token_id eos_token_id initializer_range torch_dtype"),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_settings_of_published_models_are_known(model):
    family, names = PUBLISHED[model]
    stored = dict.fromkeys([*names.split(), *settings.READ[family]])
    assert settings.check(stored, family) == []


def test_every_family_says_what_it_reads():
    assert settings.READ.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"only pytorch_model.bin, .*python -c \"from transformers import AutoModel; AutoModel"),
        ("model.onnx", "only model.onnx, which is not read; fetch model.safetensors from where it was published"),
        ("onnx/model.onnx", "only onnx/model.onnx, which is not read"),
        ("model.gguf", "only model.gguf, which is not read"),
        ("README.md", "has no model.safetensors; fetch it from where the model was published"),
    ],
)
def test_other_weights_are_named_with_what_to_do(name, message, tmp_path):
    folder = copy_of("roberta", tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FileNotFoundError, match=message):
        open_model(str(folder))
