"""Names that pickle attacks use: a file with one of them is malicious, or no checkpoint, and is not read further.

Nothing that a pickle names is ever run or imported here, so this list is not what protects: it only tells users what
kind of file they have.
"""

from __future__ import annotations

MODULES = frozenset((
    "os", "posix", "nt", "ntpath", "posixpath", "subprocess", "sys", "shutil", "socket", "runpy", "ctypes",
    "importlib", "imp", "pkgutil", "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal",
    "shelve", "code", "codeop", "pty", "commands", "popen2", "pdb", "bdb", "profile", "cProfile", "timeit", "trace",
    "webbrowser", "antigravity", "multiprocessing", "asyncio", "gc", "operator", "atexit", "tempfile", "urllib",
    "http", "ftplib", "smtplib", "requests", "io", "_io", "zipimport", "pip", "venv", "ensurepip", "site",
))  # fmt: skip
BUILTINS = frozenset((
    "eval", "exec", "execfile", "compile", "open", "input", "raw_input", "getattr", "setattr", "delattr", "apply",
    "globals", "locals", "vars", "breakpoint", "memoryview", "map", "filter", "file", "reload", "help", "print",
))  # fmt: skip
FUNCTIONS = frozenset((
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.save", "torch.utils.cpp_extension.load", "numpy.load",
    "numpy.save", "numpy.loads", "numpy.fromfile", "numpy.memmap", "numpy.core.multiarray.fromfile",
    "numpy.testing._private.utils.runstring",
))  # fmt: skip


def suspicious(name: str) -> bool:
    """Whether a name runs code or programs, imports, opens files, or reaches attributes and memory."""
    module, _, attribute = name.rpartition(".")
    if module in ("builtins", "__builtin__") and attribute in BUILTINS:
        return True
    return "__" in attribute or name in FUNCTIONS or name.split(".")[0] in MODULES
