"""setup.py: what it accepts in the environment, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC_13 = {"75", "80", "86", "89", "90", "90a", "100", "100a", "103", "120", "120f"}


def fake_program(folder: Path, name: str, output: str = "") -> Path:
    """An executable in ``folder`` that prints ``output``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("90", "90-real"),
        ("90a", "90a-real"),
        ("75;80;90+PTX", "75-real;80-real;90"),
        (" 75, 80 ", "75-real;80-real"),
        (None, "75-real;80-real;86-real;89-real;90-real;100-real;120"),
    ],
)
def test_cuda_archs(script, setting, expected):
    assert script.cuda_archs(setting, {*NVCC_13, "120"}) == expected


def test_default_cuda_archs_are_those_that_an_older_nvcc_knows(script):
    assert script.cuda_archs(None, {"75", "80", "90"}) == "75-real;80-real;90-real"


@pytest.mark.parametrize("setting", ["9.0", "sm_90", "hopper", "90;", "90+ptx", "all"])
def test_cuda_archs_that_are_no_numbers(script, setting):
    with pytest.raises(script.SetupError, match=r"EDET_CUDA_ARCHS: .* not a compute capability"):
        script.cuda_archs(setting, NVCC_13)


def test_cuda_archs_that_nvcc_does_not_know(script):
    with pytest.raises(script.SetupError, match=r"cannot compile for 60\. It knows 75, 80, 86, 89"):
        script.cuda_archs("60;90", NVCC_13)


def test_no_arch_at_all(script):
    with pytest.raises(script.SetupError, match="knows none of"):
        script.cuda_archs(None, {"50"})


def test_cuda_wanted_without_nvcc(script, monkeypatch):
    monkeypatch.setattr(script, "find_nvcc", lambda env: None)
    with pytest.raises(script.SetupError, match=r"nvcc was not found.*CUDA_HOME.*EDET_CUDA=0"):
        script.cuda_options({"EDET_CUDA": "1"})
    assert script.cuda_options({}) == ["-DEDET_CUDA=OFF"]
    assert script.cuda_options({"EDET_CUDA": "auto"}) == ["-DEDET_CUDA=OFF"]


def test_cuda_switched_off(script, tmp_path):
    fake_program(tmp_path, "nvcc", "sm_90")
    assert script.cuda_options({"EDET_CUDA": "0", "PATH": str(tmp_path)}) == ["-DEDET_CUDA=OFF"]


def test_cuda_setting_that_means_nothing(script):
    with pytest.raises(script.SetupError, match="EDET_CUDA must be 0, 1 or auto, got 'yes'"):
        script.cuda_options({"EDET_CUDA": "yes"})


@pytest.mark.parametrize(("setting", "expected"), [("1", "ON"), ("auto", "AUTO"), ("", "AUTO")])
def test_cuda_options(script, tmp_path, setting, expected):
    nvcc = fake_program(tmp_path / "bin", "nvcc", "sm_80 sm_90")
    env = {"EDET_CUDA": setting, "CUDA_HOME": str(tmp_path), "EDET_CUDA_ARCHS": "90"}
    assert script.cuda_options(env) == [
        f"-DEDET_CUDA={expected}",
        f"-DEDET_NVCC={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=90-real",
    ]


def test_cuda_home_comes_before_path(script, tmp_path):
    wanted = fake_program(tmp_path / "home/bin", "nvcc")
    fake_program(tmp_path / "path", "nvcc")
    env = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}
    assert script.find_nvcc(env) == str(wanted)


def test_sanitizers(script):
    assert script.sanitizers({}) == []
    assert script.sanitizers({"EDET_SANITIZE": "address,undefined"}) == ["address", "undefined"]
    with pytest.raises(script.SetupError, match="unknown adress; the sanitizers are address, leak"):
        script.sanitizers({"EDET_SANITIZE": "adress"})


def test_jobs(script):
    assert script.jobs({"MAX_JOBS": "3"}) == 3
    assert 1 <= script.jobs({}) <= (os.cpu_count() or 1)
    for setting in ("0", "-1", "many", "1.5"):
        with pytest.raises(script.SetupError, match="MAX_JOBS must be a positive whole number"):
            script.jobs({"MAX_JOBS": setting})


def test_torch_missing(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: "/none")
    with pytest.raises(script.SetupError, match=r"torch is missing in .*install torch >= 2.10"):
        script.find_torch()


@pytest.fixture
def isolated(script, monkeypatch, tmp_path):
    """As in an isolated build: torch cannot be imported, it lies in an environment of a version."""
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))

    def put(version: str) -> Path:
        (tmp_path / "torch").mkdir()
        metadata = tmp_path / f"torch-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        return tmp_path / "torch"

    return put


def test_torch_of_the_environment_that_an_isolated_build_is_for(script, isolated):
    assert isolated("2.11.0+cpu") == script.find_torch()


def test_torch_of_that_environment_may_be_too_old(script, isolated):
    isolated("2.9.1")
    with pytest.raises(script.SetupError, match=r"torch 2.9.1 is too old"):
        script.find_torch()


@pytest.fixture
def backend(script, monkeypatch):
    """The build backend as a module, with the setup.py of the tests."""
    spec = importlib.util.spec_from_file_location("backend", ROOT / "build_backend/backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_setup_script", lambda: script)
    return module


def test_a_build_downloads_torch_only_where_there_is_none(backend, isolated, capsys):
    assert backend.compile_requirements({}) == ["cmake>=3.24", "ninja", "torch>=2.10"]
    assert "the newest is downloaded for the build" in capsys.readouterr().err
    folder = isolated("2.13.0")
    assert backend.compile_requirements({}) == ["cmake>=3.24", "ninja"]
    assert f"building against {folder}" in capsys.readouterr().err
    assert backend.compile_requirements({"EDET_BUILD": "0"}) == []


