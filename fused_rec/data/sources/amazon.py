"""Reader of the Amazon review data sets of 2014."""

from pathlib import Path

import pyarrow as pa

from fused_rec.data.dataset import Dataset
from fused_rec.data.io.arrow import join_texts, pc
from fused_rec.data.io.files import only_file, read_json_lines
from fused_rec.data.io.validate import ReaderLog, Tables, assemble


def amazon(path: Path, repair: bool, min_value: int | float | None = None) -> Dataset:
    """Reads the `*.json.gz` of an Amazon review data set of 2014.

    Args:
      path: folder with this one file.
      repair: as in `fused_rec.data.io.tables.read_tables`.
      min_value: minimum rating of an interaction, None = all.

    Returns:
      The dataset; the text of a review is "summary. reviewText", its `value` the stars.

    Raises:
      DataError: lists all faults.
    """
    schema = dict.fromkeys(("reviewerID", "asin", "reviewText", "summary"), pa.string())
    file = only_file(path, "*.json.gz")
    rows = read_json_lines(file, {**schema, "overall": pa.float64(), "unixReviewTime": pa.int64()})
    text_columns = {name: pc.utf8_trim_whitespace(pc.fill_null(rows[name], "")) for name in ("summary", "reviewText")}
    empty = {name: pc.equal(text, "") for name, text in text_columns.items()}
    text = join_texts(
        *(pc.if_else(empty[name], pa.scalar(None, pa.string()), text_columns[name]) for name in text_columns)
    )
    events = pa.table(
        {
            "user_id": rows["reviewerID"],
            "item_id": rows["asin"],
            "timestamp": rows["unixReviewTime"],
            "value": rows["overall"],
            "text": text,
        }
    )
    bare = pc.sum(empty["reviewText"]).as_py()
    log = ReaderLog({"interactions: reviews without a body, for which the summary stands": bare} if bare else {})
    auto_repair = ("repeated interaction",)
    return assemble(path.name, Tables(events), repair=repair, min_value=min_value, log=log, auto_repair=auto_repair)
