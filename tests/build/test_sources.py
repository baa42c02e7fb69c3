"""Rules every source file keeps: an opening sentence, and what its folder may depend on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from torch import nn

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


def module_name(path: Path, package: bool = False) -> str:
    """The dotted name of a file, or of the package that it is in."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[parts[0] == "python" :]
    return ".".join(parts[:-1] if package or parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str], *, types: bool = True) -> set[str]:
    """The ``modules`` that a file imports, also inside functions; perhaps those for types alone."""
    folders = module_name(path, package=True).split(".")
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    unread: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            unread |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) - node.level + 1] if node.level else []
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
    files = {module_name(path): path for path in sorted((ROOT / "edet_kernels").rglob("*.py"))}
    # the package itself is the face of all its modules; its version alone is read, late
    del files["edet_kernels"]
    graph = {name: imports(path, set(files)) for name, path in files.items()}
    assert {"edet_kernels.backend", "edet_kernels.triton"} <= set(graph)
    assert graph["edet_kernels.names"] == set()
    assert circle(graph) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


#: The rooms of edet from the ground up; rooms on one floor do not know each other. Below them are
#: EXTRAS, above them what has no room: the package's own face, faces of modules, layers, the demo.
FLOORS = (
    ("fused", "weights"),
    ("models", "dropin"),
    ("detection",),
    ("training", "bench", "deploy"),
    ("cli",),
)
EXTRAS = ("edet.extras", "edet.files")
EDET = {module_name(path): path for path in sorted((ROOT / "python/edet").rglob("*.py"))}
OWN = [path for path in PYTHON if "tests" not in path.parts and path.name != "setup.py"]


def room(module: str) -> str:
    """The room that a module of edet is in; empty for one without."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / "python/edet" / parts[1]).is_dir() else ""


def floor(module: str) -> int:
    if module in EXTRAS:
        return -1
    found = [i for i, rooms in enumerate(FLOORS) if room(module) in rooms]
    return found[0] if found else len(FLOORS)


def test_every_room_has_a_floor():
    folders = {
        path.name for path in (ROOT / "python/edet").iterdir() if (path / "__init__.py").exists()
    }
    assert folders == {name for rooms in FLOORS for name in rooms}


@pytest.mark.parametrize("module", EDET)
def test_a_file_imports_its_own_room_or_lower_ones(module):
    above = [
        other
        for other in imports(EDET[module], set(EDET))
        if floor(other) >= floor(module) and (room(other) != room(module) or not room(module))
    ]
    if floor(module) == len(FLOORS):  # above the rooms: their order is that there is no circle
        above = [other for other in above if other == "edet"]
    assert above == []


def test_edet_imports_itself_in_no_circle():
    graph = {name: imports(path, set(EDET), types=False) for name, path in EDET.items()}
    assert "edet.fused.packed" in graph["edet.models.bifpn"]
    assert circle(graph) == []


@pytest.mark.parametrize("path", OWN, ids=name)
def test_no_file_is_too_long_to_be_read(path):
    assert len(path.read_text().splitlines()) <= 560


@pytest.mark.parametrize("path", OWN, ids=name)
def test_no_function_is_too_long_to_be_read(path):
    """At most 80 lines, unless the comment above begins with 'Long:' and says why."""
    text = path.read_text()
    lines = text.splitlines()
    long = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            excused = lines[first - 2].lstrip().startswith("# Long: ") if first > 1 else False
            if (node.end_lineno or first) - node.lineno >= 80 and not excused:
                long.append(node.name)
    assert long == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_privately(tree: ast.AST) -> set[str]:
    """Names with an underscore that a file gives to functions, classes, variables or attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return set(filter(private, found))


TREES = {path: ast.parse(path.read_text()) for path in OWN}
PRIVATE = {path: defined_privately(tree) for path, tree in TREES.items()}


@pytest.mark.parametrize("path", OWN, ids=name)
def test_no_file_uses_private_names_of_another(path):
    others = set().union(*(names for other, names in PRIVATE.items() if other != path))
    others -= PRIVATE[path]
    others = {name for name in others if not hasattr(nn.Module, name)}  # torch's, overridden
    used = {n.attr for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute)}
    for node in ast.walk(TREES[path]):
        own = isinstance(node, ast.ImportFrom) and (
            node.level
            or (node.module or "").split(".")[0] in ("edet", "edet_kernels", "benchmarks")
        )
        if own:
            assert [alias.name for alias in node.names if private(alias.name)] == []
    assert sorted(used & others) == []


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
