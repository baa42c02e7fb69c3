"""What README and docs name exists: commands with their options, make targets, variables."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Page and words of every indented command line of the pages that runs ``program``."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"    {program} "):
                found.append((page.name, shlex.split(line.strip(), comments=True)[1:]))
    return found


def ids(value: object) -> str | None:
    return " ".join(value) if isinstance(value, list) else None


def option_of_make(words: list[str]) -> dict[str, list[str]]:
    return {name: shlex.split(value) for name, value in (w.split("=", 1) for w in words[1:])}


@pytest.mark.parametrize(("page", "words"), commands("edet"), ids=ids)
def test_edet_commands_are_understood(page, words, tmp_path, monkeypatch):
    pytest.importorskip("typer", reason="needs the extra cli")
    typer_main = pytest.importorskip("typer.main")
    from edet.cli import app

    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.endswith((".json", ".jpg", ".pth")):
            Path(word).touch()
    command, name = typer_main.get_command(app), "edet"
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(words), ignore_unknown_options=False)
        name, command, words = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
    command.make_context(name, words)  # raises for what it does not know


@pytest.mark.parametrize(("page", "words"), commands("make"), ids=ids)
def test_make_targets_exist(page, words):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE)
    for variable in option_of_make(words):
        assert f"$({variable})" in makefile


@pytest.mark.parametrize(("page", "words"), [*commands("python"), *commands("pytest")], ids=ids)
def test_programs_exist(page, words):
    if words[0] == "-m":
        module = words[1].replace(".", "/") + ".py"
        assert words[1] == "build" or any((ROOT / f / module).exists() for f in (".", "python"))
    else:
        assert (ROOT / words[0]).exists()


def test_extras_exist():
    project = (ROOT / "pyproject.toml").read_text()
    named = {
        extra
        for page in PAGES
        for extras in re.findall(r'"(?:\.|edet-kernels)\[(\w+(?:,\w+)*)\]"', page.read_text())
        for extra in extras.split(",")
    }
    assert named and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in named)


def test_every_variable_is_in_the_guide_and_no_other():
    reads = re.compile(r'(?:getenv|env(?:iron)?(?:\.get)?)[\[(]\s*"(EDET_\w+)"')
    sources = [
        *ROOT.glob("setup.py"),
        *(p for f in ("edet_kernels", "python", "tests", "csrc") for p in (ROOT / f).rglob("*")),
    ]
    found = {
        name
        for path in sources
        if path.suffix in (".py", ".cpp", ".h")
        for name in reads.findall(path.read_text(encoding="utf-8"))
    }
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    table = guide.split("## Environment variables")[1].split("\n## ")[0]
    assert set(re.findall(r"`(EDET_\w+)`", table)) == found


def test_variables_are_explained_in_the_guide_alone():
    others = [p for p in (*PAGES, *ROOT.glob("*/README.md")) if p.name != "guide.md"]
    row = re.compile(r"\| `EDET_\w+` \|")
    assert row.search((ROOT / "docs/guide.md").read_text(encoding="utf-8")) is not None
    assert [p.name for p in others if row.search(p.read_text(encoding="utf-8"))] == []


def test_signatures_of_ops_are_in_no_document():
    signature = re.compile(r"^ {4}(weighted_fusion|fusion_node|bifpn|head|mbconv)\(", re.MULTILINE)
    assert [p.name for p in PAGES if signature.search(p.read_text(encoding="utf-8"))] == []


def tour() -> list[tuple[str, str]]:
    """File and name of every stop of the tour."""
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `([^`]+)` \| ([^|]+) \|", text, re.MULTILINE)
    return [(file, name) for file, names in rows for name in re.findall(r"`([^`]+)`", names)]


def defines_python(text: str, name: str) -> bool:
    """Whether ``name``, perhaps of a method, is defined at the top of a file or of a class."""
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def defines_cpp(text: str, name: str) -> bool:
    """Whether a class or function is defined or, with a parenthesis in it, stands as it is."""
    if "(" in name:
        return name in text
    scope, _, member = name.rpartition(".")
    if scope and not defines_cpp(text, scope):
        return False
    indent = "  " if scope else ""
    declared = rf"^(?:class|struct) {member}\b|^{indent}(?:[\w:<>&*]+ )*{member}\("
    return re.search(declared, text, re.MULTILINE) is not None


def test_the_tour_is_short():
    files = dict.fromkeys(file for file, _ in tour())
    assert 12 <= len(files) <= 18
    assert {Path(file).parts[0] for file in files} == {"python", "edet_kernels", "csrc"}


@pytest.mark.parametrize(("file", "place"), tour())
def test_places_of_the_tour_exist(file, place):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert (defines_python if file.endswith(".py") else defines_cpp)(text, place)


def test_missing_places_are_seen():
    assert not defines_python("class A:\n    def f(self):\n        self.g()\n", "A.g")
    assert not defines_cpp("int f(int x) {\n  return g(x);\n}\n", "g")


def test_files_that_pages_name_exist():
    named = {
        (page.name, file)
        for page in PAGES
        for file in re.findall(
            r"`((?:python|csrc|edet_kernels|tests|benchmarks)/[\w/]+\.\w+)`",
            page.read_text(encoding="utf-8"),
        )
    }
    built = {"edet_kernels/libedet_kernels.so"}
    assert (
        named
        and [n for n in sorted(named) if n[1] not in built and not (ROOT / n[1]).exists()] == []
    )


def test_every_document_is_listed_once():
    more = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## More\n")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert more.count(f"[docs/{page.name}](docs/{page.name})") == 1, page.name
