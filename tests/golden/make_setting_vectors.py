"""Writes what Sentence Transformers makes of the tiny models where their files set what they otherwise leave out.

    pip install torch transformers sentence-transformers && python tests/golden/make_setting_vectors.py

Run it again only when a case is added or the tiny models change; the encoders under test have no part in it. Reads
  families/settings.json         the texts, and by FAMILY/CASE the files of the family's folder whose settings change
and writes
  families/settings.safetensors  FAMILY/CASE float32 [texts, D]: vectors of the texts, encoded one by one
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "families/settings.json").read_text("utf-8"))


def lay_out(case: str, folder: Path) -> None:
    """A copy of the family's folder with the settings of a case."""
    family = case.split("/")[0]
    shutil.copytree(HERE / ("tiny_bert" if family == "bert" else f"families/{family}"), folder)
    for name, changes in [*SETTINGS["files"].items(), *SETTINGS["cases"][case].items()]:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(changes, dict) and file.exists():
            changes = json.loads(file.read_text("utf-8")) | changes
        file.write_text(json.dumps(changes), "utf-8")


if __name__ == "__main__":
    vectors = {}
    for case in SETTINGS["cases"]:
        with tempfile.TemporaryDirectory() as scratch:
            lay_out(case, Path(scratch) / "model")
            model = SentenceTransformer(
                str(Path(scratch) / "model"),
                device="cpu",
                model_kwargs={"dtype": "float32", "attn_implementation": "eager"},
            )
            vectors[case] = model.encode(SETTINGS["texts"], batch_size=1).astype(np.float32)
    save_file(vectors, HERE / "families/settings.safetensors")
    print(f"{len(vectors)} cases, {len(SETTINGS['texts'])} texts")
