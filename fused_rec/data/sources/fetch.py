"""Downloads and unpacking of archives: resumed, limited in size, verified, and only then moved into place."""

import gzip
import hashlib
import http.client
import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import tqdm

CHUNK = 1 << 16
LIMIT = 1 << 29  # maximum bytes of a download and of its content
MEMBERS = 1000  # maximum entries of an archive; the published ones have about ten
HEADERS = 1 << 19  # maximum bytes of headers; parsed by zipfile and tarfile, they take a hundred times the memory
ATTEMPTS = 5
# Exceptions of zipfile and tarfile for corrupt archives; all were found by fuzzing.
BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, OSError, ValueError, LookupError),
    *(OverflowError, NotImplementedError, RecursionError),
)


class DownloadError(RuntimeError):
    """Error for a failed transfer, or a file that differs from the published one."""


def fetch(url: str, target: Path, *, sha256: str = "", limit: int = LIMIT) -> None:
    """Downloads a file and moves it to `target` when it is complete and verified.

    Received bytes are kept in `target`.part. After a broken connection, and in a later call, the download continues
    there (HTTP Range).

    Args:
      url: address of the file.
      target: path of the file.
      sha256: expected digest as of `digest`, empty = not checked.
      limit: maximum size in bytes, also of the content of a .gz file.

    Raises:
      DownloadError: the connection broke 5 times, an HTTP error, too many bytes, or another SHA-256.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _receive(url, part, limit)
            break
        except DownloadError:
            part.unlink(missing_ok=True)  # not to be resumed
            raise
        except urllib.error.HTTPError as error:
            error.close()
            raise DownloadError(f"{url} answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS:
                raise DownloadError(
                    f"{url} broke off {ATTEMPTS} times ({error}); run again to go on at {part}"
                ) from error
            time.sleep(0.1 * 2**attempt)
    try:
        verify(part, target.name, sha256, limit)
    except DownloadError:
        part.unlink()
        raise
    os.replace(part, target)


def unpack(archive: Path, folder: Path, *, limit: int = LIMIT) -> None:
    """Unpacks a .zip or .tar.gz; archives inside it are not unpacked.

    Args:
      archive: the file.
      folder: output folder.
      limit: maximum total size of the content in bytes.

    Raises:
      DownloadError: before anything is written, if the archive is corrupt, has more than 1,000 members or more than
        `limit` bytes, or if a member is no plain file or folder, has a path outside `folder`, a repeated or unprintable
        name, encryption or a compression other than DEFLATE.
    """
    try:
        with open(archive, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            if packed:
                verify(archive, archive.name, "", limit)  # tarfile stops at its end mark, before the checksum of gzip
            raw.seek(0)
            source: Any = _Measured(gzip.GzipFile(fileobj=raw) if packed else raw, archive.name)
            with tarfile.open(fileobj=source, mode="r:") if packed else zipfile.ZipFile(source) as opened:
                members = _members(opened, archive.name, limit)
                source.left = sys.maxsize  # from here on, the declared sizes of members limit reading
                _write(opened, members, folder)
    except BROKEN as error:
        raise DownloadError(f"{archive.name} cannot be unpacked: {error}") from error


class _Measured:
    """File of which at most HEADERS bytes can be read until `left` is raised, as neither parser limits its tables."""

    def __init__(self, file: gzip.GzipFile | BinaryIO, name: str):
        self.left, self._file, self._name = HEADERS, file, name
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size if 0 <= size <= self.left else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise DownloadError(f"{self._name} has more than {HEADERS:,} bytes of headers; nothing unpacked")
        return content


def _members(opened: zipfile.ZipFile | tarfile.TarFile, archive: str, limit: int) -> list[tuple[PurePosixPath, Any]]:
    """Checks the members and returns path and handle of each file; readers are limited by the declared sizes."""
    total = 0
    folders: set[PurePosixPath] = set()
    files: dict[PurePosixPath, Any] = {}
    for count, member in enumerate(opened.infolist() if isinstance(opened, zipfile.ZipFile) else opened, start=1):
        if isinstance(member, zipfile.ZipInfo):
            name, size = member.filename, member.file_size
            folder = name.endswith("/")
            plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)  # 0: packed on a system without modes
            if member.flag_bits & 0x2041 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DownloadError(f"{archive} holds {name!r}, encrypted or packed other than by DEFLATE")
        else:
            name, size, folder = member.name, member.size, member.isdir()
            plain = member.isfile() and not member.issparse()
        path = PurePosixPath(name)
        leads_out = not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
        if not (plain or folder) or leads_out or not name.isprintable() or size < 0:
            raise DownloadError(f"{archive} holds {name!r}, which is no plain file below its folder; nothing unpacked")
        total += size
        if total > limit:
            raise DownloadError(f"{archive} unpacks to more than {limit:,} bytes; nothing unpacked")
        if count > MEMBERS:
            raise DownloadError(f"{archive} holds more than {MEMBERS:,} files; nothing unpacked")
        folders.update(path.parents, [path] if folder else [])
        if path in files or path in folders and not folder:
            raise DownloadError(f"{archive} holds {name!r} twice; nothing unpacked")
        if not folder:
            files[path] = member
    if twice := sorted(files.keys() & folders):
        raise DownloadError(f"{archive} holds {str(twice[0])!r} twice, as file and as folder; nothing unpacked")
    return list(files.items())


def _write(
    opened: zipfile.ZipFile | tarfile.TarFile, members: Iterable[tuple[PurePosixPath, Any]], folder: Path
) -> None:
    read: Any = opened.open if isinstance(opened, zipfile.ZipFile) else opened.extractfile
    for place, member in members:
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        with read(member) as source, open(target, "xb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)


def verify(file: Path, name: str, sha256: str, limit: int = LIMIT) -> None:
    """Checks the digest of a file, and that a .gz file is complete.

    Args:
      file: the file.
      name: its final name, for the ending and for messages.
      sha256: expected digest as of `digest`, empty = not checked.
      limit: maximum size in bytes of the content of a .gz file.

    Raises:
      DownloadError: another digest, or an incomplete or too large .gz file.
    """
    if sha256 and digest(file) != sha256:
        raise DownloadError(f"{name} is not the published file: its SHA-256 is {digest(file)}, {sha256} is due")
    if name.endswith(".gz"):
        held = 0
        try:
            with gzip.open(file) as source:  # checks the length and the CRC-32 at its end
                while chunk := source.read(CHUNK):
                    held += len(chunk)
                    if held > limit:
                        raise DownloadError(f"{name} unpacks to more than {limit:,} bytes")
        except (OSError, EOFError, zlib.error) as error:
            raise DownloadError(f"{name} is cut short or corrupt: {error}") from error


def digest(file: Path) -> str:
    """Returns the SHA-256 of a file without its carriage returns, in hexadecimal."""
    total = hashlib.sha256()
    with open(file, "rb") as source:
        while chunk := source.read(CHUNK):
            total.update(chunk.replace(b"\r", b""))
    return total.hexdigest()


def _receive(url: str, part: Path, limit: int) -> None:
    held = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "fused_rec", **({"Range": f"bytes={held}-"} if held else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not held:
            raise
        error.close()  # no bytes after those on disk: the file is complete, or another one
        if error.headers.get("Content-Range") != f"bytes */{held}":
            part.unlink()
            _receive(url, part, limit)
        return
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        if response.status == 206 and not resumed:
            raise DownloadError(f"{url} sends another range than the one asked for, from byte {held}")
        held = held if resumed else 0  # a server without range support sends the whole file
        length = re.fullmatch("[0-9]{1,18}", response.headers.get("Content-Length", ""))
        total = held + int(length[0]) if length else None
        with (
            open(part, "ab" if resumed else "wb") as sink,
            tqdm.tqdm(desc=part.stem, total=total, initial=held, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(CHUNK):
                held += len(chunk)
                if held > limit:
                    raise DownloadError(f"{url} sends more than {limit:,} bytes")
                sink.write(chunk)
                bar.update(len(chunk))
    if total is not None and held < total:
        raise ConnectionError(f"after {held:,} of {total:,} bytes")
