"""Files are replaced whole or not at all, whatever they are, and whatever goes wrong."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
from hostile_files.killing import SAVINGS, killed

from dithooks.errors import DitHooksError, FileError
from dithooks.storage.replacement import check_writable, is_draft, replacing, write_bytes, write_text

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("name", SAVINGS)
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new(name, tmp_path):
    assert killed(SAVINGS[name](), tmp_path, 6) == []


def test_the_draft_lies_beside_it_and_has_its_ending(file):
    with replacing(file) as draft:
        draft.write_text("new")
        assert (draft.parent, draft.suffix, file.read_text()) == (file.parent, ".txt", "old")
        assert is_draft(draft.name)
    assert (file.read_text(), os.listdir(file.parent)) == ("new", ["file.txt"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_what_goes_wrong_leaves_the_old_file(file, error):
    def broken_off():
        with replacing(file) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises((ValueError, KeyboardInterrupt, FileError)) as caught:
        broken_off()
    assert (file.read_text(), os.listdir(file.parent)) == ("old", ["file.txt"])
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        said = f"{file} cannot be written: the disk is full: free some of it, or write elsewhere"
        assert str(caught.value) == said


def test_a_full_disk(file):
    """A device that is always full, in place of a disk."""
    with pytest.raises(FileError, match="/dev/full cannot be written: the disk is full"):
        write_text("/dev/full", "text")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_permissions_stay(file, mode):
    file.chmod(mode)
    write_text(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_those_of_a_new_file_are_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new.txt", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == mode


def test_a_link_stays_a_link(file, tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "link.txt"
    link.symlink_to("../file.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    dangling = tmp_path / "folder" / "dangling"
    dangling.symlink_to("../other.txt")
    write_text(dangling, "new")
    assert (tmp_path / "other.txt").read_text() == "new"
    assert dangling.is_symlink()
    assert os.listdir(tmp_path / "folder") == ["link.txt", "dangling"] or len(os.listdir(tmp_path / "folder")) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes by name")
def test_a_pipe_is_written_into(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    check_writable(pipe)
    write_bytes(pipe, b"text" * 50_000)
    reader.join(10)
    assert read == [b"text" * 50_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_standard_output_goes_on_behind_what_is_there(tmp_path):
    """As a shell's ``> file`` has it: the file is not replaced, and nothing of it is lost."""
    with (tmp_path / "out.txt").open("wb") as out:
        out.write(b"first\n")
        out.flush()
        write_text(f"/dev/fd/{out.fileno()}", "second\n")
        out.seek(0, os.SEEK_END)
        out.write(b"third\n")
    assert (tmp_path / "out.txt").read_text() == "first\nsecond\nthird\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/file", "no is not a folder: create it first"),
        ("file.txt/x", "file.txt is not a folder"),
        (".", "is a folder"),
        ("x" * 300, "the name is too long"),
        ("loop", "it is a link that leads to itself"),
        ("a\0b", "null"),
    ],
)
def test_what_cannot_be_written_is_said_before_and_leaves_no_trace(file, name, words):
    (file.parent / "loop").symlink_to("loop")
    before = sorted(os.listdir(file.parent))
    for check in (check_writable, lambda path: write_text(path, "text")):
        with pytest.raises(OSError, match=words) as caught:
            check(file.parent / name)
        assert type(caught.value) is FileError
        assert isinstance(caught.value, DitHooksError)
        assert len(str(caught.value)) <= 400
    assert sorted(os.listdir(file.parent)) == before
    check_writable(file.parent / "new.txt")
    assert sorted(os.listdir(file.parent)) == before


@pytest.mark.skipif(AS_ROOT, reason="the superuser may write everywhere")
def test_without_permission(file):
    file.chmod(0o444)
    with pytest.raises(FileError, match="you may not write there"):
        write_text(file, "new")
    file.chmod(0o644)
    file.parent.chmod(0o555)
    try:
        with pytest.raises(FileError, match=r"you may not write in .*, where a draft"):
            write_text(file, "new")
    finally:
        file.parent.chmod(0o755)
    assert file.read_text() == "old"


def test_a_path_of_bytes_is_a_path(file):
    write_text(os.fsencode(file), "new")
    assert file.read_text() == "new"
    with pytest.raises(FileError, match=r"^/no/such/file cannot be written: "):
        check_writable(b"/no/such/file")


def test_two_that_write_at_once_leave_one_of_both(tmp_path):
    path, texts = tmp_path / "file", ["a" * 100_000, "b" * 50_000]
    threads = [threading.Thread(target=lambda text=text: [write_text(path, text) for _ in range(20)]) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    assert os.listdir(tmp_path) == ["file"]


def test_names_of_drafts():
    assert not any(map(is_draft, ("plan.json", ".part", "_x.part", ".plan.part.json", Path("a.json").name)))
    assert is_draft(".plan.0123456789ab.part.v-2")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no such folder")
def test_a_folder_that_takes_no_files_whatever_its_permissions_say():
    with pytest.raises(FileError, match=r"/proc/plan\.json cannot be written: "):
        check_writable("/proc/plan.json")


def test_the_draft_of_a_private_file_is_private(file):
    file.chmod(0o600)
    with replacing(file) as draft:
        assert stat.S_IMODE(draft.stat().st_mode) == 0o600
        draft.write_text("secret")
    assert (stat.S_IMODE(file.stat().st_mode), file.read_text()) == (0o600, "secret")


def test_drafts_of_processes_that_were_killed_a_day_ago_are_removed(file):
    old, young, others = ".file.0123456789ab.part.txt", ".file.ba9876543210.part.txt", ".other.0123456789ab.part.txt"
    unlike = (".file.0123456789ab.part.md", ".file.0123456789ab.part.txt.md", ".file.notes.part.txt", "file.md")
    for name in (old, young, others, *unlike):
        (file.parent / name).write_text("")
        os.utime(file.parent / name, (0, 0) if name != young else None)
    write_text(file, "new")
    assert sorted(os.listdir(file.parent)) == sorted(["file.txt", young, others, *unlike])


def test_the_file_and_then_its_name_are_brought_to_the_disk(file, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), file.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(file, "new")
    assert synced == [(False, "old"), (True, "new")]


def test_a_file_that_is_mounted_by_itself(file, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(FileError, match="mounted by itself: mount its folder instead"):
        write_text(file, "new")
    assert (file.read_text(), os.listdir(file.parent)) == ("old", ["file.txt"])


def test_a_disk_without_permissions(file, monkeypatch):
    """On which all files have the same ones, and every change is refused."""
    file.chmod(0o600)

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    write_text(file, "new")
    assert file.read_text() == "new"
