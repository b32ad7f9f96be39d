"""Pickles of others: data comes through, code does not."""

from __future__ import annotations

import collections
import io
import os
import pickle
import subprocess
import zipfile

import numpy as np
import pytest

from sdumc.data.pickles import load_npy, load_npz_dicts, restricted_load
from sdumc.errors import UserError

DATA = {
    "train": {
        "id": ["a$_$1", "b"],
        "audio": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "labels": np.array([0.5, -np.inf]),
        "names": np.array(["x", "yé"]),
        "objects": np.array([{"emo": 1, "val": np.float64(0.3)}, None], dtype=object),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "empty": np.zeros((0, 5)),
        "record": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    },
    "plain": (1, 2.5, True, None, "é", b"\x00\xff", {1, 2}, frozenset("a"), 3 + 4j, 1 << 80, [[]]),
    "ordered": collections.OrderedDict(b=1, a=2),
    "scalar": np.float32(1.5),
    "bytes": bytearray(b"xy"),
}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray) and a.dtype == object:
        return a.shape == b.shape and all(same(x, y) for x, y in zip(a.flat, b.flat, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_comes_through(tmp_path, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(DATA, protocol=protocol))
    assert same(restricted_load(path), DATA)
    with open(path, "rb") as f:
        assert same(restricted_load(f), DATA)
    assert same(restricted_load(io.BytesIO(path.read_bytes())), DATA)


def test_names_of_the_other_numpy_version():
    raw = pickle.dumps(np.arange(5), protocol=2)
    renamed = raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert same(restricted_load(io.BytesIO(renamed)), np.arange(5))


def test_python_2_arrays():
    # A Python 2 pickle of numpy.arange(3, dtype="<i4"): byte strings are written as str.
    raw = (
        b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n(I1\n(I3\n"
        b"tp6\ncnumpy\ndtype\np7\n(S'i4'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'<'\np11\nNNNI-1\nI-1\nI0\ntp12\nbI00\n"
        b"S'\\x00\\x00\\x00\\x00\\x01\\x00\\x00\\x00\\x02\\x00\\x00\\x00'\np13\ntp14\nb."
    )
    np.testing.assert_array_equal(restricted_load(io.BytesIO(raw)), [0, 1, 2])


class Runs:
    """Unpickling an instance of this calls a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {mark}",), r"posix\.system"),
        (eval, ("open('{mark}', 'w')",), r"builtins\.eval"),
        (exec, ("open('{mark}', 'w')",), r"builtins\.exec"),
        (getattr, ("np", "load"), r"builtins\.getattr"),
        (subprocess.call, (["touch", "{mark}"],), r"(subprocess|commands)\.call"),
        (np.load, ("x.npy",), r"numpy\.load"),
        (np.fromfile, ("/etc/passwd",), r"numpy\.fromfile"),
        (print, ("x",), r"builtins\.print"),
        (__import__, ("os",), r"builtins\.__import__"),
        (pickle.loads, (b"",), r"_?pickle\.loads"),
        (collections.defaultdict, (list,), r"collections\.defaultdict|builtins\.list"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_does_not_run(tmp_path, function, args, name, protocol):
    mark = tmp_path / "mark"
    args = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in args)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"a": [Runs(function, *args)]}, protocol=protocol))
    with pytest.raises(UserError, match=name.replace("builtins", "(builtins|__builtin__)")) as error:
        restricted_load(path)
    assert "evil.pkl: refused" in str(error.value) and not mark.exists()


def test_other_ways_to_call_are_refused(tmp_path):
    for raw in (
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'1'\ni__builtin__\neval\n.",  # INST
        b"\x80\x02cos.path\njoin\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0btesting.run\x93.",  # STACK_GLOBAL with a dotted name
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.",
        b"\x80\x02X\x01\0\0\0aQ.",  # persistent id
        b"\x80\x02cbuiltins\nbytes\nJ\0\0\0\x10\x85R.",  # would take memory
        b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x10\x85R.",
        b"\x80\x02\x82\x01.",  # extension registry
    ):
        with pytest.raises(UserError):
            restricted_load(io.BytesIO(raw))


@pytest.mark.parametrize("raw", [b"", b"hello", b"\x80\x04\x95", pickle.dumps(DATA)[:-20], b"\x80\x09."])
def test_not_a_pickle(tmp_path, raw):
    (tmp_path / "x.pkl").write_bytes(raw)
    with pytest.raises(UserError, match=r"x\.pkl"):
        restricted_load(tmp_path / "x.pkl")


def test_missing(tmp_path):
    for load in (restricted_load, load_npz_dicts, load_npy):
        with pytest.raises(UserError, match=r"none: cannot be read"):
            load(tmp_path / "none")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_dicts(tmp_path, save):
    corpus = {"a": {"emo": "x", "val": -1.5}, "b": {"emo": "y", "val": np.float64(2)}}
    save(
        tmp_path / "l.npz",
        train_corpus=corpus,
        test_corpus={},
        plain=DATA["train"]["audio"],
        f=DATA["train"]["fortran"],
    )
    result = load_npz_dicts(tmp_path / "l.npz")
    assert result["train_corpus"] == corpus and result["test_corpus"] == {}
    np.testing.assert_array_equal(result["plain"], DATA["train"]["audio"])
    np.testing.assert_array_equal(result["f"], DATA["train"]["fortran"])


def test_bad_npz(tmp_path):
    np.savez(tmp_path / "e.npz", a=np.array([Runs(os.system, "true")], dtype=object))
    with pytest.raises(UserError, match=r"e\.npz: a\.npy: refused.*posix\.system"):
        load_npz_dicts(tmp_path / "e.npz")
    np.savez(tmp_path / "t.npz", a=np.arange(1000))
    raw = (tmp_path / "t.npz").read_bytes()
    (tmp_path / "t.npz").write_bytes(raw[:-50])
    with pytest.raises(UserError, match=r"not an \.npz file, or cut short"):
        load_npz_dicts(tmp_path / "t.npz")
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("a.npy", b"no array")
    with pytest.raises(UserError, match=r"z\.npz: a\.npy: not an array"):
        load_npz_dicts(tmp_path / "z.npz")


def test_npy(tmp_path):
    np.save(tmp_path / "x.npy", DATA["train"]["fortran"])
    result = load_npy(tmp_path / "x.npy")
    np.testing.assert_array_equal(result, DATA["train"]["fortran"])
    assert result.flags.writeable
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        load_npy(tmp_path / "x.npy")
