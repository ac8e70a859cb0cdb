"""The GPU backend as text: every op has its signature, and every kernel compiles for every dtype."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_on_cpu.fake_cupy import pretend

from minibeit.config import ACTIVATIONS
from minibeit.ops import HALF_DTYPES, reference
from minibeit.ops.table import TABLE, served_by

FOLDER = Path(reference.__file__).parent.parent / "cupy_gpu"
FUNCTIONS = {
    node.name: node
    for path in sorted(FOLDER.glob("*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
}
LAUNCHERS = ("along_rows", "by_columns", "warp_by_row", "over_channels", "_by_row", "kernel")
# There is nothing to store, a GPU queues every kernel by itself, a tape computes again and not a backend, and training
# is for CPUs.
NUMPYS = {"dump", "restore", "queued", "recompute", "adamw"}
DTYPES = ("float32", "float64", *HALF_DTYPES)
MODULES = [(dtype, learned) for dtype in DTYPES for learned in (False, True)]  # what is compiled at a time


@pytest.fixture(scope="module")
def kernels():
    """What the module `kernels` says; to be imported it needs CuPy's name only."""
    with pretend(fresh=("minibeit.ops.cupy_gpu",)):
        from minibeit.ops.cupy_gpu import kernels

        return SimpleNamespace(
            names={module: kernels.names(*module) for module in MODULES},
            ACTIVATIONS=kernels.ACTIVATIONS,
            sources={module: kernels.source(*module) for module in MODULES},
        )


def test_every_op_is_there():
    assert set(served_by("cupy")) == set(TABLE) - NUMPYS


@pytest.mark.parametrize("name", sorted(served_by("cupy")))
def test_signatures_are_those_of_the_reference(name):
    expected = inspect.signature(getattr(reference, name)).parameters.values()
    arguments = FUNCTIONS[name].args
    found = [argument.arg for argument in arguments.args]
    own = {"prepare": ["keep_source", "dtype"]}.get(name, [])  # `on_device` fills them in
    assert found == [p.name for p in expected] + own
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    assert defaults[: len(defaults) - len(own)] == [p.default for p in expected if p.default is not p.empty]
    assert not arguments.kwonlyargs
    assert not arguments.vararg


def test_activations_are_those_of_the_config(kernels):
    assert set(kernels.ACTIVATIONS) == set(ACTIVATIONS)
    text = (FOLDER / "kernels.cu").read_text()
    for number in set(kernels.ACTIVATIONS.values()) - {0}:
        assert f"case {number}:" in text


def test_kernels_that_are_launched_are_compiled(kernels):
    compiled = {name.partition("<")[0] for names in kernels.names.values() for name in names}
    launched = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in LAUNCHERS:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    launched.add(first.value)
    assert launched | {"convert"} == compiled
    assert len(compiled) > 15


def test_sources_are_part_of_the_package():
    settings = (Path(__file__).parents[1] / "setup.cfg").read_text()
    assert "minibeit.ops.cupy_gpu = *.cu" in settings
    assert "    minibeit.ops.cupy_gpu\n" in settings


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m[0] + " of training" * m[1])
def test_kernels_compile(module, kernels, tmp_path):
    """By CuPy's compiler where it is installed, else by nvcc; neither needs a GPU."""
    text, names = kernels.sources[module], kernels.names[module]
    if importlib.util.find_spec("cupy") is not None:
        assert compiled_by_nvrtc(text, names) > 10_000
    elif shutil.which("nvcc"):
        assert compiled_by_nvcc(text, names, tmp_path) > 10_000
    else:
        pytest.skip("neither CuPy nor nvcc is installed")


def compiled_by_nvrtc(text: str, names: tuple[str, ...]) -> int:
    """Bytes of machine-independent code, for all kernels."""
    from cupy.cuda import nvrtc

    folders = [str(path) for path in include_folders()]
    if "cuda_" in text and not folders:
        pytest.skip("the headers of CUDA are not installed")
    program = nvrtc.createProgram(text, "kernels.cu", [], [])
    for name in names:
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, ["--std=c++17", "-arch=sm_80", *(f"-I{folder}" for folder in folders)])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert all(nvrtc.getLoweredName(program, name) for name in names)
    return len(nvrtc.getPTX(program))


def include_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    wheels = [path.parent for place in places for path in Path(place).glob("*/include/cuda_fp16.h")]
    return [*wheels, *(path for path in [Path("/usr/local/cuda/include")] if path.is_dir())]


def compiled_by_nvcc(text: str, names: tuple[str, ...], folder: Path) -> int:
    """Bytes of machine-independent code; a pointer to every kernel makes the compiler write it."""
    kept = [f"void* kept_{i} = (void*)&{name};" for i, name in enumerate(names) if "<" in name]
    (folder / "kernels.cu").write_text("\n".join([text, *kept]))
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "--ptx", "-o", "kernels.ptx", "kernels.cu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return (folder / "kernels.ptx").stat().st_size
