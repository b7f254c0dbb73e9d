"""Files that are written whole or not at all, and by one run at a time.

What is being written, and the lock of who writes it, lie beside the file under names that only this module uses. The
lock is the operating system's: it ends with the process, whatever ends that.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from specbranch.core.errors import SpecBranchError

PART, LOCK = ".{}.specbranch-part", ".{}.specbranch-lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems
_STREAM = re.compile(r"/dev/fd/(\d+)|/proc/(?:self|thread-self|\d+)/fd/(\d+)")
_claimed: set[Path] = set()  # by this process


def write(path: str | Path, *parts: bytes | memoryview) -> None:
    """Write a file, whole or not at all; a pipe, a device or an open stream (/dev/stdout) gets the bytes.

    Raises OSError that names the file; what was there before is then as it was.
    """
    file = Path(path)
    number = stream_of(file)
    if number is not None or is_special(file):
        # As an open stream, /dev/stdout shares its place with what is printed; opened anew it would overwrite that.
        with _named(file), os.fdopen(os.dup(number), "wb") if number is not None else file.open("ab", 0) as stream:
            stream.writelines(parts)
        return
    with whole(file) as part, part.open("wb") as stream:
        stream.writelines(parts)


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a file of JSON as `write` does."""
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: str | Path, data: bytes) -> None:
    """Write a safetensors file as `write` does. data: as `safetensors.torch.save` gives it.

    safetensors puts metadata in another order each time; here the same content is the same file.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    write(path, tensors_header(json.loads(data[8:end])), memoryview(data)[end:])


def tensors_header(header: dict[str, Any]) -> bytes:
    """How a safetensors file begins, up to its tensors. header: dtype, shape and data_offsets of each, by name, and
    __metadata__."""
    if metadata := header.pop("__metadata__", None):
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Where to write a file: beside `path`, whose place and permissions it takes at the end, so that a run cut short
    leaves what was there before. A link stays a link; a pipe or a device is given as it is.

    Raises OSError that names the file.
    """
    file = Path(path)
    if is_special(file):
        yield file
        return
    file = _resolved(file)
    part = file.with_name(PART.format(file.name))
    with _named(path), nullcontext() if file in _claimed else _locked(file, wait=True):
        try:
            part.unlink(missing_ok=True)  # of a run that was killed
            part.open("x").close()
            yield part
            with suppress(FileNotFoundError):
                part.chmod(file.stat().st_mode & 0o7777)
            _to_disk(part)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Nobody else writes this file meanwhile. Raises SpecBranchError where another run does, and OSError where nothing
    can be written."""
    file = _resolved(Path(path))
    with _locked(file, wait=False):
        _claimed.add(file)
        try:
            yield
        finally:
            _claimed.discard(file)


def is_special(file: Path) -> bool:
    """A pipe, a device or an open stream: there is nothing that could be replaced."""
    return stream_of(file) is not None or (file.exists() and not file.is_file())


def stream_of(file: Path) -> int | None:
    """The number of the open stream that a path such as /dev/stdout means, also through links; else None."""
    name = os.fspath(file)
    for _ in range(40):  # as many links as Linux follows
        if match := _STREAM.fullmatch(name):
            return int(match[1] or match[2])
        if not os.path.islink(name):
            return None
        name = os.path.normpath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


@contextmanager
def _locked(file: Path, wait: bool) -> Iterator[None]:
    lock = file.with_name(LOCK.format(file.name))
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise type(error)(f"{file}: nothing can be written to {file.parent}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise SpecBranchError(
                f"{file} is being written by another run; wait for its end, or choose another"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(descriptor)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)  # whoever had it removed it meanwhile
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """An OSError says which file could not be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path} cannot be written: {error.strerror or error}") from error


def _resolved(file: Path) -> Path:
    """Where the bytes are to lie, behind all links. Raises OSError for links in a circle."""
    try:
        file.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return Path(os.path.realpath(file))


def _to_disk(file: Path) -> None:
    """Some file systems say only here that they are full."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
