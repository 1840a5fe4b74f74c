"""Downloads against a real server on this machine: resuming, verifying, and archives that must not be unpacked."""

import gzip
import hashlib
import http.server
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from fused_rec.data.sources import fetch as fetching
from fused_rec.data.sources.download import PUBLICATIONS, Publication, Source, download
from fused_rec.data.sources.fetch import DownloadError, digest, fetch, unpack
from fused_rec.data.sources.registry import READERS

BODY = bytes(range(256)) * 1500  # 384,000 bytes, six chunks


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; cuts the first `cuts` transfers after `after` bytes; honours Range unless `ranges` is off."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.after, self.ranges = files, 0, 100_000, True
        self.asked: list[str | None] = []  # the Range header of each request

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        body = self.server.files.get(self.path[1:])
        if body is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: start + self.server.after]  # and the connection closes before the promised length
        self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)
    with Server({"data.bin": BODY}) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def tar_member(name: str, *, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = 2
    fetch(
        server.url("data.bin"),
        tmp_path / "in" / "data.bin",
        sha256=hashlib.sha256(BODY.replace(b"\r", b"")).hexdigest(),
    )
    assert (tmp_path / "in" / "data.bin").read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]
    assert os.listdir(tmp_path / "in") == ["data.bin"]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    server.cuts, server.after = 5, 10_000
    with pytest.raises(DownloadError, match=r"broke off 5 times \(after 50,000 of 384,000 bytes\); run again to go on"):
        fetch(server.url("data.bin"), tmp_path / "data.bin")
    assert os.listdir(tmp_path) == ["data.bin.part"]
    fetch(server.url("data.bin"), tmp_path / "data.bin")
    assert server.asked[-1] == "bytes=50000-" and (tmp_path / "data.bin").read_bytes() == BODY


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.cuts, server.ranges = 1, False
    fetch(
        server.url("data.bin"), tmp_path / "data.bin", limit=400_000
    )  # what the first transfer brought is not counted
    assert server.asked == [None, "bytes=100000-"]
    assert (tmp_path / "data.bin").read_bytes() == BODY


