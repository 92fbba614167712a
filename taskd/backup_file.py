"""What a backup is: a tar file of two members, `manifest.json` and the database. Written in parts, as it is sent; read
with every byte checked.

Nothing is compressed: what compresses well can be piped through zstd, and `tar xf` takes a backup apart without taskd.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from taskd.errors import StoreError

FORMAT = 1
DATABASE = "taskd.db"
READ_BYTES = 1 << 20
_MANIFEST = "manifest.json"
_MANIFEST_BYTES_MAX = 1 << 16


class Manifest(Struct, frozen=True):
    """What a backup says of itself. Readers pass over fields that they do not know; `format` changes when that would be
    wrong."""

    format: int
    made: str  # ISO 8601, UTC
    version: str  # of the taskd that made it
    cluster: str
    node_id: int
    node_name: str
    store_id: str  # of the database that was copied, 32 hexadecimal digits
    schema: int  # its version
    bytes: int
    sha256: str


def head(manifest: Manifest, made_s: float) -> bytes:
    """What comes before the database."""
    text = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
    return (
        _member(_MANIFEST, len(text), made_s) + text + _padding(len(text)) + _member(DATABASE, manifest.bytes, made_s)
    )


def tail(manifest: Manifest) -> bytes:
    """What comes after the database."""
    return _padding(manifest.bytes) + bytes(2 * tarfile.BLOCKSIZE)


def _member(name: str, size: int, made_s: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(made_s), 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


class BackupFile:
    """A backup to be read. Raises StoreError for what is none, or one of a newer format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self._tar = self._opened()
            self.manifest = self._read_manifest()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BackupFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def check(self, copy: BinaryIO | None = None) -> None:
        """Read the whole database, into `copy` where it is given. Raises StoreError where a byte is missing or is
        another one than was written."""
        digest = hashlib.sha256()
        size = 0
        try:
            content = self._tar.extractfile(DATABASE)
            while content is not None and (chunk := content.read(READ_BYTES)):
                digest.update(chunk)
                size += len(chunk)
                if copy is not None:
                    copy.write(chunk)
        except KeyError:
            pass
        except (tarfile.TarError, EOFError) as error:
            raise StoreError(f"{self.path} is damaged: {error}") from None
        if size != self.manifest.bytes:
            raise StoreError(
                f"{self.path} is not whole: {size} of {self.manifest.bytes} bytes of the database are there"
            )
        if digest.hexdigest() != self.manifest.sha256:
            raise StoreError(f"{self.path} is damaged: its checksum is another one than when it was made")

    def _opened(self) -> tarfile.TarFile:
        try:
            return tarfile.open(fileobj=self._file, mode="r:")
        except tarfile.TarError as error:
            raise StoreError(f"{self.path} is not a backup of taskd: {error}") from None

    def _read_manifest(self) -> Manifest:
        try:
            member = self._tar.next()
            if member is None or member.name != _MANIFEST or member.size > _MANIFEST_BYTES_MAX:
                raise StoreError(f"{self.path} is not a backup of taskd")
            content = self._tar.extractfile(member)
            manifest = msgspec.json.decode(content.read() if content is not None else b"", type=Manifest)
        except (tarfile.TarError, EOFError, msgspec.DecodeError) as error:
            raise StoreError(f"{self.path} is not a backup of taskd, or is damaged: {error}") from None
        if manifest.format != FORMAT:
            raise StoreError(
                f"{self.path} has format {manifest.format}, and this taskd ({FORMAT}) cannot read that: it was made by "
                f"taskd {manifest.version}; use that version or a newer one"
            )
        return manifest
