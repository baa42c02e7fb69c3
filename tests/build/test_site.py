"""The site of docs/: the reference names all that is public, and Sphinx has nothing to warn of."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("package", ["edet", "edet_kernels", "edet.training"])
def test_the_reference_names_all_that_is_public(package):
    page = (DOCS / "api" / f"{package.partition('.')[0]}.rst").read_text()
    named = set(
        re.findall(r"^\.\. auto(?:class|exception|function):: ([\w.]+)$", page, re.MULTILINE)
    )
    titles = set(re.findall(r"^(?:edet|edet_kernels)\.(\w+)$", page, re.MULTILINE))
    module = importlib.import_module(package)
    public = {
        name
        for name in module.__all__
        if hasattr(getattr(module, name), "__doc__")
        and not isinstance(getattr(module, name), (str, int, float, tuple, dict))
    }
    assert len(public) > 10 and public - named - titles == set()


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^   ([\w/-]+)$", (DOCS / "index.rst").read_text(), re.MULTILINE))
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert listed == pages | {"api/edet", "api/edet_kernels"}


def built(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    strict = ("--fail-on-warning", "--keep-going", "--quiet", "-b", "html")
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *strict, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for module in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(module, reason="needs the extra docs")
    done = built(DOCS, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/api/edet.html").read_text(encoding="utf-8")
    assert 'id="edet.Predictor"' in reference and "images that go through the network" in reference
    assert "`edet_kernels/ops`" not in (tmp_path / "site/design.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_broken_link_is_an_error(tmp_path):
    for module in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(module, reason="needs the extra docs")
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    (source / "index.rst").write_text("Title\n=====\n\n.. toctree::\n\n   guide\n")
    (source / "guide.md").write_text("# Guide\n\n[x](#guide) [y](none.md) [z](guide.md#nowhere)\n")
    done = built(source, tmp_path / "site")
    assert done.returncode != 0
    [one, two] = [line for line in done.stderr.splitlines() if "guide.md:3" in line]
    assert "none.md" in one + two and "nowhere" in one + two


def test_links_to_files_outside_become_names():
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    assert spec and spec.loader
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    page = ["[the list](../CMakeLists.txt), [here](guide.md), ![plot](demo.jpg)"]
    conf.name_files_outside(None, "page", page)
    assert page == ["`CMakeLists.txt`, [here](guide.md), ![plot](demo.jpg)"]
    for broken in ("[x](../none.py)", "![x](../none.png)"):
        with pytest.raises(FileNotFoundError, match=r"page (links to|shows) \.\./none"):
            conf.name_files_outside(None, "page", [broken])
