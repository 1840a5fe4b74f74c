"""Write a dataset as files that others read: own tables as Parquet, RecBole's atomic files, or a Hugging Face folder.

    python -m experiments.convert --data=lastfm --to=recbole --out=dataset/lastfm
    python -m experiments.convert --data=recbole --path=dataset/ml-100k --to=tables --out=ml_100k
    python -m experiments.convert --data=lastfm --to=huggingface --out=lastfm_hub

--data is any dataset that can be read (fused_rec/data/sources/registry.py). What the other layout has no room for is
counted.
"""

from absl import flags

from fused_rec.commands.places import DEFINE_path, existing_folder, written_folder
from fused_rec.config import DataConfig
from fused_rec.data.io.writers import LAYOUTS, save_dataset
from fused_rec.data.sources.registry import READERS, load
from fused_rec.storage import check_new

DATA = flags.DEFINE_enum("data", "tables", list(READERS), "What is read.")
PATH = DEFINE_path("path", existing_folder, "Its folder; without this flag its own under $FUSED_REC_DATA.")
TO = flags.DEFINE_enum("to", None, list(LAYOUTS), "What is written.", required=True)
OUT = DEFINE_path("out", written_folder, "New folder; RecBole's files get its name.", required=True)
REPAIR = flags.DEFINE_bool("repair", False, "Mend what can be mended in the files read.")
CORE = flags.DEFINE_integer("k_core", 1, "Keep users and items with so many interactions, repeatedly.", lower_bound=1)
MIN_VALUE = flags.DEFINE_float("min_value", None, "Rows whose value is below it are no interactions.")

DELIMITER = flags.DEFINE_string("delimiter", "", "Of your own tables as text; empty = found from the header.")
ENCODING = flags.DEFINE_string("encoding", "", "Of own tables that are not UTF-8, such as cp1252.")


def main(argv: list[str]) -> None:
    """Reads, writes, prints what was mended, what is worth knowing and what found no room."""
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
        print(f"mended: {what}: {count:,}")
    for what, count in dataset.notes.items():
        print(f"note: {what}: {count:,}")
    for what, count in lost.items():
        print(f"no room for: {what}: {count:,}")
