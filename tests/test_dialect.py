"""Tables as spreadsheets export them: found out and noted, or refused with the setting that helps."""

import gzip
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import fused_rec as fr
from fused_rec.config import DataConfig
from fused_rec.data.dataset import DataError
from fused_rec.data.io import files
from fused_rec.data.io.tables import read_tables
from fused_rec.data.sources.registry import load

HELD = "user_id,item_id,value\nJosé,x,1.5\nb,y,2\n"
ITEMS = "item_id,name,text,price\nx,Anleihe,Für alle,1.5\ny,Aktie,,2\n"


def write(folder: Path, interactions: bytes, items: bytes = ITEMS.encode()) -> Path:
    (folder / "interactions.csv").write_bytes(interactions)
    (folder / "items.csv").write_bytes(items)
    return folder


VALUES = "interactions: values kept, which the model does not use (data.min_value makes use of them)"


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        read_tables(folder, **settings)
    return str(error.value)


@pytest.mark.parametrize("before", ["", "sep=;\r\n", '"sep=;"\n'])
@pytest.mark.parametrize(
    ("encoding", "mark", "said"),
    [
        ("utf-8", b"", ""),
        ("utf-8-sig", b"", ""),
        ("utf-16", b"", ", UTF-16"),
        ("utf-16-le", b"", ", UTF-16"),
        ("utf-16-be", b"", ", UTF-16"),
        ("utf-16-be", b"\xfe\xff", ", UTF-16"),
        ("utf-32", b"", ", UTF-32"),
    ],
)
def test_semicolons_in_any_unicode(tmp_path, before, encoding, mark, said):
    text = before + HELD.replace(",", ";").replace("\n", "\r\n")
    dataset = read_tables(write(tmp_path, mark + text.encode(encoding)))
    assert dataset.users["user_id"].to_pylist() == ["José", "b"]
    assert dataset.interactions["value"].to_pylist() == [1.5, 2.0]
    assert dataset.notes == {f"interactions.csv: read as semicolon-separated{said}": 1, VALUES: 2}


@pytest.mark.parametrize(("delimiter", "word"), [("\t", "tab"), ("|", "pipe"), (";", "semicolon")])
@pytest.mark.parametrize("quoted", [False, True])
def test_delimiters_are_found_from_the_header(tmp_path, delimiter, word, quoted):
    items = ITEMS.replace(",", delimiter).replace("Für alle", f'"Für, alle{delimiter} x\n| y"')
    if quoted:
        items = items.replace(f"item_id{delimiter}name", f'"item_id"{delimiter}"name"')
    dataset = read_tables(write(tmp_path, HELD.encode(), items.encode()))
    assert dataset.items["text"].to_pylist() == [f"Für, alle{delimiter} x\n| y", None]
    assert dataset.items["price"].to_pylist() == [1.5, 2.0]
    assert dataset.notes == {f"items.csv: read as {word}-separated": 1, VALUES: 2}


def test_a_table_of_one_column_needs_no_delimiter(tmp_path):
    assert read_tables(write(tmp_path, HELD.encode(), b"item_id\nx\ny\n")).notes == {VALUES: 2}
    (tmp_path / "items.csv").rename(tmp_path / "items.tsv")
    assert read_tables(tmp_path).notes == {VALUES: 2}


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_empty_lines_before_the_header(tmp_path, delimiter):
    held = "\n\r\nuser_id,item_id\n007,x\n08,y\n".replace(",", delimiter)
    assert read_tables(write(tmp_path, held.encode())).users["user_id"].to_pylist() == ["007", "08"]


def test_a_header_with_other_names_is_shown_as_its_delimiter_divides_it(tmp_path):
    assert "column user_id is missing (there: User_ID, Item_ID)" in refused(write(tmp_path, b"User_ID;Item_ID\na;b\n"))


