"""What is read is a regular file of bounded size; nothing is waited for."""

import os

import pytest

from dithooks import CachePlan, DitCacheConfig, Recording
from dithooks.cli.cache_settings import from_file
from dithooks.compat.cache_dit import load_configs
from dithooks.compat.msmodelslim.adaptor_configs import DitCacheConfig as SlimConfig
from dithooks.config.safe_json import JSON_BYTES
from dithooks.errors import DitHooksError, FileError, InvalidSetting, MissingFile
from dithooks.storage.archive import ARCHIVE_BYTES
from dithooks.storage.regular_file import opened_regular, read_bytes
from dithooks.tuning.journal import PURPOSE, Journal

LOADERS = {
    "plan": CachePlan.load,
    "config": DitCacheConfig.load,
    "slim": SlimConfig.load,
    "cache-dit": load_configs,
    "recording": Recording.load,
    "command": from_file,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_nothing_but_regular_files(load, tmp_path):
    """A pipe that nobody writes into, a device without an end, a folder, and a file of nothing but a hole."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to("pipe.json")
    with (tmp_path / "hole.json").open("wb") as file:
        file.truncate(2**40)
    for name, words in {
        "pipe.json": "no regular file", "link.json": "no regular file", "folder.json": "it is a folder",
        "none.json": "no", "hole.json": "1,099,511,627,776 bytes: at most", "/dev/zero": "no regular file",
    }.items():  # fmt: skip
        with pytest.raises((DitHooksError, OSError), match=words) as caught:
            load(tmp_path / name)
        assert isinstance(caught.value, DitHooksError), name
        assert name in str(caught.value)


def test_a_journal_of_pipes(tmp_path):
    os.mkfifo(tmp_path / PURPOSE)
    with pytest.raises(InvalidSetting, match=r"purpose\.json"):
        Journal.open(tmp_path, {"steps": 4})


def test_the_size_is_looked_at_first(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_bytes(path, 8) == b"12345678"
    with pytest.raises(InvalidSetting, match="has 8 bytes: at most 7 are read"):
        read_bytes(path, 7)
    assert JSON_BYTES == 4 * 1024**2
    assert ARCHIVE_BYTES == 8 * 1024**3


def test_a_file_of_the_system_that_says_it_is_empty():
    assert os.stat("/proc/cpuinfo").st_size == 0
    with pytest.raises(InvalidSetting, match="larger than 20 bytes"):
        read_bytes("/proc/cpuinfo", 20)


def test_what_is_missing_is_missing_in_the_systems_terms_too(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_bytes(tmp_path / "none", 8)
    assert type(caught.value) is MissingFile
    assert issubclass(MissingFile, FileError)


def test_what_the_reader_makes_of_the_content_is_not_an_error_of_the_file(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    with pytest.raises(ZeroDivisionError), opened_regular(tmp_path / "file", 8):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match=r"^line 1 is wrong$") as caught, opened_regular(tmp_path / "file", 8):
        raise ValueError("line 1 is wrong")
    assert type(caught.value) is ValueError


def test_a_name_with_a_nul():
    with pytest.raises(FileError, match=r"'a\\x00b' cannot be read: no name of a file has a NUL"):
        read_bytes("a\0b", 8)
