"""The house rules a program can check: who imports whom, what is documented, what never appears."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minibeit
from minibeit.config import ACTIVATIONS as CONFIG_ACTIVATIONS
from minibeit.ops import activations, reference
from minibeit.ops.table import TABLE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minibeit"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
ARRAY_LIBRARIES = {"numpy", "numba", "cupy", "torch", "jax", "scipy", "tensorflow"}

# Imports point down this list.  A name is a file or a folder of the package; those of one row may use each other.
LAYERS = [
    {"text", "errors", "files", "file_names", "foreign", "machine", "places", "signatures", "strict_json"},
    {"catalogue", "loading_options"},
    {"hub", "labels", "task_table"},
    {"config", "config_checks"},
    {"colours", "drawing", "params", "trace", "outputs", "masking", "noise", "metrics"},
    {"checkpoint", "ops", "images"},
    {"tape"},
    {"model", "image_processor", "sliding", "scores"},
    {"tasks", "tokenizer"},
    {"auto", "flax", "train", "pipelines"},
    {"evaluate"},
    {"explorer"},
    {"verify", "bench", "runs"},
    {"cluster"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LONGEST_FILE = 420  # about 400


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted module, line) of every import in a file, wherever it stands; relative ones made absolute."""
    package = ("minibeit", *path.relative_to(PACKAGE).parts[:-1]) if PACKAGE in path.parents else ()
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            inside = [f"{module}.{alias.name}" for alias in node.names]
            found += [
                (name, node.lineno) for name in (inside if node.module is None or module == "minibeit" else [module])
            ]
    return found


