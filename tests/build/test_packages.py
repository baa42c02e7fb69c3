"""Installing: the wheel's tag and contents, CMake on its own, and the project's files."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCH = os.uname().machine


def run(*command: str, cwd: Path = ROOT, **env: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory) -> Path:
    """A copy of what the source distribution holds, without anything built."""
    tree = tmp_path_factory.mktemp("tree") / "edet-kernels"
    built = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=built)
    return tree


@pytest.mark.slow
def test_wheel_from_a_clean_tree(clean_tree, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    # a type of build that CMake has no flags for: all is compiled, without optimisation, in a
    # third of the time; what the optimised library needs of a system, test_binary.py looks into
    quick = {"EDET_CUDA": "0", "CMAKE_BUILD_TYPE": "Quick"}
    run(*pip, "--wheel-dir", str(tmp_path), ".", cwd=clean_tree, **quick)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"edet_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"edet", "edet_kernels"}
    assert "edet_kernels/libedet_kernels.so" in names
    data = {"edet/py.typed", "edet_kernels/py.typed", "edet_kernels/triton/configs.json"}
    assert data <= set(names)
    for name in ("edet", "edet_kernels"):
        source = ROOT / ("python/edet" if name == "edet" else name)
        modules = {f"{name}/{path.relative_to(source)}" for path in source.rglob("*.py")}
        assert modules <= set(names)

    code = "import edet, edet_kernels.library as l; print(l.load(), l.status())"
    output = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), EDET_LIBRARY=""
    )
    assert output.startswith(f"True loaded {tmp_path / 'site'}")
    assert "no CUDA kernels" in output
    run(sys.executable, str(ROOT / "tests/build/try_wheel.py"), str(wheel))
    if importlib.util.find_spec("auditwheel"):
        repair = (sys.executable, "-m", "auditwheel", "repair", "--plat", f"manylinux_2_28_{ARCH}")
        exclude = ("--exclude", "libtorch.so", "--exclude", "libtorch_cpu.so")
        run(*repair, *exclude, "--wheel-dir", str(tmp_path / "audited"), str(wheel))


def test_every_folder_of_the_packages_is_packed(clean_tree, tmp_path):
    """setuptools warns, at length and at every installation, of one that it may leave out."""
    packing = (sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path))
    said = run(*packing, cwd=clean_tree, EDET_BUILD="0")
    assert "absent from" not in said
    assert list(tmp_path.glob("edet/weights/*.safetensors"))


@pytest.mark.slow
def test_wheel_without_the_library(clean_tree, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    shutil.rmtree(clean_tree / "build", ignore_errors=True)
    run(*pip, "--wheel-dir", str(tmp_path), ".", cwd=clean_tree, EDET_BUILD="0", PATH="")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake on PATH")
def test_cmake_alone_compiles_the_same_sources(tmp_path):
    """Configures without setup.py and looks into the compilation database."""
    run("cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DEDET_CUDA=OFF",
        f"-DPython3_EXECUTABLE={sys.executable}")  # fmt: skip
    database = (tmp_path / "compile_commands.json").read_text()
    compiled = {str(Path(f).relative_to(ROOT)) for f in re.findall(r'"file": "([^"]+)"', database)}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")}
    apart = ("/cuda_", "/emulation/")
    assert compiled == {name for name in sources if not any(part in name for part in apart)}


def test_readme_table_is_what_the_result_files_say():
    run(sys.executable, "benchmarks/update_readme.py", "--check")


def test_readme_table():
    spec = importlib.util.spec_from_file_location("update", ROOT / "benchmarks/update_readme.py")
    assert spec and spec.loader
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    readme = f"before\n{update.BEGIN}\nold\n{update.END}\nafter\n"
    assert update.updated(readme, ["new"]) == readme.replace("\nold\n", "\n\nnew\n\n")
    with pytest.raises(ValueError, match="once each"):
        update.updated("no marks", [])


def test_versions_agree():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    module = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "edet_kernels/__init__.py").read_text(), re.MULTILINE
    )
    assert version and module and version[1] == module[1]
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "csrc/*.md", "edet_kernels/*.md", "tests/golden/*.md")
    for page in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_the_projects_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []
