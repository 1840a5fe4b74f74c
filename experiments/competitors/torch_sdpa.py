"""Language models of transformers in PyTorch with its scaled dot-product attention, random weights."""
# pyright: reportMissingImports=false

from collections.abc import Callable

import numpy as np
from protocol import Arrays, Job, answer


def encode_shape(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """Vectors of texts of one length in a model of this config.json: the mean of the tokens, or the last one."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.set_num_threads(job["threads"])
    stored, dtype = dict(job["config"]), getattr(torch, job["compute_dtype"])
    mean = stored["model_type"] == "bert"
    config = AutoConfig.for_model(**stored, attn_implementation="sdpa")
    with torch.device(job["device"]):
        model = AutoModel.from_config(config, dtype=dtype).eval()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (job["texts"], job["length"]))
    ids = torch.from_numpy(ids).to(job["device"])

    def call(number: int) -> np.ndarray:
        with torch.inference_mode():
            hidden = model(ids, **({} if mean else {"use_cache": False})).last_hidden_state
            pooled = hidden.mean(1) if mean else hidden[:, -1]
            return torch.nn.functional.normalize(pooled.float(), dim=1).cpu().numpy()

    return call


if __name__ == "__main__":
    answer({"encode_shape": (("torch", "transformers"), encode_shape)}, ("transformers", "torch", "numpy"))
