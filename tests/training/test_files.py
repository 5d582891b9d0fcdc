"""write_file: the file of before or the new one, whole."""

import errno
import os
import resource
import signal

import pytest

import pyro_vae as pv


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    pv.write_file(path, "für")
    assert path.read_bytes() == "für".encode()
    pv.write_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["c.txt"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    pv.write_file(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "x"


def test_a_device_stays_a_device(tmp_path):
    (tmp_path / "null").symlink_to(os.devnull)
    pv.write_file(tmp_path / "null", "x")
    assert not os.path.isfile(os.devnull)
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left"):
            pv.write_file("/dev/full", "x")
        assert not os.path.isfile("/dev/full")


@pytest.fixture
def small_disk():
    """Let no file grow beyond 1,000 bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_file_of_before(tmp_path, small_disk):
    path = tmp_path / "a.txt"
    pv.write_file(path, "before")
    with pytest.raises(OSError, match="File too large"):
        pv.write_file(path, "x" * 2000)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), KeyboardInterrupt()])
def test_a_failure_before_the_end_leaves_the_file_of_before(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    path = tmp_path / "a.txt"
    pv.write_file(path, "before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        pv.write_file(path, "new")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]
