"""Every encoder family gives what the PyTorch originals give, and is read as strictly as it says."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fused_rec.text.encode import encode_texts
from fused_rec.text.encoders import layers
from fused_rec.text.encoders.bert import _distance_buckets
from fused_rec.text.encoders.decoder import DecoderConfig
from fused_rec.text.encoders.layers import attend, read_rope, rotate
from fused_rec.text.encoders.modernbert import ModernBertConfig
from fused_rec.text.encoders.registry import (
    ENCODERS,
    FAMILIES,
    apply_encoder,
    convert_weights,
    encoder,
    family,
    flops,
)
from fused_rec.text.pretrained import open_model

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "families"
VARIANTS = json.loads((FOLDER / "variants.json").read_text("utf-8"))
TEXTS = json.loads((GOLDEN / "minilm_texts.json").read_text("utf-8"))
TEXTS = [*TEXTS[8:14], *TEXTS[31:40], *TEXTS[80:110:4]]
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
# Rounding: PyTorch's own float32 is up to 1.5e-5 from its float64 on these models, and we are up to 1.7e-5 from it.
# Leaving out any part of a layer moves values, which reach 5, by more than 0.01.
PARITY = 3e-5


@pytest.fixture(scope="module")
def outputs():
    return load_file(FOLDER / "outputs.safetensors")


@pytest.fixture(scope="module")
def models():
    return {name: open_model(str(FOLDER / name)) for name in NAMES}


def stored_config(name):
    return json.loads((FOLDER / name / "config.json").read_text("utf-8"))


def copy_of(name, tmp_path, **changes):
    """A copy of a tiny model to spoil, some settings of its config.json changed."""
    folder = Path(shutil.copytree(FOLDER / name, tmp_path / name))
    content = stored_config(name) | changes
    (folder / "config.json").write_text(json.dumps({key: v for key, v in content.items() if v != "absent"}))
    return folder


def hidden_states(outputs, config, params):
    """[2, places, D] of rows of 151, 1, 2, 37 and 63 tokens, padded with token 5 on the right and on the left."""
    ids, lengths, (rows, at) = outputs["ids"], outputs["lengths"], outputs["places"].T
    longest = ids.shape[1]
    mask = np.arange(longest) < lengths[:, None]
    right = np.where(mask, ids % config.vocab_size, 5)
    left = np.stack([np.roll(row, longest - length) for row, length in zip(right, lengths, strict=True)])
    sides = jnp.asarray(np.concatenate([right, left])), jnp.asarray(np.concatenate([mask, mask[:, ::-1]]))
    hidden = np.asarray(jax.jit(encoder(config).apply)({"params": params}, *sides))
    return np.stack([hidden[rows, at], hidden[rows + len(lengths), at + longest - lengths[rows]]])


# --- the arithmetic ---


def test_every_family_has_a_tiny_original():
    assert set(NAMES) | {"bert"} == set(FAMILIES)
    assert {type(family(stored_config(name)).read(stored_config(name))) for name in NAMES} == set(ENCODERS)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_those_of_pytorch(models, outputs, name):
    for found in hidden_states(outputs, models[name].config, models[name].params):
        np.testing.assert_allclose(found, outputs[f"{name}/plain"], atol=PARITY)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_settings_give_what_pytorch_gives(models, outputs, variant):
    name = variant.split("/")[0]
    config = FAMILIES[name].read(stored_config(name) | VARIANTS[variant])
    assert config != models[name].config
    for found in hidden_states(outputs, config, models[name].params):
        np.testing.assert_allclose(found, outputs[variant], atol=PARITY)
    # The setting matters: without it the same weights give other states.
    assert np.abs(outputs[variant] - outputs[f"{name}/plain"]).max() > 0.01


@pytest.mark.parametrize("name", ["mistral", "modernbert"])
def test_blocks_of_queries_change_nothing(models, outputs, name, monkeypatch):
    monkeypatch.setattr(layers, "QUERY_BLOCK", 16)  # 151 tokens are nine blocks and 7
    for found in hidden_states(outputs, models[name].config, models[name].params):
        np.testing.assert_allclose(found, outputs[f"{name}/plain"], atol=PARITY)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_texts_are_those_of_pytorch(models, outputs, name):
    """Tokenizer, pooling and normalisation as the folder's own files say, or as the family's default is."""
    vectors = encode_texts(TEXTS, models[name], cache=None, progress=False)
    np.testing.assert_allclose(vectors, outputs[f"{name}/vectors"], atol=1e-5)


def test_what_the_folders_say(models):
    said = {name: (model.pooling, model.normalize, model.max_tokens) for name, model in models.items()}
    assert said == {
        "distilbert": ("mean", False, 160),
        "llama": ("lasttoken", False, 160),
        "mistral": ("lasttoken", False, 160),
        "modernbert": ("mean", False, 160),
        "mpnet": ("mean", False, 158),
        "qwen2": ("lasttoken", False, 160),
        "qwen3": ("lasttoken", True, 160),
        "roberta": ("mean", True, 158),
        "xlm-roberta": ("cls", False, 158),
    }
    dtypes = {name: {leaf.dtype.name for leaf in _leaves(model.params)} for name, model in models.items()}
    assert dtypes.pop("llama") == {"float32"} and all(kept == {"bfloat16"} for kept in dtypes.values())


def _leaves(tree):
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]


def test_attention_by_hand():
    """Three tokens and one of padding, one head of one number, all queries 0: each takes the mean of what it sees."""
    value = jnp.array([[1.0, 2.0, 6.0, 100.0]])[:, :, None, None]
    zero, mask = jnp.zeros((1, 4, 1, 1)), jnp.array([[True, True, True, False]])

    def mixed(reach, causal):
        return np.asarray(attend(zero[..., None], zero, value, mask, jnp.int32(reach), causal))[0, :3, 0, 0, 0]

    np.testing.assert_allclose(mixed(9, causal=True), [1, 1.5, 3], rtol=1e-6)
    np.testing.assert_allclose(mixed(2, causal=True), [1, 1.5, 4], rtol=1e-6)
    np.testing.assert_allclose(mixed(9, causal=False), [3, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(mixed(2, causal=False), [1.5, 3, 4], rtol=1e-6)


def test_rotary_positions_by_hand():
    """Two pairs, one that turns by a right angle a token and one that never does; far away as exactly as near."""
    x = jnp.broadcast_to(jnp.array([1.0, 5.0, 0.0, 7.0]), (1, 40_001, 4))
    turned = np.asarray(rotate(x, jnp.array([np.pi / 2, 0.0], jnp.float32), 2.0))[0]
    np.testing.assert_allclose(turned[:4, [0, 2]], [[2, 0], [0, 2], [-2, 0], [0, -2]], atol=1e-6)
    np.testing.assert_array_equal(turned[:, [1, 3]], np.broadcast_to([10.0, 14.0], (40_001, 2)))
    angles = np.arange(40_001, dtype=np.float32) * np.float32(np.pi / 2)
    np.testing.assert_allclose(turned[:, 0], 2 * np.cos(angles.astype(np.float64)), atol=1e-6)


def test_distances_by_hand():
    """MPNet's classes: 0 to 7 exactly, then doubling twice a class, and 16 more for what comes after."""
    table = _distance_buckets(200)
    assert table[199, [199, 198, 192, 191, 187, 183, 135, 72, 0]].tolist() == [0, 1, 7, 8, 9, 10, 14, 15, 15]
    assert table[0, [1, 8, 12, 199]].tolist() == [17, 24, 25, 31]


