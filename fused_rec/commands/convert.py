"""Converts a dataset to own tables as Parquet, RecBole's atomic files, or a Hugging Face dataset folder.

    python -m experiments.convert --data=lastfm --to=recbole --out=dataset/lastfm
    python -m experiments.convert --data=recbole --path=dataset/ml-100k --to=tables --out=ml_100k
    python -m experiments.convert --data=lastfm --to=huggingface --out=lastfm_hub

--data is any readable dataset (fused_rec/data/sources/registry.py). What the new layout cannot hold is counted.
"""

from absl import flags

from fused_rec.commands.places import DEFINE_path, existing_folder, written_folder
from fused_rec.config import DataConfig
from fused_rec.data.io.writers import LAYOUTS, save_dataset
from fused_rec.data.sources.registry import READERS, load
from fused_rec.storage import check_new

DATA = flags.DEFINE_enum("data", "tables", list(READERS), "Dataset to read.")
PATH = DEFINE_path("path", existing_folder, "Its folder; default: its own under $FUSED_REC_DATA.")
TO = flags.DEFINE_enum("to", None, list(LAYOUTS), "Layout to write.", required=True)
OUT = DEFINE_path("out", written_folder, "New folder; RecBole's files get its name.", required=True)
REPAIR = flags.DEFINE_bool("repair", False, "Repair the faults that can be repaired.")
CORE = flags.DEFINE_integer("k_core", 1, "Filter to users and items with at least k interactions.", lower_bound=1)
MIN_VALUE = flags.DEFINE_float("min_value", None, "Minimum value of an interaction.")

DELIMITER = flags.DEFINE_string("delimiter", "", "Delimiter of own text tables; empty = detected from the header.")
ENCODING = flags.DEFINE_string("encoding", "", "Encoding of own tables that are not UTF-8, such as cp1252.")


def main(argv: list[str]) -> None:
    """Reads and writes the dataset, and prints repairs, notes and what the layout cannot hold."""
    check_new(OUT.value)
    config = DataConfig(
        DATA.value,
        str(PATH.value or ""),
        REPAIR.value,
        CORE.value,
        min_value=MIN_VALUE.value,
        delimiter=DELIMITER.value,
        encoding=ENCODING.value,
    )
    dataset = load(config)
    lost = save_dataset(dataset, OUT.value, TO.value)
    print(f"{dataset} in {OUT.value}")
    for what, count in dataset.repairs.items():
        print(f"repaired: {what}: {count:,}")
    for what, count in dataset.notes.items():
        print(f"note: {what}: {count:,}")
    for what, count in lost.items():
        print(f"not kept: {what}: {count:,}")
