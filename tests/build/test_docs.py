"""What README and docs name exists: commands with their options, make targets, variables."""

from __future__ import annotations

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
