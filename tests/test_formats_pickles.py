"""Hostile pickles in torch files: no code runs, and nothing takes long or much memory."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import MAGIC, assert_cheap, legacy, refused, text, torch_zip

from minibeit.checkpoint.formats import pickle_machine, read_tensors


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("container", [torch_zip, legacy])
def test_no_code_of_a_pickle_runs(tmp_path, protocol, container):
    canary = tmp_path / "canary"
    for function, arguments, name in [
        (os.system, (f"touch {canary}",), "system"),
        (eval, (f"open({str(canary)!r}, 'w')",), "eval"),
        (exec, (f"open({str(canary)!r}, 'w')",), "exec"),
        (open, (str(canary), "w"), "open"),
        (getattr, (os, "system"), "getattr"),
        (subprocess.Popen, (["touch", str(canary)],), "Popen"),
        (__import__, ("antigravity",), "__import__"),
        (np.load, (str(canary),), "load"),
        (pickle.loads, (b"",), "loads"),
        (Path, (str(canary),), "Path"),
    ]:
        arguments = tuple(argument for argument in arguments if argument is not os)
        content = container(pickle.dumps({"model": {"w": Evil(function, *arguments)}}, protocol))
        refused(
            content, f"refers to '[a-zA-Z_.0-9]*{name}'; only tensors|made by '[a-z._]*{name}', whose code is not run"
        )
    assert not canary.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("operations", "match"),
    [
        (b"cos\nsystem\n" + text("true") + b"\x85R.", "refers to 'os.system'"),
        (text("os") + text("system") + b"\x93" + text("true") + b"\x85R.", "refers to 'os.system'"),
        (b"cbuiltins\ngetattr\n", "refers to 'builtins.getattr'"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__"),
        (b"ctorch\nload\n", "refers to 'torch.load'"),
        (b"ccollections\nOrderedDict.fromkeys\n", "fromkeys"),
        (b"(ios\nsystem\n", "uses the operation INST"),
        (b"(cargparse\nNamespace\no", "uses the operation OBJ"),
        (b"\x82\x01", "uses the operation EXT1"),
        (b"}2.", "uses the operation DUP"),
        (b"P1\n", "uses the operation PERSID"),
        (b"I1\n.", "uses the operation INT"),
        (b"\x97.", "uses the operation NEXT_BUFFER"),
        (b"\xff", "uses the operation 0xff"),
        (b"}Q.", "outside object that is not a storage"),
        (b"cargparse\nNamespace\n}b.", "sets the state of a Name"),
        (b"cargparse\nNamespace\n)R}b" + b"}" + text("a") + b"K\x01sb}b.", "twice"),
        (b"cargparse\nNamespace\n" + text("x") + b"\x85R.", "arguments that torch does not write"),
        (b"ctorch\nFloatStorage\n)R.", "calls 'torch.FloatStorage', which is only a type"),
        (b"K\x01)R.", "calls a int"),
        (b"R", "empty stack"),
        (b"K\x01(0", "empty stack"),
        (b"t.", "mark that was not set"),
        (b"K\x01K\x02.", "values left over"),
        (b"h\x05.", "value 5, which it did not keep"),
        (b"j\xff\xff\xff\xff.", "which it did not keep"),
        (b"K\x01r\xff\xff\xff\xff.", "no named tensors"),  # a memo index of 2^32 - 1 costs nothing here
        (b"\x8b\xff\xff\xff\x7f", "an integer of 2,147,483,647 bytes"),
        (b"\x8b\xff\xff\xff\xff", "an integer of -1 bytes"),
        (b"X\xff\xff\xff\xffa", "cut off"),
        (b"\x8d" + b"\xff" * 8, "cut off"),
        (b"\x8e" + b"\xff" * 8, "cut off"),
        (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"c" + b"a" * 2000, "a name that does not end"),
        (b"}]K\x01s.", "key of type list"),
        (b"}]\x85K\x01s.", "key of type tuple"),
        (b"}(" + b"N" * 100 + b"tK\x01s.", "key of type tuple"),
        (b"}\x8a\x10" + b"\x7f" * 16 + b"K\x01s.", "key of type int"),
        (b"K\x01K\x01a.", "appends to a int"),
        (b"](K\x01u.", "sets items of a list"),
        (b"](K\x01\x90.", "adds to a list"),
        (b"c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R.", "_codecs.encode"),
        (b"cnumpy\ndtype\n" + text("O8") + b"\x85R.", "made by 'numpy.dtype', whose code is not run"),
        (b"csome.where\nFactory\n)R}" + text("_modules") + b"}" + text("a") + b"N" + b"ssb.", "some.where.Factory"),
        (b"csome.where\nFactory\n))\x92.", "makes an object of a Name"),
        (b"\x96" + b"\xff" * 8, "cut off"),
        (b"\x98.", "uses the operation READONLY_BUFFER"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "_rebuild_tensor_v2"),
        (b"\x80\x06.", "protocol 6"),
        (b"\x80\x01.", "protocol 1"),
    ],
)
def test_pickle_operations(operations, match):
    refused(torch_zip(b"\x80\x02" + operations), match)
    refused(legacy(b"\x80\x02" + operations), match)


STEPS = pickle_machine.MAX_STEPS
LAUGHS = b"\x80\x02]q\x00(K\x01K\x01e" + b"".join(
    b"0]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 10 + b"e" for level in range(1, 100)
)
PAIRS = b"(" + b"".join(b"(K" + bytes([i % 256]) + b"K\x01t" for i in range(20_000)) + b"tq\x00"
BOMBS = {
    "nested lists": b"\x80\x02" + b"]" * (STEPS // 2 - 10) + b"a" * (STEPS // 2 - 11) + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * (STEPS - 10) + b".",
    "nested tuples as key": b"\x80\x02})" + b"\x85" * (STEPS - 10) + b"K\x01s.",
    "nested modules": b"\x80\x02N" + (
        b"q\x01cargparse\nNamespace\n)R}" + text("_modules") + b"}" + text("a") + b"h\x01ssb"
    ) * 12_000 + b".",
    "billion laughs": LAUGHS + b".",
    "billion laughs in a dict": b"\x80\x02}" + text("a") + LAUGHS[2:] + b"s.",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "dict in itself": b"\x80\x02}q\x00" + text("model") + b"h\x00s.",
    "many sets": b"\x80\x02(" + b"\x8f" * (STEPS - 10) + b"t.",
    "many more sets": b"\x80\x02(" + b"\x8f" * 10_000_000 + b"t.",
    "many marks": b"\x80\x02" + b"(" * 1_000_000,
    "long text many times": b"\x80\x02" + text("x" * 1_000_000) + b"q\x00" + b"c_codecs\nencode\nh\x00" + text(
        "latin1") + b"\x86R0" * 1000 + b".",
    "large dict many times": b"\x80\x02" + PAIRS + b"0" + b"ccollections\nOrderedDict\n](h\x00e\x85R" * 10_000 + b".",
    "large set many times": b"\x80\x02" + PAIRS + b"0" + b"cbuiltins\nset\nh\x00\x85R" * 10_000 + b".",
    "colliding keys": b"\x80\x02}(" + b"".join(
        b"\x8a\x08" + struct.pack("<q", (i << 40) % (1 << 62)) + b"N" for i in range(1, 99_000)) + b"u.",
    "long joined names": b"\x80\x02}" + text("k" * 500_000) + b"}(" + b"".join(
        text(f"{i}") + b"N" for i in range(50_000)) + b"us.",
    "wide text": b"\x80\x02" + text("x" * 30_000_000 + "\U0001f600") .replace(
        struct.pack("<I", 30_000_001), struct.pack("<I", 30_000_004), 1) + b".",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_bombs(bomb):
    for container in (torch_zip, legacy):
        content = container(BOMBS[bomb])
        assert_cheap(lambda: refused(content, "."))  # noqa: B023


def tensor_pickle(
    shape: bytes = b"K\x02K\x03\x86",
    strides: bytes = b"K\x03K\x01\x86",
    offset: bytes = b"K\x00",
    number: bytes = b"K\x06",
) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number + b"tQ"
    arguments = b"(" + storage + offset + shape + strides + b"\x89}t"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def test_tensors_must_lie_within_their_storage():
    values = np.arange(6, dtype=np.float32).tobytes()
    np.testing.assert_array_equal(read_tensors(torch_zip(tensor_pickle(), _0=values))["w"], [[0, 1, 2], [3, 4, 5]])
    minus, huge = b"J\xff\xff\xff\xff", b"\x8a\x08" + struct.pack("<q", 1 << 62)
    for change in (
        {"offset": b"K\x01"},
        {"offset": minus},
        {"offset": huge},
        {"shape": b"K\x03K\x03\x86"},
        {"shape": b"K\x02\x85"},
        {"shape": huge + huge + b"\x86"},
        {"shape": b"\x88K\x03\x86"},
        {"shape": b"(" + b"K\x01" * 100 + b"t"},
        {"strides": minus + b"K\x01\x86"},
        {"strides": huge + b"K\x01\x86"},
        {"strides": b"K\x01\x85"},
        {"shape": b"M\xff\xffM\xff\xff\x86", "strides": b"K\x00K\x00\x86"},  # one value shown four billion times
        {"number": b"K\x07"},
        {"number": minus},
        {"number": huge},
        {"number": b"\x88"},
    ):
        refused(torch_zip(tensor_pickle(**change), _0=values), "shape|strides|storage|_rebuild_tensor")
    refused(torch_zip(tensor_pickle()), "storage '0', which the archive lacks")
    refused(torch_zip(tensor_pickle(), _0=values[:-1]), "should hold 6 values")


def test_many_views_of_one_storage_are_a_bomb():
    big = b"\x80\x02}(" + b"".join(
        text(f"w{i}") + tensor_pickle(b"J@B\x0f\x00\x85", b"K\x01\x85", number=b"J@B\x0f\x00")[9:-2] for i in range(100)
    )
    refused(torch_zip(big + b"u.", _0=bytes(4_000_000)), "the tensors take 400,000,000 bytes")


def test_legacy_storages():
    values = struct.pack("<q", 6) + np.arange(6, dtype=np.float32).tobytes()
    keys = pickle.dumps(["0"], 2)
    np.testing.assert_array_equal(read_tensors(legacy(tensor_pickle(), keys, values))["w"], [[0, 1, 2], [3, 4, 5]])
    refused(legacy(tensor_pickle(), keys, values[:-1]), "truncated")
    refused(legacy(tensor_pickle(), keys, values + b"x"), "1 bytes follow")
    refused(legacy(tensor_pickle()), "no storage '0'")
    refused(legacy(tensor_pickle(), pickle.dumps(["0", "1"], 2), values * 2), "storage '1' has another size")
    refused(legacy(tensor_pickle(), pickle.dumps(["0", "0"], 2), values * 2), "different names")
    refused(legacy(tensor_pickle(), keys, struct.pack("<q", -1) + values[8:]), "another size")
    big_endian = MAGIC.replace(pickle.dumps({"little_endian": True}, 2), pickle.dumps({"little_endian": False}, 2))
    refused(big_endian + tensor_pickle() + keys + values, "big-endian")
    refused(pickle.dumps({"model": 1}, 2), "is a pickle, but not one that torch.save wrote")