def public(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module; methods are left to test_public_classes_are_documented."""
    body = ast.parse(path.read_text()).body
    return [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check():
    assert len(FILES) > 20
    assert len(TESTS) > 10


def test_every_module_has_its_layer():
    assert {layer_of(path) for path in FILES} <= set(LEVEL)


@pytest.mark.parametrize("place", ["model", "tasks", "tokenizer/network.py"])
def test_no_array_library_in(place):
    files = [PACKAGE / place] if place.endswith(".py") else [*(PACKAGE / place).rglob("*.py")]
    assert files
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in files
        for module, line in imports(path)
        if module.split(".")[0] in ARRAY_LIBRARIES
    ]
    assert not wrong


def test_imports_point_down():
    wrong = []
    for path in FILES:
        own = layer_of(path)
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] != "minibeit" or len(parts) < 2 or parts[1] not in LEVEL or own == "__init__":
                continue
            asks_the_hub = own == "config" and module.startswith("minibeit.hub")  # within from_pretrained
            if LEVEL[parts[1]] > LEVEL[own] and not asks_the_hub:
                wrong.append(f"{relative(path)}:{line} ({own}) imports {parts[1]}")
    assert not wrong


def test_checkpoints_know_nothing_of_models():
    used = {module for path in (PACKAGE / "checkpoint").rglob("*.py") for module, _ in imports(path)}
    assert used
    assert not [module for module in used if module.startswith(("minibeit.tasks", "minibeit.model", "minibeit.ops"))]


def test_torch_is_imported_by_the_verifier_and_the_benchmark_only():
    places = {relative(path) for path in FILES for module, _ in imports(path) if module.split(".")[0] == "torch"}
    assert places <= {"minibeit/foreign.py", "minibeit/verify/torch_runner.py", "minibeit/bench/contestants.py"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    if layer_of(path) == "cli" or path.name in ("params.py", "outputs.py"):
        return  # commands document themselves to the user; each field of those classes carries its shape instead
    bare = [f"{relative(path)}:{node.lineno} {node.name}" for node in public(path) if not ast.get_docstring(node)]
    assert not bare


def test_public_classes_are_documented():
    for name in minibeit.__all__:
        thing = getattr(minibeit, name)
        if isinstance(thing, type):
            methods = [m for m in vars(thing) if not m.startswith("_") and callable(getattr(thing, m))]
            assert thing.__doc__, name
            assert not [m for m in methods if not getattr(thing, m).__doc__], name


def test_reference_ops_are_documented():
    for name in TABLE:
        assert getattr(reference, name).__doc__, name


SHAPE = re.compile(r"#.*(->|\()")


@pytest.mark.parametrize(
    "path",
    [
        *sorted((PACKAGE / "model").glob("*.py")),
        *sorted((PACKAGE / "ops/reference").glob("*.py")),
        PACKAGE / "tokenizer/network.py",
    ],
    ids=relative,
)
def test_shapes_stand_on_the_def(path):
    """Every public function that takes or makes arrays says which shapes, on its `def` or in its docstring."""
    lines = path.read_text().splitlines()
    silent = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
        arrays = "Array" in head or "ndarray" in head
        if arrays and not SHAPE.search(head) and not re.search(r"\([A-Z]\w*,", ast.get_docstring(node) or ""):
            silent.append(f"{relative(path)}:{node.lineno} {node.name}")
    exempt = {"prepare", "stage", "asarray", "to_host", "concatenate", "all_finite", "softmax"}
    exempt |= {"dropout_factors", "position_biases", "resized", "classification_loss", "dump", "restore"}
    assert not [text for text in silent if text.split()[-1] not in exempt]


def test_print_belongs_to_the_command_line():
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in FILES
        if layer_of(path) not in ("cli", "__main__")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not any(keyword.arg == "file" for keyword in node.keywords)  # a notice on stderr is no output
    ]
    assert not wrong


def test_no_file_is_long():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: count for name, count in lengths.items() if count > LONGEST_FILE}


def test_fastmath_is_never_simply_on():
    wrong = [relative(path) for path in FILES if re.search(r"fastmath\s*=\s*True", path.read_text())]
    assert not wrong


def test_import_is_light():
    program = "import sys, minibeit; print(sorted(n for n in sys.modules if '.' not in n))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout))
    assert "minibeit" in loaded
    assert not loaded & {"numba", "torch", "transformers", "PIL", "numpy", "tqdm", "huggingface_hub"}


def test_the_numpy_backend_needs_no_numba():
    program = (
        "import sys; from minibeit import BeitConfig, BeitModel; "
        "BeitModel(BeitConfig(num_hidden_layers=1, hidden_size=12), backend='numpy'); "
        "print([n for n in ('numba', 'torch', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_can_be_imported():
    assert len(minibeit.__all__) == len(set(minibeit.__all__))
    for name in minibeit.__all__:
        assert getattr(minibeit, name) is not None, name
    assert set(minibeit.__all__) <= set(dir(minibeit))
    with pytest.raises(AttributeError, match="module 'minibeit' has no attribute 'BeitForAudio'"):
        _ = minibeit.BeitForAudio


def test_every_module_can_be_imported():
    optional = {"torch", "transformers", "cupy", "jax", "flax", "huggingface_hub", "numba", "matplotlib", "distributed"}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        try:
            importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        except ModuleNotFoundError as error:
            assert error.name.split(".")[0] in optional, f"{relative(path)}: {error}"


def test_activations_are_those_of_the_config():
    assert set(activations.ACTIVATIONS) == set(CONFIG_ACTIVATIONS)


ASSERTING = {"raises", "warns", "fail"}  # calls that fail a test by themselves


def asserts(function: ast.FunctionDef, helpers: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ASSERTING | helpers or name.startswith("assert_"):
                return True
    return False


SHARED_HELPERS = {
    node.name
    for path in TESTS
    if not path.name.startswith("test_")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and asserts(node, set()) and node.name not in ("distance", "ratio", "ratios")
}


@pytest.mark.parametrize("path", [path for path in TESTS if path.name.startswith("test_")], ids=relative)
def test_every_test_asserts_something(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_")]
    helpers = set(SHARED_HELPERS)  # and functions of the file that assert, by themselves or through others
    for _ in range(3):
        helpers |= {f.name for f in functions if f not in tests and asserts(f, helpers)}
    assert tests, "a test file without tests"
    assert not [function.name for function in tests if not asserts(function, helpers)]


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines()]


MACHINE = re.compile(r"(?<![\w.])/(work|opt|home|root|Users|mnt)/\w")


def test_no_path_of_a_machine_in_tracked_files():
    wrong = []
    for path in tracked():
        if (
            path.suffix not in {".py", ".md", ".cfg", ".toml", ".json", ".txt", ".yml", ".ipynb", ""}
            or not path.is_file()
        ):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE.search(line) and "MACHINE" not in line:
                wrong.append(f"{relative(path)}:{number}: {line.strip()[:100]}")
    assert not wrong
