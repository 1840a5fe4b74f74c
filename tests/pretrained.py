"""The tiny pretrained model, for tests that make up its vectors."""

import dataclasses
from pathlib import Path

from fused_rec.text.pretrained import PretrainedModel, open_model

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")


def model_of_width(hidden_size: int) -> PretrainedModel:
    """The model as one of another width, which its parameters do not have: it encodes nothing."""
    model = open_model(TINY)
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, hidden_size=hidden_size, num_attention_heads=1)
    )