@pytest.mark.parametrize("left", [BODY, BODY + b"of a longer file"], ids=["all of it", "another file"])
def test_a_part_that_reaches_the_end_of_the_file(server, tmp_path, left):
    (tmp_path / "data.bin.part").write_bytes(left)
    fetch(server.url("data.bin"), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == BODY
    assert server.asked == [f"bytes={len(left)}-", None][: 1 if left == BODY else 2]


def test_another_file_than_the_published_one_is_not_kept(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"what was here before")
    with pytest.raises(
        DownloadError, match=f"data.bin is not the published file: its SHA-256 is [0-9a-f]{{64}}, {'0' * 64}"
    ):
        fetch(server.url("data.bin"), tmp_path / "data.bin", sha256="0" * 64)
    assert (tmp_path / "data.bin").read_bytes() == b"what was here before"
    assert os.listdir(tmp_path) == ["data.bin"]


def test_errors_and_too_much_data_stop_at_once(server, tmp_path):
    with pytest.raises(DownloadError, match="answers 404 Not Found"):
        fetch(server.url("no.bin"), tmp_path / "no.bin")
    with pytest.raises(DownloadError, match="sends more than 200,000 bytes"):
        fetch(server.url("data.bin"), tmp_path / "data.bin", limit=200_000)
    assert len(server.asked) == 2 and os.listdir(tmp_path) == []


def test_gzip_files_are_checked_to_their_end(server, tmp_path):
    whole = gzip.compress(b"{}\n" * 9999)
    server.files = {"whole.json.gz": whole, "cut.json.gz": whole[:-9], "bomb.json.gz": gzip.compress(bytes(1 << 20))}
    fetch(server.url("whole.json.gz"), tmp_path / "whole.json.gz")
    with pytest.raises(DownloadError, match="cut.json.gz is cut short or corrupt"):
        fetch(server.url("cut.json.gz"), tmp_path / "cut.json.gz")
    with pytest.raises(DownloadError, match="bomb.json.gz unpacks to more than 100,000 bytes"):
        fetch(server.url("bomb.json.gz"), tmp_path / "bomb.json.gz", limit=100_000)
    assert os.listdir(tmp_path) == ["whole.json.gz"]


def test_archives_are_unpacked_below_their_folder(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(**{"readme.txt": b"hello", "in/deep.txt": b"deep"}))
    folders = [tar_member("in", kind=tarfile.DIRTYPE), tar_member("in/x.txt", size=3)]
    (tmp_path / "a.tar.gz").write_bytes(tarred(*folders))
    unpack(tmp_path / "a.zip", tmp_path / "zip")
    unpack(tmp_path / "a.tar.gz", tmp_path / "tar")
    assert (tmp_path / "zip" / "in" / "deep.txt").read_bytes() == b"deep"
    assert (tmp_path / "tar" / "in" / "x.txt").read_bytes() == b"xxx"


def link_in_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def changed_zip(content: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """The bytes at an offset from each signature (PK..) replaced."""
    for signature, offset, new in changes:
        at = content.index(signature) + offset
        content = content[:at] + new + content[at + len(new) :]
    return content


def twice_in_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    return buffer.getvalue()


def crowded_zip(entries: int) -> bytes:
    """A directory of so many members in few bytes; a parser keeps half a kilobyte of each."""
    one = zipped(x=b"")
    start, end = one.index(b"PK\x01\x02"), one.index(b"PK\x05\x06")
    directory = one[start:end] * entries
    sizes = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, entries & 0xFFFF, entries & 0xFFFF, len(directory), start, 0)
    return one[:start] + directory + sizes


def tar_of_size(declared: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar with the 12 bytes of a size field as given, and its checksum right all the same."""
    block = bytearray(tar_member("x", kind=kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = declared
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return gzip.compress(bytes(block) + bytes(1024))


def pax(**headers: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
        archive.addfile(tar_member("x"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twice.zip", twice_in_zip(), "holds 'a' twice"),
        ("both.zip", zipped(**{"a": b"", "a/b": b""}), "holds 'a' twice, as file and as folder"),
        ("both2.zip", zipped(**{"a/b": b"", "a": b""}), "holds 'a' twice"),
        ("dot.zip", zipped(**{"./a": b"", "a": b""}), "holds 'a' twice"),
        ("here.zip", zipped(**{".": b""}), "holds '.', which is no plain file"),
        (
            "nameless.zip",
            changed_zip(zipped(x=b""), (b"PK\x01\x02", 28, b"\0\0")),
            "nothing unpacked|cannot be unpacked",
        ),
        ("escape.zip", zipped(**{"\x1b[2Ja": b""}), r"holds '\\x1b\[2Ja', which is no plain file"),
        (
            "locked.zip",
            changed_zip(zipped(x=b"y"), (b"PK\x01\x02", 8, b"\1"), (b"PK\x03\x04", 6, b"\1")),
            "holds 'x', encrypted or packed other",
        ),
        ("lzma.zip", changed_zip(zipped(x=b"y"), (b"PK\x01\x02", 10, b"\x0e")), "holds 'x', encrypted or packed"),
        ("many.zip", zipped(**{f"f{n}": b"" for n in range(1001)}), "holds more than 1,000 files"),
        (
            "declared.zip",
            changed_zip(zipped(x=b"y"), (b"PK\x01\x02", 24, b"\xff\xff\xff\x7f")),
            "more than 100,000 bytes",
        ),
        ("fifo.tar.gz", tarred(tar_member("f", kind=tarfile.FIFOTYPE)), "holds 'f'"),
        ("block.tar.gz", tarred(tar_member("d", kind=tarfile.BLKTYPE)), "holds 'd'"),
        ("abs.tar.gz", tarred(tar_member("/tmp/abs")), "no plain file below"),
        ("twice.tar.gz", tarred(tar_member("a"), tar_member("a")), "holds 'a' twice"),
        ("negative.tar.gz", tar_of_size(b"\xff" * 10 + b"\xfc\0"), "holds 'x', which is no plain file"),
        (
            "looping.tar.gz",
            tar_of_size(b"\xff" * 10 + b"\xfc\0", tarfile.XHDTYPE),
            "nothing unpacked|cannot be unpacked",
        ),
        ("sparse.tar.gz", tar_of_size(b"00000000000\0", tarfile.GNUTYPE_SPARSE), "nothing unpacked|cannot be unpacked"),
        ("huge.tar.gz", tar_of_size(b"77777777777\0"), "more than 100,000 bytes"),
        ("nul.tar.gz", pax(path="a\0b"), "nothing unpacked|cannot be unpacked"),
        ("plain.gz", gzip.compress(b"no archive inside"), "cannot be unpacked"),
        ("up.zip", zipped(**{"ok.txt": b"", "../up.txt": b""}), r"holds '../up.txt', which is no plain file below"),
        ("deep.zip", zipped(**{"a/../../up.txt": b""}), "no plain file below"),
        ("abs.zip", zipped(**{"/tmp/abs.txt": b""}), "no plain file below"),
        ("drive.zip", zipped(**{"C:/x.txt": b""}), "no plain file below"),
        ("back.zip", zipped(**{"..\\x.txt": b""}), "no plain file below"),
        ("link.zip", link_in_zip(), "holds 'link', which is no plain file"),
        ("bomb.zip", zipped(**{"ok.txt": b"", "zeros": bytes(1 << 20)}), "unpacks to more than 100,000 bytes"),
        ("up.tar.gz", tarred(tar_member("ok"), tar_member("../up")), "no plain file below"),
        ("link.tar.gz", tarred(tar_member("l", kind=tarfile.SYMTYPE, link="/etc"), tar_member("l/x")), "holds 'l'"),
        ("hard.tar.gz", tarred(tar_member("l", kind=tarfile.LNKTYPE, link="/etc/passwd")), "holds 'l'"),
        ("device.tar.gz", tarred(tar_member("d", kind=tarfile.CHRTYPE)), "holds 'd'"),
        ("bomb.tar.gz", tarred(tar_member("ok"), tar_member("zeros", size=1 << 20)), "more than 100,000 bytes"),
        ("cut.tar.gz", tarred(tar_member("x", size=5))[:-9], "is cut short or corrupt"),
        ("no.zip", b"not an archive", "cannot be unpacked"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_archives_that_must_not_be_unpacked(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DownloadError, match=message):
        unpack(tmp_path / name, tmp_path / "out" / "in", limit=100_000)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("crowd.zip", crowded_zip(300_000), "more than 524,288 bytes of headers"),
        ("crowd.tar.gz", tarred(*(tar_member(f"f{n}") for n in range(1001))), "more than 1,000 files|bytes of headers"),
        ("words.tar.gz", pax(**{f"k{n}": "v" for n in range(60_000)}), "more than 524,288 bytes of headers"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_headers_are_bounded_before_they_are_read(tmp_path, name, content, message):
    """zipfile keeps half a kilobyte of a member of 50 bytes: 200 MB of the first of these."""
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DownloadError, match=message):
            unpack(tmp_path / name, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert os.listdir(tmp_path) == [name]


def test_a_member_is_read_no_further_than_it_says(tmp_path):
    """A megabyte behind a declared size of 9 bytes: 9 are written, and the sum tells."""
    lying = changed_zip(zipped(zeros=bytes(1 << 20)), (b"PK\x01\x02", 24, b"\x09\0\0\0"))
    (tmp_path / "lie.zip").write_bytes(lying)
    with pytest.raises(DownloadError, match="cannot be unpacked: Bad CRC-32"):
        unpack(tmp_path / "lie.zip", tmp_path / "out", limit=100_000)
    assert (tmp_path / "out" / "zeros").stat().st_size <= 9


def test_an_archive_inside_an_archive_stays_a_file(tmp_path):
    inner = zipped(**{"../up.txt": b"up"})
    (tmp_path / "a.zip").write_bytes(zipped(**{"inner.zip": inner}))
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").rglob("*")] == ["inner.zip"]
    assert (tmp_path / "out" / "inner.zip").read_bytes() == inner


@pytest.mark.parametrize("length", ["-5", "many", "9" * 5000, ""])
def test_a_length_that_is_none_is_not_believed(server, tmp_path, length, monkeypatch):
    send = Handler.send_header
    monkeypatch.setattr(
        Handler, "send_header", lambda self, k, v: send(self, k, length if k == "Content-Length" else v)
    )
    fetch(server.url("data.bin"), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_a_publication_is_installed_whole_or_not_at_all(server, tmp_path):
    text = b"1\tone\n2\ttwo\n"
    sums = {"in/a.dat": hashlib.sha256(text).hexdigest(), "b.dat": hashlib.sha256(b"b").hexdigest()}
    server.files = {
        "set.zip": zipped(
            **{"in/a.dat": text.replace(b"\n", b"\r\n"), "b.dat": b"b", "more.txt": b""}
        ),  # other line ends
        "wrong.zip": zipped(**{"in/a.dat": text, "b.dat": b"not b"}),
        "short.zip": zipped(**{"in/a.dat": text}),
        "plain.txt": b"b",
    }
    for name, message in (("wrong.zip", "b.dat is not the published file"), ("short.zip", "short.zip holds no b.dat")):
        with pytest.raises(DownloadError, match=message):
            download(Publication((Source(server.url(name), "set", members=sums),), "tables", ""), tmp_path)
        assert os.listdir(tmp_path) == []
    publication = Publication(
        (
            Source(server.url("set.zip"), "set", members=sums),
            Source(server.url("plain.txt"), "set/split/p.txt", sums["b.dat"]),
        ),
        "tables",
        "",
    )
    files = download(publication, tmp_path)
    assert files == [tmp_path / "set" / name for name in ("in/a.dat", "b.dat", "split/p.txt")]
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(files)
    requests = len(server.asked)
    assert download(publication, tmp_path) == files and len(server.asked) == requests  # all there: nothing is asked for
    files[2].write_bytes(b"spoiled")
    download(publication, tmp_path)
    assert files[2].read_bytes() == b"b" and len(server.asked) == requests + 1


def test_publications_are_those_the_readers_name():
    for name, publication in PUBLICATIONS.items():
        assert READERS[publication.reader].download == name
        for source in publication.sources:
            assert source.url.startswith("https://")
            for sha256 in source.members.values() or [source.sha256]:
                assert re.fullmatch("[0-9a-f]{64}", sha256) or name == "amazon_musical_instruments"
    assert {reader.download for reader in READERS.values()} - {""} == set(PUBLICATIONS)


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to the folder of public data")
def test_sums_are_those_of_the_files_the_readers_are_tested_on():
    for publication in PUBLICATIONS.values():
        for source in publication.sources:
            folder = Path(os.environ["FUSED_REC_DATA"]) / source.path
            for file, sha256 in {folder / n: s for n, s in source.members.items()}.items() or [(folder, source.sha256)]:
                assert file.is_file() and sha256 in ("", digest(file)), file


def test_the_command_lists_what_there_is():
    command = [sys.executable, "-m", "fused_rec.data.sources.download", "netflix"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "gowalla" in run.stdout + run.stderr