def test_flops_by_hand(models):
    """Qwen2's two layers: 4 x 32 x 32 less half of two for shared keys, and 3 x 32 x 40; 8 numbers for 4 heads."""
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40)
    found = flops(models["qwen2"].config, np.array([1, 10], np.int32))
    np.testing.assert_allclose(found, [2 * matrices + 4 * 2 * 32, 20 * matrices + 4 * 2 * 32 * 100])


# --- config.json ---


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("llama/")])
def test_rotary_positions_as_files_before_transformers_5_have_them(variant):
    reported = dict(VARIANTS[variant]["rope_parameters"])
    old = stored_config("llama") | {"rope_parameters": None, "rope_theta": reported.pop("rope_theta")}
    expected = FAMILIES["llama"].read(stored_config("llama") | VARIANTS[variant])
    assert FAMILIES["llama"].read(old | {"rope_scaling": reported}) == expected
    named = {"type": reported.pop("rope_type"), **reported}
    assert FAMILIES["llama"].read(old | {"rope_scaling": named}) == expected


def test_modernbert_as_files_before_transformers_5_have_it():
    old = stored_config("modernbert") | {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    del old["rope_parameters"], old["layer_types"]
    assert FAMILIES["modernbert"].read(old) == FAMILIES["modernbert"].read(stored_config("modernbert"))
    other = FAMILIES["modernbert"].read(old | {"local_rope_theta": 500})
    assert isinstance(other, ModernBertConfig)
    assert other.sliding_rope.frequencies == pytest.approx([500 ** (-i / 4) for i in range(4)])


def test_defaults_of_old_decoder_files():
    """The first Llama's config.json names no groups, no rotary base and no head size."""
    old = stored_config("llama")
    for name in ("num_key_value_heads", "rope_parameters", "head_dim", "attention_bias", "mlp_bias", "hidden_act"):
        del old[name]
    config = FAMILIES["llama"].read(old)
    assert isinstance(config, DecoderConfig)
    assert (config.num_key_value_heads, config.head_dim, config.qkv_bias, config.inner_bias) == (4, 8, False, False)
    assert config.rope.frequencies == pytest.approx([1, 1e-1, 1e-2, 1e-3])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "t5"}, "model_type is 't5'; supported are bert, distilbert, llama, mistral, modern"),
        ("llama", {"model_type": ["llama"]}, "model_type is .*'llama'.*; supported are bert"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaling type is 'dynamic'; supported"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "scaling type is 'longrope'; supported are default"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "it lacks factor"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor of RoPE scaling is 0.5; it must"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters differ by layer"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; supported is 1"),
        ("llama", {"rope_parameters": {"rope_theta": 1}}, "rope_theta is 1.0; it must be above 1"),
        ("llama", {"head_dim": 7}, "a head has 7 numbers"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types is set, which this model_type"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it must be from 1 to 1,024"),
        ("llama", {"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
        ("mistral", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*it must name full_attention"),
        ("qwen2", {"vocab_size": 100}, "the tokenizer has 290 tokens and the weights 100"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64; supported is 32"),
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("roberta", {"is_decoder": True}, "is_decoder is True; supported is False"),
        ("roberta", {"pad_token_id": 290}, "pad_token_id is 290; it must be from 0 to 289"),
        ("distilbert", {"activation": "silu"}, "hidden_act is 'silu'; supported are gelu, gelu_new, relu"),
        ("modernbert", {"global_attn_every_n_layers": 0, "layer_types": None}, "global_attn_every_n_layers is 0"),
        ("modernbert", {"rope_parameters": {"near": {}}}, "rope_parameters has .'near'.; supported are full_attention"),
        ("modernbert", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map.*it is not run"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        open_model(str(copy_of(name, tmp_path, **changes)))


# --- tokenizers ---


def test_a_folder_without_tokenizer_json_names_the_remedy(tmp_path):
    folder = copy_of("roberta", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing.*AutoTokenizer.from_pretrained"):
        open_model(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        open_model(str(folder))


def test_the_tokenizer_says_what_ends_a_text(models, tmp_path):
    """Qwen3's puts </s> after each text; without it the last word's own state is the vector, and nothing's is 0."""
    assert models["qwen3"].tokenizer.encode("rate").ids[-1] == 2
    folder = copy_of("qwen3", tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8")) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    model = open_model(str(folder))
    assert 2 not in model.tokenizer.encode("rate").ids
    vectors = encode_texts(["", "rate", "a fund"], model, cache=None, progress=False)
    np.testing.assert_array_equal(vectors[0], 0)
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(encode_texts([""], model, cache=None, progress=False), np.zeros((1, 32)))


def test_a_limit_of_the_tokenizer(tmp_path):
    folder = copy_of("llama", tmp_path)
    for limit, expected in [("33", 33), ("1e30", 160)]:
        (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {limit}}}')
        assert open_model(str(folder)).max_tokens == expected
    (folder / "tokenizer_config.json").write_text('{"model_max_length": "33"}')
    with pytest.raises(ValueError, match="model_max_length is '33'; it must be a number"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["sentence_roberta_config.json", "sentence_bert_config.json"])
def test_the_limit_of_sentence_transformers(tmp_path, name):
    folder = copy_of("roberta", tmp_path)
    (folder / name).write_text('{"max_seq_length": 20}')
    assert open_model(str(folder)).max_tokens == 20
    (folder / name).write_text('{"max_seq_length": 159}')
    with pytest.raises(ValueError, match=f"{name}: max_seq_length is 159; it must be between 3 and .*158"):
        open_model(str(folder))


# --- prompts ---


def test_a_prompt_is_put_before_each_text(models, tmp_path):
    query = open_model(str(FOLDER / "qwen3"), prompt="query")
    assert (models["qwen3"].prompt, query.prompt, query.digest) == ("", "Find funds: ", models["qwen3"].digest)
    plain = ["green bonds", "old debt"]
    by_hand = encode_texts([f"Find funds: {text}" for text in plain], models["qwen3"], cache=tmp_path, progress=False)
    without = encode_texts(plain, models["qwen3"], cache=tmp_path, progress=False)
    # One cache: a vector is found by all of the words it was made of.
    prompted = encode_texts(plain, query, cache=tmp_path, progress=False)
    np.testing.assert_array_equal(prompted, by_hand)
    assert np.abs(prompted - without).max() > 0.01
    np.testing.assert_array_equal(encode_texts(plain, models["qwen3"], cache=tmp_path, progress=False), without)


def test_the_default_prompt_and_names_that_are_none(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    file = folder / "config_sentence_transformers.json"
    content = json.loads(file.read_text("utf-8"))
    with pytest.raises(ValueError, match="the prompt 'title' does not exist; those of .* are query, passage"):
        open_model(str(folder), prompt="title")
    file.write_text(json.dumps(content | {"default_prompt_name": "query"}))
    assert open_model(str(folder)).prompt == "Find funds: "
    assert open_model(str(folder), prompt="passage").prompt == ""
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    with pytest.raises(ValueError, match="include_prompt is False, and there is a prompt; supported is True"):
        open_model(str(folder))
    assert open_model(str(folder), prompt="passage").pooling == "mean"
    file.write_text(json.dumps(content | {"default_prompt_name": "title"}))
    with pytest.raises(ValueError, match="default_prompt_name is 'title', which is not in prompts"):
        open_model(str(folder))
    file.write_text('{"prompts": {"query": 3}}')
    with pytest.raises(ValueError, match="prompts must map names to texts"):
        open_model(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match="the prompt 'query' does not exist; .*qwen3 names none"):
        open_model(str(folder), prompt="query")


# --- weights ---


@pytest.mark.parametrize("name", ["llama", "qwen2", "modernbert"])
def test_shards_give_the_same_model(models, tmp_path, name):
    folder = copy_of(name, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {weight: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, weight in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({weight: weights[weight] for weight, where in files.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    np.testing.assert_equal(open_model(str(folder)).params, models[name].params)


def test_half_precision_is_kept_and_computed_in_float32(models, outputs):
    """The same numbers widened beforehand give the same vectors; float16 is kept as well, other dtypes are refused."""
    name = "qwen3"
    stored = load_file(FOLDER / name / "model.safetensors")
    config, group = models[name].config, FAMILIES[name]
    wide = convert_weights({key: value.astype(np.float32) for key, value in stored.items()}, config, group)
    ids, mask = outputs["ids"] % config.vocab_size, np.arange(151) < outputs["lengths"][:, None]
    kept, widened = (
        apply_encoder(params, ids, mask, config, "lasttoken", True) for params in (models[name].params, wide)
    )
    np.testing.assert_allclose(kept, widened, atol=1e-6)
    half = convert_weights({key: value.astype(np.float16) for key, value in stored.items()}, config, group)
    assert {leaf.dtype for leaf in _leaves(half)} == {np.dtype(np.float16)}
    mixed = convert_weights(stored | {"layers.1.mlp.up_proj.weight": np.zeros((40, 32), np.float32)}, config, group)
    assert {leaf.dtype.name for leaf in _leaves(mixed)} == {"bfloat16", "float32"}
    np.testing.assert_array_equal(mixed["layers"]["up"]["kernel"][0], wide["layers"]["up"]["kernel"][0])
    with pytest.raises(ValueError, match="norm.weight is of int8; supported are float32, bfloat16, float16"):
        convert_weights(stored | {"norm.weight": np.zeros(32, np.int8)}, config, group)
    with pytest.raises(ValueError, match="norm.weight is of float8_e4m3fn"):
        convert_weights(stored | {"norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn)}, config, group)


def test_words_that_only_their_tied_head_stored(models):
    name = "qwen2"
    stored = load_file(FOLDER / name / "model.safetensors")
    assert "lm_head.weight" not in stored
    tied = {key.replace("model.embed_tokens", "lm_head"): value for key, value in stored.items()}
    config = models[name].config
    assert isinstance(config, DecoderConfig)
    np.testing.assert_equal(convert_weights(tied, config, FAMILIES[name]), models[name].params)
    with pytest.raises(ValueError, match="embed_tokens.weight is missing"):
        convert_weights(tied, dataclasses.replace(config, tied=False), FAMILIES[name])


def test_read_rope_is_reported_the_trained_length():
    """Where a file does not name the length that the model was trained on, its positions are that."""
    reported = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    untold = {"rope_type": "yarn", "factor": 4.0}
    assert read_rope(reported, 1e4, 16, 999) == read_rope(untold, 1e4, 16, 64) != read_rope(untold, 1e4, 16, 999)
