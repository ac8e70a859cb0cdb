"""Kernels and their callers: the same arguments under the same names, and nothing that a kernel takes from a caller."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

from minibeit.bench import roof
from minibeit.ops import numba_cpu

if not numba_cpu.COMPILED:
    pytest.skip("NUMBA_DISABLE_JIT is set", allow_module_level=True)

from minibeit.ops.numba_cpu import (
    arguments,
    gradient_arguments,
    halves,  # noqa: F401  (it has kernels)
    low_arguments,
    machine_code,
    map_arguments,
)
from minibeit.ops.numba_cpu.arguments import Arguments

FOLDER = Path(arguments.__file__).parent
PACKAGE = FOLDER.parents[1]
STRUCTURES = {
    name: value
    for module in (arguments, gradient_arguments, map_arguments, low_arguments)
    for name, value in vars(module).items()
    if isinstance(value, Arguments)
}
roof._kernel()  # the only one that is not made on import
KERNELS = {(kernel.module, kernel.name): kernel for kernel in machine_code.ALL if kernel.module.startswith("minibeit.")}


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_the_fields_are_put_in_order():
    both = Arguments(("x", "y"), ("count",))
    assert both.operands(y=2, x=1) == (1, 2) and both.numbers(count=7) == (7,)
    assert both.names == ("scratch", "x", "y", "count")
    assert Arguments(()).numbers() == Arguments(()).operands() == ()


@pytest.mark.parametrize(
    "values, words", [({"x": 1}, r"missing \['y'\]"), ({"x": 1, "z": 2}, r"missing \['y'\], unknown \['z'\]")]
)
def test_a_missing_or_unknown_field_is_refused(values, words):
    with pytest.raises(TypeError, match="expected x, y; " + words):
        Arguments(("x", "y")).operands(**values)
    with pytest.raises(TypeError, match=r"unknown \['z'\]"):
        Arguments(("x",)).operands(x=1, z=1)


def test_no_name_stands_twice():
    assert STRUCTURES
    for name, structure in STRUCTURES.items():
        assert len(set(structure.names)) == len(structure.names), name


def test_every_kernel_in_the_sources_is_known_and_has_its_arguments():
    named = [
        (call.args[0].value, call.args[1].value)
        for path in PACKAGE.rglob("*.py")
        for call in calls(path)
        if isinstance(call.func, ast.Name) and call.func.id == "Kernel"
    ]
    assert len(named) > 10 and set(named) == set(KERNELS)
    without = {name for (_, name), kernel in KERNELS.items() if kernel.arguments is None}
    assert without == {"execute", "cancel", "wait"}  # of the pool, called with integers
    used = [kernel.arguments for kernel in KERNELS.values() if kernel.arguments is not None]
    assert sorted(map(id, used)) == sorted(map(id, STRUCTURES.values()))  # one each


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.name)
def test_a_kernel_exists_and_reads_the_fields_of_its_arguments(kernel):
    """All of them: a field that no kernel reads is one too many."""
    module = import_module(kernel.module)
    function = getattr(module, kernel.name)
    assert len(inspect.signature(function).parameters) == kernel.arity
    if kernel.arguments is None:
        return
    (tree,) = ast.parse(inspect.getsource(function)).body
    first = tree.body[1]  # after the docstring
    assert isinstance(first, ast.Assign) and first.targets[0].id == "p"
    assert [argument.id for argument in first.value.args] == ["args", "thread"]
    assert getattr(module, first.value.func.id).arguments is kernel.arguments
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.value.id == "p"}
    assert read - {"scratch"} == set(kernel.arguments.names) - {"scratch"}


def test_callers_use_the_arguments_of_the_kernel_that_they_run():
    """What a file calls as NAME.operands(...) or NAME.numbers(...) is of a kernel of that file, or PRODUCT."""
    found = 0
    for path in [*FOLDER.glob("*.py"), PACKAGE / "bench" / "roof.py"]:
        made = {"PRODUCT"}  # through gemm.run_products
        for call in calls(path):
            if isinstance(call.func, ast.Name) and call.func.id == "Kernel":
                made |= {keyword.value.id for keyword in call.keywords if keyword.arg == "arguments"}
        for call in calls(path):
            function = call.func
            if not isinstance(function, ast.Attribute) or getattr(function.value, "id", None) not in STRUCTURES:
                continue
            found += 1
            assert function.value.id in made, f"{path.name}:{call.lineno}"
            given = {keyword.arg for keyword in call.keywords}
            structure = STRUCTURES[function.value.id]
            expected = {"operands": structure.operand_names, "numbers": structure.number_names}[function.attr]
            assert not call.args and (given == set(expected) or None in given), f"{path.name}:{call.lineno}"
    assert found > 15


BELOW = {
    "arguments": [],
    "target": [],
    "gradient_arguments": ["arguments"],
    "map_arguments": ["arguments"],
    "low_arguments": ["arguments", "target"],
}


def test_kernels_import_nothing_from_their_callers():
    files = sorted((FOLDER / "kernels").glob("*.py"))
    assert len(files) > 8
    wrong = [
        f"{path.name}:{node.lineno} imports {node.module}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 1 and node.module not in BELOW
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(BELOW))
def test_what_lies_below_both_imports_nothing_of_the_backend(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert imports == BELOW[name]