def test_a_delimiter_that_is_named(tmp_path):
    write(tmp_path, HELD.replace(",", "^").encode())
    assert "header 'user_id^item_id^value' is one cell" in refused(tmp_path)
    assert "name the delimiter by data.delimiter" in refused(tmp_path)
    dataset = fr.load_dataset(tmp_path, delimiter="^")
    assert dataset.interactions["value"].to_pylist() == [1.5, 2.0]
    assert dataset.notes == {
        "interactions.csv: read as '^'-separated": 1,
        VALUES: 2,
    }


def test_rows_of_another_width_are_numbered_from_the_header(tmp_path):
    write(tmp_path, b"sep=;\r\nuser_id;item_id\r\na;x\r\nb;y;z\r\n")
    assert "interactions.csv, row 3: 3 cells instead of 2: 'b;y;z'." in refused(tmp_path)
    write(tmp_path, b'sep=;\nuser_id;item_id\na;x\nb;"never closed\n')
    assert "interactions.csv, row 3: a quote is not closed" in refused(tmp_path)


def test_windows_1252_is_named_by_the_user(tmp_path):
    write(tmp_path, HELD.encode("cp1252"))
    report = refused(tmp_path)
    assert "interactions.csv, row 2: not UTF-8: b'Jos\\xe9,x,1.5\\n'. save the file as UTF-8, or name its" in report
    assert "data.encoding=cp1252" in report
    dataset = load(DataConfig("tables", str(tmp_path), encoding="cp1252"))
    assert dataset.users["user_id"].to_pylist() == ["José", "b"]
    assert dataset.items["text"].to_pylist() == ["Für alle", None]  # items.csv is UTF-8, and read as that
    assert dataset.notes == {"interactions.csv: read as Windows-1252": 1, VALUES: 2}


def test_lines_that_are_not_utf8_are_counted(tmp_path):
    write(tmp_path, gzip.compress(b""), ("item_id,name\n" + "x,é\n" * 7).encode("latin-1"))
    (tmp_path / "interactions.csv").rename(tmp_path / "interactions.csv.gz")
    (tmp_path / "interactions.csv.gz").write_bytes(gzip.compress(HELD.encode("latin-1")))
    report = refused(tmp_path)
    assert "items.csv: 7 lines are not UTF-8." in report
    assert "interactions.csv.gz, row 2: not UTF-8: b'Jos\\xe9" in report


def test_bytes_that_the_named_encoding_does_not_have(tmp_path):
    write(tmp_path, b"user_id,item_id\nJos\xe9,x\n\x81,y\n")
    assert "interactions.csv, row 3: not cp1252: b'\\x81,y\\n'." in refused(tmp_path, encoding="cp1252")
    write(tmp_path, b"user_id,item_id\na,x\nb,y\n")
    assert "interactions.csv: cannot be read: UTF-16 stream does not start" in refused(tmp_path, encoding="utf-16")
    write(tmp_path, HELD.encode("utf-16")[:-1])
    assert "interactions.csv: cannot be read: " in refused(tmp_path)


@pytest.mark.parametrize("encoding", ["iso2022_jp", "utf-7", "gb18030", "shift_jis", "latin-1", "cp037"])
def test_other_encodings(tmp_path, encoding):
    name = "日本" if encoding not in ("latin-1", "cp037") else "José"
    write(tmp_path, f"user_id,item_id\n{name},x\nb,y\n".encode(encoding), b"item_id\nx\ny\n")
    if encoding == "cp037":  # no byte of it means what it means in ASCII
        (tmp_path / "items.csv").unlink()
    assert read_tables(tmp_path, encoding=encoding).users["user_id"].to_pylist() == [name, "b"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("delimiter", "ab"), ("delimiter", '"'), ("delimiter", "\n"), ("delimiter", "§"), ("delimiter", "x")]
    + [("encoding", "windows"), ("encoding", "hex"), ("encoding", "rot13"), ("encoding", "a b")],
)
def test_settings_out_of_bounds(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"data.{setting} is .*; it must be empty or"):
        read_tables(write(tmp_path, HELD.encode()), **{setting: value})


def test_formats_of_publishers_have_a_delimiter_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="data.delimiter is ';', but 'recbole' has a format of its own"):
        fr.load_dataset("recbole", path=tmp_path, delimiter=";")


