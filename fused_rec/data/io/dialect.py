"""Detection of how a text table is written: its encoding, its delimiter, and a `sep=` line of Excel before the header.

The encoding is UTF-8 unless a byte order mark, or a zero in every second byte, indicates UTF-16 or UTF-32. Other
encodings cannot be distinguished, so the user names them. Even then, a file that is valid UTF-8 and not only ASCII is
read as UTF-8, because text in another encoding is practically never valid UTF-8. The delimiter is the one that yields
the required columns of the table; no two delimiters do.
"""

import codecs
import contextlib
import csv
import dataclasses
import gzip
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fused_rec.data.dataset import DataError, Problem

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
UTF8 = "utf8"  # Arrow's name; skips a byte order mark
HEADER = 1 << 22  # maximum characters of a header
_MARKS = (  # UTF-32 first: its marks begin with those of UTF-16
    *((codecs.BOM_UTF8, UTF8), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_ZEROS = {b"\1\0\1\0": "utf-16-le", b"\0\1\0\1": "utf-16-be"}  # of an ASCII header: 1 = nonzero byte
_SHOWN = {"utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "cp1252": "Windows-1252", "latin-1": "Latin-1"}
_SEPARATOR = re.compile('"?sep=(.)"?\r?\n', re.IGNORECASE)  # Excel's own line before the header


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Format of a text table.

    Attributes:
      delimiter: one character.
      encoding: Python's name of the encoding.
      skip: number of lines before the header.
    """

    delimiter: str
    encoding: str = UTF8
    skip: int = 0

    def note(self, file: str) -> str:
        """Describes an unusual format of a file; empty for UTF-8 with commas (tabs in .tsv)."""
        expected = "\t" if ".tsv" in file.lower() else ","
        said = []
        if self.delimiter != expected:
            said.append(f"{DELIMITERS.get(self.delimiter, repr(self.delimiter))}-separated")
        if self.encoding != UTF8:
            said.append(_SHOWN.get(self.encoding, self.encoding.upper()))
        return f"{file}: read as {', '.join(said)}" if said else ""


def open_bytes(file: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file for reading bytes, decompressed if its name ends in .gz."""
    return gzip.GzipFile(file) if file.suffix.lower() == ".gz" else open(file, "rb")


@contextlib.contextmanager
def open_text(file: Path, dialect: Dialect, errors: str = "strict") -> Iterator[io.TextIOWrapper]:
    """Opens a file as text after the skipped lines, with line ends unchanged.

    Inside the block, `csv` accepts cells of any length.

    Args:
      file: plain or .gz.
      dialect: its format.
      errors: error handling of the decoder, as in `open`.

    Yields:
      The text stream.
    """
    encoding = "utf-8-sig" if dialect.encoding == UTF8 else dialect.encoding
    before = csv.field_size_limit(sys.maxsize)
    try:
        with open_bytes(file) as source, io.TextIOWrapper(source, encoding, errors, newline="") as lines:
            for _ in range(dialect.skip):
                lines.readline()
            yield lines
    finally:
        csv.field_size_limit(before)


def find_dialect(file: Path, required: Sequence[str], known: Sequence[str], delimiter: str, encoding: str) -> Dialect:
    """Detects the format of a text table.

    Args:
      file: plain or .gz.
      required: columns that the table must have.
      known: further columns of its format.
      delimiter: tried before the usual ones; empty = none.
      encoding: of files without a byte order mark that are not UTF-8; empty = UTF-8.

    Returns:
      The format.

    Raises:
      DataError: no delimiter divides the header.
      OSError, EOFError, zlib.error, UnicodeError: the file cannot be read.
    """
    encoding = _encoding(file, encoding)
    with open_text(file, Dialect(",", encoding), "replace") as lines:  # the reader of the table reports invalid bytes
        head = lines.read(HEADER)
    separator = _SEPARATOR.match(head)
    skip = 0
    if separator:
        head, skip = head[separator.end() :], 1
    candidates = dict.fromkeys([*delimiter, *(separator[1] if separator else ""), *DELIMITERS])
    cells = {candidate: _cells(head, candidate) for candidate in candidates}
    if file.suffixes[:1] and ".tsv" in file.name.lower():  # preferred if several fit equally
        cells = {"\t": cells["\t"], **cells}

    def fit(candidate: str) -> tuple[bool, int, int]:
        there = set(cells[candidate])  # without the required columns, the best fit for the message
        return there >= set(required), len(there & {*required, *known}), len(there)

    best = max(cells, key=fit)
    [first, *more] = cells[best] or [""]
    if not more and first not in required and all(name in first for name in required):
        message = f"its header {first[:60]!r} is one cell, whether comma, semicolon, tab or pipe divides cells"
        raise DataError([Problem(file.name, 1, message, "name the delimiter by data.delimiter, or write commas")])
    return Dialect(best, encoding, skip)


def _cells(head: str, delimiter: str) -> list[str]:
    try:
        return next(
            filter(None, csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)), []
        )  # skips empty lines, like Arrow
    except (csv.Error, TypeError, ValueError):  # Python refuses the delimiter or the header
        return []


def _encoding(file: Path, given: str) -> str:
    with open_bytes(file) as source:
        head = source.read(4)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if encoding := _ZEROS.get(bytes(map(bool, head))):
        return encoding
    given = codecs.lookup(given).name if given else UTF8
    if given in ("utf-8", "utf-8-sig") or given != UTF8 and _is_utf8(file):
        return UTF8
    return {"iso8859-1": "latin-1"}.get(given, given)


def _is_utf8(file: Path) -> bool:
    """Returns whether a file is valid UTF-8 with non-ASCII characters and no zero bytes, which other encodings have."""
    decoder, beyond = codecs.getincrementaldecoder("utf-8")(), False
    with open_bytes(file) as source:
        try:
            while chunk := source.read(1 << 20):
                decoder.decode(chunk)
                beyond |= not chunk.isascii()
                if b"\0" in chunk:
                    return False
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return beyond
