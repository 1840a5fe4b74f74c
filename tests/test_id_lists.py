"""Files of ids, as lines and as tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from fused_rec.data.dataset import DataError
from fused_rec.data.io.id_lists import read_ids

KNOWN = pa.chunked_array([["7", "A"], ["B b", "C"]])


def read(file: Path) -> list[str]:
    return read_ids(file, "user_id", KNOWN, "correct it")


def written(folder: Path, text: str, name: str = "ids.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


@pytest.mark.parametrize(
    "text",
    [
        "C\nA\nB b\n",
        "C\r\n A \r\nB b\nC\n\n\n",
        "\ufeffuser_id\nC\nA\nB b\n",
        'user_id,score\nC,1\nA,2\n"B b",3\nA,4\n',
        'rank;"user_id"\n1;C\n2;A\n3;B b\n',
        "x\tuser_id\n\tC\n\tA\n\tB b\n",
    ],
)
def test_lines_and_tables_of_text(tmp_path, text):
    assert read(written(tmp_path, text)) == ["C", "A", "B b"]


def test_parquet(tmp_path):
    for values in (["7"], [7], pa.array(["7"]).dictionary_encode()):
        pyarrow.parquet.write_table(pa.table({"user_id": values}), tmp_path / "ids.parquet")
        assert read(tmp_path / "ids.parquet") == ["7"]
    pyarrow.parquet.write_table(pa.table({"user": [7]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match=r"ids.parquet: column user_id is missing \(there: user\)"):
        read(tmp_path / "ids.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\nD\n", "ids.csv, row 2: user_id 'D' is unknown. correct it"),
        ("user_id\nA\nC\nD\n", "ids.csv, row 4: user_id 'D' is unknown. correct it"),
        ("A\n\nC\n", "ids.csv, row 2: user_id is empty"),
        ("", "ids.csv: it has no user_id"),
        ("user_id\n", "ids.csv: it has no user_id"),
        ("nobody\n" * 1000, "1,000 rows with an empty or unknown user_id in all"),
    ],
)
def test_faults_name_file_and_row(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, text))
