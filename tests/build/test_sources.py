"""Rules every source file keeps: an opening sentence, and what its folder may depend on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
FOLDERS = ("edet_kernels", "python", "tests", "benchmarks")
PYTHON = [ROOT / "setup.py", *sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)


def test_there_are_sources():
    assert len(CPP) > 10
    assert len(PYTHON) > 10


@pytest.mark.parametrize("path", CPP, ids=name)
def test_cpp_file_says_what_lives_there(path):
    assert re.match(r"// \S.{10,}", path.read_text())


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_file_says_what_lives_there(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring) > 20


@pytest.mark.parametrize("path", [p for p in CPP if p.parent.name != "torch"], ids=name)
def test_torch_is_included_in_csrc_torch_only(path):
    assert [i for i in includes(path) if re.match("(torch|ATen|c10)/", i)] == []
    assert not any("torch/" in include for include in includes(path))


@pytest.mark.parametrize("path", [p for p in CPP if p.parent.name in ("core", "cpu")], ids=name)
def test_cuda_is_not_included_in_core_and_cpu(path):
    assert [i for i in includes(path) if "cuda" in i] == []


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=name)
def test_kernels_speak_cuda_through_device_cuh_only(path):
    assert [i for i in includes(path) if i.startswith("cuda")] == []
    dialect = r"\b(?:threadIdx|blockIdx|blockDim|gridDim|__\w+|asm)\b|<<<"
    assert re.findall(dialect, path.read_text()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "edet_kernels").rglob("*.py")), ids=name)
def test_kernels_do_not_import_models(path):
    imports = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
    assert [i for i in imports if i.split(".")[0] == "edet"] == []


def imports(path: Path, modules: set[str]) -> set[str]:
    """The ``modules`` that a file imports, also inside functions."""
    folders = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & modules if names & modules else {base}
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some circle of a graph of imports; none where there is no circle."""
    left = {name: set(needed) for name, needed in graph.items()}
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("path", [p for p in PYTHON if "tests" in p.parts], ids=name)
def test_no_test_edits_the_search_path(path):
    # shared helpers are in edet_kernels.testing, or in tests, which pyproject.toml names
    assert "sys." + "path" not in path.read_text()


def test_kernels_import_each_other_in_no_circle():
    folder = ROOT / "edet_kernels"
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
    }
    # the package itself is the face of all its modules; its version alone is read, late
    del files["edet_kernels"]
    graph = {name: imports(path, set(files)) for name, path in files.items()}
    assert {"edet_kernels.backend", "edet_kernels.triton"} <= set(graph)
    assert graph["edet_kernels.names"] == set()
    assert circle(graph) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("readme", "parts"),
    [
        ("csrc/README.md", [f"{p.name}/" for p in (ROOT / "csrc").iterdir() if p.is_dir()]),
        (
            "edet_kernels/README.md",
            [p.name for p in (ROOT / "edet_kernels").glob("*.py") if p.name != "__init__.py"],
        ),
    ],
)
def test_each_folder_and_module_is_explained_once(readme, parts):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert parts
    assert [part for part in parts if text.count(f"\n| `{part}` |") != 1] == []


def test_readme_names_every_op_of_the_library():
    schemas = (ROOT / "csrc/torch/library.cpp").read_text()
    ops = re.findall(r'm\.def\(\s*"(\w+)\(', schemas)
    assert len(ops) > 5
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## What runs where")[1]
    forward = [op for op in ops if not op.endswith("_backward")]
    assert [op for op in forward if f"`{op}`" not in readme] == []
