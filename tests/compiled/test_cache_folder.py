"""The folder of compiled code: one that is unsafe or cannot be used is refused before anything is loaded."""

import os
import tempfile

import pytest

from pyro_vae.compiled.cache_folder import check_cache_folder

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="a system without owners and modes")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder


def test_a_folder_of_one_s_own_is_used(folder):
    check_cache_folder()  # made where it is missing
    assert folder.is_dir()
    folder.chmod(0o755)
    check_cache_folder()
    assert not list(folder.iterdir())


def test_torch_s_default_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    tmp_path.chmod(0o1777)  # as /tmp
    check_cache_folder()
    assert [each.name for each in tmp_path.iterdir()] == ["torchinductor_somebody"]


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_folder_that_others_write_to_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ValueError, match=r"nobody else can write to '.*cache', got mode d.*To fix: set"):
        check_cache_folder()


@posix
def test_a_folder_that_others_can_replace_is_refused(folder):
    folder.parent.chmod(0o777)
    with pytest.raises(ValueError, match=f"nobody else can write to '{folder.parent}', got mode drwxrwxrwx"):
        check_cache_folder()
    folder.parent.chmod(0o1777)
    check_cache_folder()


@posix
@pytest.mark.parametrize("members", [["somebody"], ["somebody", "else"], []])
@pytest.mark.parametrize("name", ["somebody", "users"])
def test_a_group_may_write_if_it_is_the_user_s_own(folder, name, members, monkeypatch):
    grp = pytest.importorskip("grp")
    group = grp.struct_group((name, "x", 1000, members))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    folder.mkdir()
    folder.chmod(0o775)
    if name == "somebody" and "else" not in members:
        check_cache_folder()
    else:
        with pytest.raises(ValueError, match="nobody else can write"):
            check_cache_folder()


@posix
@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_of_another_user_is_refused(folder, which, monkeypatch):
    folder.mkdir()
    place = folder if which == "folder" else folder.parent
    if os.getuid() == 0:  # root's own folders are trusted
        os.chown(place, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        place = folder
    with pytest.raises(ValueError, match=f"expected '{place}' to belong to this user or root, got one"):
        check_cache_folder()


def test_a_path_with_a_space_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    with pytest.raises(ValueError, match="expected a path without spaces, got '.*a b'.*To fix: set TORCHIND"):
        check_cache_folder()


def test_a_read_only_folder_is_named(folder, monkeypatch):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(ValueError, match="expected one to write to, got '.*cache': Read-only file system"):
        check_cache_folder()


def test_a_path_through_a_file_is_named(folder):
    folder.write_text("no folder")
    with pytest.raises(ValueError, match="expected one to write to, got '.*cache': File exists"):
        check_cache_folder()
