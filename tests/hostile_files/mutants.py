"""Files that are nearly right: mutated by their structure, by their bytes, or replaced by what makes harm."""

import copy
import io
import json
import pickle
import warnings
import zipfile

import numpy as np

LONG = 120_000
ODD = (
    None, True, False, -1, 0, 1, 2, 7, 1.5, -0.0, 1e-320, 1e300, 10**12, 10**30, 10**500, float("nan"), float("inf"),
    float("-inf"), "", "text", "1", "inf", "nan", "a\nb", "\0", "\ud800", "x" * 5000, "ä" * LONG, [], {}, [[]], [None],
    [1] * 9, [0] * LONG, [[0] for _ in range(3000)], {"kind": "Mask"}, {"kind": "Reuse"}, {"kind": "nothing"},
    {"float": "inf"}, {"float": 1}, {"": {}}, {str(n): n for n in range(5000)},
)  # fmt: skip
TOKENS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "9" * LONG, "1." + "9" * LONG, "[" * 5000,
    '{"a":' * 5000, "[" * LONG, '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', "'a'", "1,", "{", "]", "",
    "[" + "[]," * 60_000 + "1]", '{"a": 1, "a": 2}', "{" + ",".join(f'"{n}": 1' for n in range(20_000)) + ', "0": 2}',
)  # fmt: skip
MORE = (  # lines of YAML
    "a: &a [*a]", "b: &b {<<: *b}", "c: !!python/name:os.system", "d: !!int ''", "e: 2001-99-99", "f: !!binary x",
    "- " * 5000, "p: " + "- " * 5000, "q: " + "a: " * 3000, "r: " + "&a " * 3000, "? [a]\n: b", "- a", "\t", "---",
    "%YAML 9.9", "g: .inf", "h: .nan", "i: 0x" + "f" * 5000, "max_warmup_steps: .inf", "s: '" + "''" * 4000,
    "t: |\n" + "  a\n" * 3000, "u: " + "[a, " * 150, "&x x: *x", "j: " + "[" * 3000, "l: 1:1:1:1", "m: ~",
    "residual_diff_threshold: .nan", "n: 1_000_000", "o: " + "x" * 40_000,
    "a: &a {k: 1}\nb: &b {<<: [" + "*a," * 9 + "]}\nc: {<<: [" + "*b," * 9 + "]}",
)  # fmt: skip
DTYPES = (">f8", "<f4", "<f2", "<i8", "<u8", "?", "<c16", "<U3", "S4", "<M8[s]", "<i1", "<f8")


def mutated(draw, name, data):
    """The bytes of a file, mutated once to three times.

    Args:
        draw: generator of random numbers.
        name: name of the file.
        data: its bytes.
    """
    with np.errstate(all="ignore"):
        return _mutated(draw, name, data)


def _mutated(draw, name, data):
    mutate = {"npz": _archive, "json": _json, "jsonl": _lines, "yaml": _yaml}[name.rpartition(".")[2]]
    if draw.random() < 0.2:
        return _bytes(draw, data)
    return mutate(draw, data)


def _one(draw, values):
    return values[int(draw.integers(len(values)))]


def _bytes(draw, data):
    """Cut, changed, doubled, or with something in between."""
    place = int(draw.integers(len(data) + 1))
    start, end = data[:place], data[place:]
    other = [
        *(start, start + end[1:], data + data, end + start, b"", start + bytes([int(draw.integers(256))]) + end[1:]),
        *(start + data, b"\xef\xbb\xbf" + data, start + b"\xff\xfe" + end, data + b" " * 6_000_000),
        *(data.replace(b",", b",,", 1), start + b"\n" + end, data.decode("latin-1").encode("utf-16")),
    ]
    return _one(draw, other)


def _places(value, where=()):
    yield where
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*where, key))


def _changed(draw, value):
    """A JSON value with another one in one of its places, or a name or entry more or fewer."""
    value = copy.deepcopy(value)
    for _ in range(int(draw.integers(1, 4))):
        places = list(_places(value))
        where = _one(draw, places)
        if not where:
            if draw.random() < 0.1:
                return copy.deepcopy(_one(draw, ODD))
            continue
        inner = value
        for key in where[:-1]:
            inner = inner[key]
        key, how = where[-1], int(draw.integers(8))
        if how < 4:
            inner[key] = copy.deepcopy(_one(draw, ODD))
        elif how == 4:
            del inner[key]
        elif how == 5 and isinstance(inner, dict):
            inner[_one(draw, ("strange", "kind", "schema", "", "\ud800", "x" * 5000, "key"))] = copy.deepcopy(
                _one(draw, ODD)
            )
        elif how == 5:  # what is long by itself is not repeated
            more = int(_one(draw, (1, 2, 20_000 if len(repr(inner[key])) < 50 else 3)))
            inner.extend(copy.deepcopy(inner[key]) for _ in range(more))
        elif how == 6 and isinstance(inner[key], (int, float)) and not isinstance(inner[key], bool):
            inner[key] *= _one(draw, (-1, 0, 0.5, 2, 1000, 1e30, 1e-30))
        else:
            source = value
            for step in _one(draw, places):
                source = source[step]
            inner[key] = copy.deepcopy(source)
    return value


