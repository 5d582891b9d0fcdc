"""write_file: a file that is complete at every moment."""

import os
from contextlib import suppress
from pathlib import Path

from pyro_vae.arguments import given, require


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write a file so that after any failure, the old or the new file is there, complete.

    The data go into a temporary file in the same folder, then to the disk. Then the file gets its name. A
    missing folder is made.

    Args:
        path: the path of the file.
        data: its content; text is written in UTF-8.

    Raises:
        ValueError: if path or data is of another kind, or the path is a folder.
        OSError: if the file cannot be written. The old file is intact.
    """
    require(isinstance(path, str | Path), "path", "the path of a file", given(path), "'runs/a.txt', say")
    require(isinstance(data, bytes | str), "data", "bytes or text", given(data), "make it one of them")
    path, data = Path(os.path.realpath(path)), data.encode() if isinstance(data, str) else data
    require(not path.is_dir(), str(path), "a file", "a folder", "add a name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a device or a pipe, which has no content to keep
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # if the folder can be opened, its new entry goes to the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
