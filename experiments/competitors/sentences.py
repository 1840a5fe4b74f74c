"""sentence-transformers over the same model folder and texts, batches as the package sets them."""
# pyright: reportMissingImports=false

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from protocol import Arrays, Job, answer


def encode(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """Vectors of all texts."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(job["threads"])
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    model = SentenceTransformer(job["model_folder"], device="cpu", local_files_only=True)
    model = model.to(getattr(torch, job["compute_dtype"]))
    return lambda number: model.encode(texts, show_progress_bar=False)


if __name__ == "__main__":
    answer({"encode": (("sentence_transformers",), encode)}, ("sentence-transformers", "transformers", "torch"))
