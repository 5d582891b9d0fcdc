"""The folder in which torch's compiler keeps compiled code, checked before any is loaded from it."""

import getpass
import os
import stat
import tempfile
from pathlib import Path


def check_cache_folder() -> None:
    """Refuse a cache folder that is unsafe, or that torch's compiler cannot use.

    Torch loads the code that it finds there. So the folder must belong to the user or to root, and nobody
    else may write to it.

    Raises:
        ValueError: naming the folder, and what to do.
    """
    folder = _cache_folder()
    fix = "To fix: set TORCHINDUCTOR_CACHE_DIR to a folder of your own before the first compiled step."
    if " " in str(folder):
        raise ValueError(
            f"torch's cache folder: expected a path without spaces, got '{folder}', with which C++ compilers "
            f"fail. {fix}"
        )
    # The owner of a folder, and anyone who can write to its parent, can replace it.
    for each in (folder, folder.parent):
        if hasattr(os, "getuid") and each.exists():
            _check_owner(each, fix)
            # In a sticky folder, such as /tmp, users can only replace their own files.
            _check_writers(each, fix, sticky=each != folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"torch's cache folder: expected one to write to, got '{folder}': {error.strerror}. {fix}"
        ) from error


def _cache_folder() -> Path:
    """Return the folder that torch uses: the one in the settings, else one among the temporary files."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a container may have no user name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    default = Path(tempfile.gettempdir(), f"torchinductor_{user}")
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default).absolute()


def _check_owner(place: Path, fix: str) -> None:
    if place.stat().st_uid not in (os.getuid(), 0):
        raise ValueError(
            f"torch's cache folder: expected '{place}' to belong to this user or root, got one of another "
            f"user, whose code would run here. {fix}"
        )


def _check_writers(place: Path, fix: str, *, sticky: bool) -> None:
    found = place.stat()
    by_group = found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid)
    if (by_group or found.st_mode & stat.S_IWOTH) and not (sticky and found.st_mode & stat.S_ISVTX):
        raise ValueError(
            f"torch's cache folder: expected that nobody else can write to '{place}', got mode "
            f"{stat.filemode(found.st_mode)}, so that code of another user could run here. {fix}"
        )


def _is_own_group(gid: int) -> bool:
    """Return whether only the user is in a group: many systems make such a group for each user."""
    import grp

    try:
        group, user = grp.getgrgid(gid), getpass.getuser()
    except (KeyError, OSError):
        return False
    return group.gr_name == user and not set(group.gr_mem) - {user}
