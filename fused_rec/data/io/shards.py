"""Names in Hugging Face dataset folders, for their reader and their writer."""

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # Hugging Face's names -> ours
ROW = "row"  # column: index of an interaction before splitting


def shard(split: str) -> str:
    """Returns the file name of a split with one shard."""
    return f"{split}-00000-of-00001.parquet"
