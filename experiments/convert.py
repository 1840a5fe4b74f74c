"""Write a dataset as files that others read: own tables as Parquet, RecBole's atomic files, or a Hugging Face folder.

    python -m experiments.convert --data=lastfm --to=recbole --out=dataset/lastfm
    python -m experiments.convert --data=recbole --path=dataset/ml-100k --to=tables --out=ml_100k
    python -m experiments.convert --data=lastfm --to=huggingface --out=lastfm_hub

--data is any dataset that can be read (fused_rec/data/readers.py). What the other layout has no room for is counted.
"""

from absl import flags

from experiments import start
from experiments.places import DEFINE_path, existing_folder, written_folder
from fused_rec.config import DataConfig
from fused_rec.data.readers import READERS, load
from fused_rec.data.writers import LAYOUTS, save_dataset

DATA = flags.DEFINE_enum("data", "tables", list(READERS), "What is read.")
PATH = DEFINE_path("path", existing_folder, "Its folder; without this flag its own under $FUSED_REC_DATA.")
TO = flags.DEFINE_enum("to", None, list(LAYOUTS), "What is written.", required=True)
OUT = DEFINE_path("out", written_folder, "New folder; RecBole's files get its name.", required=True)
REPAIR = flags.DEFINE_bool("repair", False, "Mend what can be mended in the files read.")
CORE = flags.DEFINE_integer("core", 1, "Keep users and items with so many interactions, repeatedly.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Reads, writes, tells what was mended and what found no room."""
    dataset = load(DataConfig(DATA.value, str(PATH.value or ""), REPAIR.value, CORE.value))
    lost = save_dataset(dataset, OUT.value, TO.value)
    print(f"{dataset} in {OUT.value}")
    for what, count in dataset.repairs.items():
        print(f"mended: {what}: {count:,}")
    for what, count in lost.items():
        print(f"no room for: {what}: {count:,}")


if __name__ == "__main__":
    start(main)