def test_a_download_of_torch_is_told_on_the_terminal(backend, isolated, monkeypatch, tmp_path):
    """pip shows a build's standard error after a failure, or with -v."""
    terminal = tmp_path / "terminal"
    monkeypatch.setattr(backend, "TERMINAL", str(terminal))
    backend.compile_requirements({})
    assert "the newest is downloaded for the build" in terminal.read_text()
    terminal.unlink()
    isolated("2.13.0")
    backend.compile_requirements({})
    assert not terminal.exists()


def test_without_a_terminal_nothing_is_told_there(backend, isolated, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "TERMINAL", str(tmp_path / "none/terminal"))
    assert backend.TORCH in backend.compile_requirements({})


def test_the_torch_of_a_build_is_that_of_the_installation(backend):
    project = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["numpy>=1.24", "{backend.TORCH}"]' in project


def test_the_backend_is_the_one_that_is_named():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'build-backend = "backend"' in project and 'backend-path = ["build_backend"]' in project
    assert "graft build_backend" in (ROOT / "MANIFEST.in").read_text()


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0", "2.9.0+cpu"])
def test_torch_too_old(script, monkeypatch, version):
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: version)
    with pytest.raises(script.SetupError, match=r"is too old: install torch >= 2.10"):
        script.find_torch()


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0"])
def test_torch_new_enough(script, monkeypatch, version):
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: version)
    assert (script.find_torch() / "include").is_dir()


def test_cxx_that_is_no_program(script, tmp_path):
    fake_program(tmp_path, "g++")
    script.check_compiler({"PATH": str(tmp_path)})
    with pytest.raises(script.SetupError, match=r"no C\+\+ compiler: no-such-compiler not found"):
        script.check_compiler({"PATH": str(tmp_path), "CXX": "no-such-compiler -m64"})


def test_tool_missing(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(script.SetupError, match=r"ninja is missing. Run: .* -m pip install ninja"):
        script.find_tool("ninja", {"PATH": str(tmp_path)})


def test_other_systems(script, monkeypatch):
    monkeypatch.setattr(script.sys, "platform", "win32")
    with pytest.raises(script.SetupError, match=r"Linux only, not on win32\. Set EDET_BUILD=0"):
        script.build_library({})


@pytest.fixture
def builds(script, monkeypatch, tmp_path):
    """Builds in an empty folder with a cmake that compiles nothing; gives the commands it got."""
    log = tmp_path / "log.txt"
    cmake = fake_program(tmp_path / "bin", "cmake")
    cmake.write_text(f'#!/bin/sh\nif [ "$1" = -S ]; then mkdir -p "$4"; fi\necho "$@" >> {log}\n')
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "check_compiler", lambda env: None)
    monkeypatch.setattr(script, "find_tool", lambda name, env: str(tmp_path / "bin" / name))

    def build(**env: str) -> list[str]:
        log.write_text("")
        script.build_library({"EDET_CUDA": "0", **env})
        return log.read_text().splitlines()

    return build


def fresh(commands: list[str]) -> list[str]:
    """The folders that commands configure from nothing: what was compiled there is lost."""
    return [re.sub(r".* -B \S*/(\S+) .*", r"\1", line) for line in commands if "--fresh" in line]


def test_demo_and_test_in_turns_configure_each_folder_once(builds):
    demo, test = {}, {"EDET_EMULATION": "1"}
    assert fresh(builds(**demo)) == ["cpu"]
    assert fresh(builds(**test)) == ["emulation"]
    for _ in range(2):
        assert fresh(builds(**demo)) == []
        assert fresh(builds(**test)) == []


def test_the_library_is_configured_alike_with_and_without_the_emulation(builds):
    builds(EDET_EMULATION="1")
    demo, test = builds(), builds(EDET_EMULATION="1")
    assert test[: len(demo)] == demo
    assert [line.split(" --target ")[1].split()[0] for line in test if "--build" in line] == [
        "edet_kernels",
        "edet_emulation",
    ]


def test_another_compiler_starts_from_nothing(builds):
    assert fresh(builds(CXX="g++-12")) == ["cpu"]
    assert fresh(builds(CXX="g++-13")) == ["cpu"]


def test_other_gpus_compile_nothing_of_the_cpu_again(builds, tmp_path):
    nvcc = fake_program(tmp_path / "cuda/bin", "nvcc")
    nvcc.write_text("#!/bin/sh\necho sm_80 sm_90\n")
    cuda = {"EDET_CUDA": "auto", "CUDA_HOME": str(tmp_path / "cuda")}
    assert fresh(builds(**cuda, EDET_CUDA_ARCHS="90")) == ["cuda"]
    again = builds(**cuda, EDET_CUDA_ARCHS="80;90")
    assert fresh(again) == []
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real" in again[0]


def test_sanitizers_build_elsewhere(builds):
    assert fresh(builds(EDET_SANITIZE="address")) == ["cpu-address"]
    assert fresh(builds()) == ["cpu"]


def run_setup(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in this environment's Python as a user's shell would."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_user_sees_one_line_when_there_is_no_compiler(tmp_path):
    result = run_setup("build_ext", "--build-lib", str(tmp_path), PATH=str(tmp_path), CXX="")
    assert result.returncode != 0
    assert "error: no C++ compiler: c++, g++, clang++ not found on PATH" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_user_sees_one_line_for_a_wrong_switch():
    result = run_setup("--version", EDET_BUILD="yes")
    assert result.returncode != 0
    assert result.stderr.strip() == "error: EDET_BUILD must be 0 or 1, got 'yes'."