def test_decimal_commas_are_refused(tmp_path):
    items = "item_id;price;codes;text\nx;1.234,5;1,2;1,5\ny;2;1,2,3;\n"
    report = refused(write(tmp_path, HELD.encode(), items.encode()))
    assert "1 fault in the input" in report
    assert "items.csv, row 2: price '1.234,5' has a decimal comma (1 rows in all). write numbers" in report
    held = HELD.replace(",", ";").replace("1.5", "1,5")
    report = refused(write(tmp_path, held.encode()), min_value=1.0)
    assert "row 2: value '1,5' is not a number (a decimal comma is in it)" in report


def test_the_command_and_the_config(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", HELD.replace(",", "^").encode("cp1252"))
    command = [sys.executable, "-m", "experiments.convert", f"--path={tmp_path}/in", "--to=tables"]
    settings = ["--delimiter=^", "--encoding=cp1252", f"--out={tmp_path}/out"]
    done = subprocess.run(command + settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "interactions.csv: read as '^'-separated, Windows-1252" in done.stdout
    assert fr.load_dataset(tmp_path / "out").users["user_id"].to_pylist() == ["José", "b"]


# --- long rows


@pytest.mark.parametrize("form", ["csv", "csv.gz", "utf-16"])
@pytest.mark.parametrize("long", ["fund " * 440_000, "line\r\n" * 300_000, 'so "" it; is, ' * 150_000])
def test_long_cells(tmp_path, form, long):
    rows = "".join(f'x{n},"{long if n == 1 else "short"}"\n' for n in range(4))
    held = "user_id,item_id\n" + "".join(f"a,x{n}\n" for n in range(4))
    write(tmp_path, held.encode(), ("item_id,text\n" + rows).encode("utf-16" if form == "utf-16" else "utf-8"))
    if form == "csv.gz":
        (tmp_path / "items.csv.gz").write_bytes(gzip.compress((tmp_path / "items.csv").read_bytes()))
        (tmp_path / "items.csv").unlink()
    assert read_tables(tmp_path).items["text"].to_pylist() == ["short", long.replace('""', '"'), "short", "short"]


def test_many_long_cells_are_read_in_bounded_memory(tmp_path):
    with (tmp_path / "items.csv").open("w") as file:
        file.write("item_id,text\n")
        for n in range(20):
            file.write(f"x{n},{'fund ' * 400_000}\n")
    (tmp_path / "interactions.csv").write_text("user_id,item_id\na,x0\n")
    tracemalloc.start()
    lengths = [len(text) for text in read_tables(tmp_path).items["text"].to_pylist()]
    assert lengths == [2_000_000] * 20
    assert tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()


def test_a_row_beyond_the_bound_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCKS", (1 << 10, 1 << 12))
    monkeypatch.setattr(files, "ROW_BYTES", 1 << 12)
    write(tmp_path, HELD.encode(), f"item_id,text\nx,{'fund ' * 4000}\ny,\n".encode())
    assert "items.csv: a row takes more than 4,096 bytes. shorten its texts, write the" in refused(tmp_path)
    write(tmp_path, HELD.encode(), f'item_id,text\nx,"{"fund " * 40_000}\ny,\n'.encode())
    assert "items.csv, row 2: a quote is not closed as it should be (unexpected end of data)" in refused(tmp_path)


@pytest.mark.parametrize(("numbers", "said"), [("1.234;12", True), ("0.125;1.234", False), ("1.234;1.5", False)])
def test_points_that_may_divide_thousands_are_noted(tmp_path, numbers, said):
    one, other = numbers.split(";")
    dataset = read_tables(write(tmp_path, f"user_id;item_id;value\na;x;{one}\nb;x;{other}\n".encode()))
    assert dataset.interactions["value"].to_pylist() == [pytest.approx(float(one)), pytest.approx(float(other))]
    noted = f"value {one!r} in row 2 is read with a decimal point; if points divide thousands, write numbers without"
    assert any(noted in note for note in dataset.notes) == said