def _text(draw, value):
    """A JSON value as a text, in which a token may be another one, or a name may stand twice."""
    text = json.dumps(value)
    how = draw.random()
    if how < 0.15:
        cuts = [place for place, letter in enumerate(text) if letter in ":,[{"]
        place = _one(draw, cuts or [0]) + 1
        end = next((n for n in range(place, len(text)) if text[n] in ",]}"), len(text))
        return text[:place] + _one(draw, TOKENS) + text[end:]
    if how < 0.2 and '"' in text:
        name = _one(draw, text.split('"')[1::2] or ["a"])
        return text.replace("{", f'{{"{name}": 1, "{name}": 2, ', 1)
    return text


def _encoded(text):
    return text.encode("utf-8", "surrogatepass")


def _json(draw, data):
    return _encoded(_text(draw, _changed(draw, json.loads(data))))


def _lines(draw, data):
    lines = data.splitlines()
    place = int(draw.integers(len(lines)))
    lines[place] = _json(draw, lines[place])
    return b"\n".join([*lines, b""][: len(lines) + int(draw.random() < 0.9)])


def _yaml(draw, data):
    """The same as JSON, which is YAML, or with a tag, an alias or a merge."""
    if draw.random() < 0.5:
        import yaml

        return _encoded(_text(draw, _changed(draw, yaml.safe_load(data))))
    text = data.decode()
    lines = text.splitlines()
    lines.insert(int(draw.integers(len(lines) + 1)), "  " * int(draw.integers(2)) + _one(draw, MORE))
    return _encoded("\n".join(lines))


def _archive(draw, data):
    with np.load(io.BytesIO(data)) as file:
        members = {name: file[name] for name in file.files}
    how = draw.random()
    if how < 0.45 and "head" in members:
        members["head"] = np.array(_text(draw, _changed(draw, json.loads(str(members["head"])))))
    elif how < 0.85:
        name = _one(draw, list(members))
        members[name] = _array(draw, members[name])
        if members[name] is None:
            del members[name]
    buffer = io.BytesIO()
    try:
        np.savez_compressed(buffer, **members)
    except UnicodeEncodeError:  # half a character, which NumPy does not write either
        return data
    if how >= 0.85:
        _harmed(draw, buffer)
    return buffer.getvalue()


def _array(draw, array):
    """An array of another type, shape or content; ``None``: without it."""
    how = int(draw.integers(9))
    if how == 0:
        return None
    if how == 1:
        try:
            with np.errstate(all="ignore"):
                return array.astype(_one(draw, DTYPES))
        except (ValueError, TypeError):
            return np.zeros(array.shape, _one(draw, DTYPES))
    if how == 2:
        return _one(draw, (array[None], array.reshape(-1), array.T, np.zeros((0, 3)), np.array(1.0),
                           array[..., :1] if array.ndim else array, np.concatenate([array.reshape(-1)] * 2),
                           np.zeros((3,) * 9), np.zeros((700, 700))))  # fmt: skip
    if array.dtype.kind not in "iuf" or not array.size:
        return np.array(_one(draw, ("", "text", "{}", "[" * 5000)))
    array = array.copy()
    place = int(draw.integers(array.size))
    if array.dtype.kind == "f":
        array.flat[place] = _one(draw, (np.nan, np.inf, -np.inf, 0, -1, 1e30, -1e30, 1e300, 1e-320, 1e20))
        return array * _one(draw, (0, 1, 1, -1, 1e20, 1e-20)) if how == 3 else array
    array.flat[place] = _one(draw, (-1, 0, 1, 2, 5, 6, 7, 10**6, 2**62, -(2**63)))
    return array[::-1] if how == 3 else array


def _harmed(draw, buffer):
    """An archive with a member more: code, a bomb, a false header, a name that is there already, or no array."""
    header = io.BytesIO()
    shape = _one(draw, ((10**12,), (10**6, 10**6), (-1,), (2**63,), (0, 10**12), (1,) * 40))
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    objects = io.BytesIO()
    np.save(objects, np.array([print], dtype=object), allow_pickle=True)
    content = [header.getvalue(), header.getvalue() + bytes(64), bytes(2**25), objects.getvalue(), pickle.dumps(print),
               b"", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
               b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16]  # fmt: skip
    name = _one(draw, ("more.npy", "0.grams.npy", "arr_0.npy", "arr_9.npy", "head.npy", "../x.npy", "code.txt", ".npy"))
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as file:
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there already
        file.writestr(name, _one(draw, content))
        if draw.random() < 0.05:
            for number in range(3000):
                file.writestr(f"{number}.npy", b"")
