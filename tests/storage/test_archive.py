"""Archives of arrays are what they claim to be, before anything of them is unpacked."""

import io
import struct
import zipfile

import numpy as np
import pytest

from dithooks.errors import InvalidSetting
from dithooks.storage import archive
from dithooks.storage.archive import read_arrays

ARRAYS = {
    "floats": np.linspace(0, 1, 12).reshape(3, 4),
    "columns": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "text": np.array("größe"),
    "nothing": np.zeros((0, 3), np.float32),
    "one": np.array(2.5),
    "large": np.arange(400_000, dtype=np.float32),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(save, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert (found[name] == array).all()
    found["floats"][0, 0] = 1  # as arrays of one's own


def member(shape, data=b"", kind="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.npy", member((10**12,)), "'a.npy' is not as large as its header says"),
        ("a.npy", member((2,), bytes(24)), "is not as large as its header says"),
        ("a.npy", member((-2,), bytes(16)), "is not as large as its header says"),
        ("a.npy", bytes(2**25), "unpacks to 33,554,568 bytes"),
        ("a.npy", member((2,), bytes(16), "|O"), "neither numbers nor texts"),
        ("a.txt", b"text", "'a.txt', which is no array"),
        ("a.npy", b"text", "no archive of arrays, or damaged"),
        ("a.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "no archive of arrays, or damaged"),
    ],
)
def test_false_claims(name, data, words, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("first.npy", member((1,), bytes(8)))
        file.writestr(name, data)
    with pytest.raises(InvalidSetting, match=words):
        read_arrays(tmp_path / "a.npz")


def test_a_size_that_the_list_of_arrays_hides(tmp_path):
    """The list says 24 bytes, the header says 8, and 32 MB are packed: no more than was claimed is unpacked."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", member((2**22,), bytes(2**25)))
        file.infolist()[0].file_size = len(member((2**22,))) + 8
    with pytest.raises(InvalidSetting):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("data", [b"", b"PK", b"text" * 100, b"PK\x05\x06", b"PK\x05\x06" + bytes(18)])
def test_no_archive(data, tmp_path):
    (tmp_path / "a.npz").write_bytes(data)
    if data[4:] == bytes(18):  # an archive of nothing
        assert read_arrays(tmp_path / "a.npz") == {}
        return
    with pytest.raises(InvalidSetting, match="no archive"):
        read_arrays(tmp_path / "a.npz")


def test_a_list_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "DIRECTORY_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for number in range(300):
            file.writestr(f"{number}.npy", b"")
    with pytest.raises(InvalidSetting, match="more arrays than any recording has"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_of_which_any_part_may_unpack_to_gigabytes(packing, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", packing) as file:
        file.writestr("a.npy", member((2,), bytes(16)))
    with pytest.raises(InvalidSetting, match="packed as NumPy packs nothing"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("kind", ["|S0", "<U0"])
def test_texts_without_letters_that_would_fill_the_memory(kind, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", member((2**20,), kind=kind))
    with pytest.raises(InvalidSetting, match="neither numbers nor texts"):
        read_arrays(tmp_path / "a.npz")


def test_a_longer_list_that_would_fill_the_memory(tmp_path):
    """A file that is a hole of 5 GiB, whose list of arrays is said to be as long."""
    longer = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 1, 1, 5 * 2**30 - 98, 0)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 5 * 2**30 - 98, 1)
    with (tmp_path / "a.npz").open("wb") as file:
        file.seek(5 * 2**30 - 98)
        file.write(longer + locator + b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, 46, 0, 0))
    assert (tmp_path / "a.npz").stat().st_size == 5 * 2**30
    with pytest.raises(InvalidSetting, match="more arrays than any recording has"):
        read_arrays(tmp_path / "a.npz")
