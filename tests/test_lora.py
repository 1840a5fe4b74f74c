"""Adapters beside a language model's weights: where they start, what they add, and what they leave alone."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fused_rec.text.encoders.lora import init_trainable, with_adapters
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.pretrained import open_model

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")
IDS, MASK = np.array([[2, 7, 9, 3], [2, 5, 3, 0]], np.int32), np.array([[True] * 4, [True] * 3 + [False]])


@pytest.fixture(scope="module")
def tiny():
    return open_model(TINY)


def vectors(model, params):
    return np.asarray(apply_encoder(params, IDS, MASK, model.config, model.pooling, model.normalize))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_it_starts_at_the_published_model(tiny, training):
    """Weight for weight, and so vector for vector, bit for bit."""
    params = with_adapters(training, tiny.params, init_trainable(training, tiny.params, rank=2, seed=0))
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params)
    np.testing.assert_array_equal(vectors(tiny, params), vectors(tiny, tiny.params))


def test_by_hand():
    """One plain kernel, and two stacked as scanned layers are; a bias and an embedding stay without adapters."""
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
    params = {
        "dense": {"kernel": kernel, "bias": np.ones(3, np.float32)},
        "layers": {"up": {"kernel": np.stack([kernel, -kernel])}},
        "word": {"embedding": np.ones((5, 4), np.float32)},
    }
    adapters = init_trainable("lora", params, rank=2, seed=0)
    leaves: dict[Any, Any] = flatten_dict(adapters)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        ("dense", "kernel", "down"): (4, 2),
        ("dense", "kernel", "up"): (2, 3),
        ("layers", "up", "kernel", "down"): (2, 4, 2),
        ("layers", "up", "kernel", "up"): (2, 2, 3),
    }
    assert not adapters["dense"]["kernel"]["up"].any() and adapters["dense"]["kernel"]["down"].all()
    adapters["layers"]["up"]["kernel"] = {
        "down": np.stack([np.zeros((4, 2)), np.eye(4, 2)]).astype(np.float32),
        "up": np.stack([np.full((2, 3), 9), [[1, 2, 3], [4, 5, 6]]]).astype(np.float32),
    }
    merged = with_adapters("lora", params, adapters)
    added = np.asarray(merged["layers"]["up"]["kernel"]) - params["layers"]["up"]["kernel"]
    assert added.tolist() == [[[0] * 3] * 4, [[2, 4, 6], [8, 10, 12], [0] * 3, [0] * 3]]  # twice down @ up
    for name in ("dense", "word"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], params[name])


def test_adapters_are_small_and_a_function_of_the_seed(tiny):
    one, same, other = (init_trainable("lora", tiny.params, rank=2, seed=seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    down = one["layers"]["up"]["kernel"]["down"]
    assert not np.array_equal(down, other["layers"]["up"]["kernel"]["down"])
    assert down.std() == pytest.approx(down.shape[-2] ** -0.5, rel=0.2)
    count, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (one, tiny.params))
    assert count < whole / 10
    assert {path[-1] for path in flatten_dict(one)} == {"down", "up"}


def test_the_first_gradient_reaches_up_alone(tiny):
    """As `up` is zero, `down` waits for it."""

    def first(adapters):
        params = with_adapters("lora", tiny.params, adapters)
        return apply_encoder(params, IDS, MASK, tiny.config, tiny.pooling, tiny.normalize)[0, 0]

    slopes = jax.grad(first)(init_trainable("lora", tiny.params, rank=2, seed=0))
    found: dict[Any, Any] = flatten_dict(slopes)
    for path, slope in found.items():
        assert np.isfinite(slope).all()
        if path[-1] == "down" or "key" in path:  # the first token's score is the same of every key's bias
            continue
        assert np.abs(slope).max() > 0, path
    downs = [slope for path, slope in found.items() if path[-1] == "down"]
    assert not any(np.any(slope) for slope in downs)


def test_what_cannot_be_adapted_is_refused(tiny):
    with pytest.raises(ValueError, match=r"text\.lora_rank is 32; it must be below 32, the smaller side"):
        init_trainable("lora", tiny.params, rank=32, seed=0)
    with pytest.raises(ValueError, match=r"no weight .* is named kernel; text\.finetune must be frozen or full"):
        init_trainable("lora", {"word": {"embedding": np.ones((5, 4), np.float32)}}, rank=1, seed=0)
