"""edet_kernels.library: importing without the op library, and what is said of an unusable one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import edet_kernels
from edet_kernels import library

needs_library = pytest.mark.skipif(not library.load(), reason=library.status())


@pytest.fixture
def status(monkeypatch):
    """A function that says what status() is with EDET_LIBRARY set, as a fresh process would."""

    def ask(setting: str) -> str:
        monkeypatch.setenv("EDET_LIBRARY", setting)
        assert not library.load()
        assert library.build_info() is None
        return library.status()

    library._attempt.cache_clear()
    yield ask
    monkeypatch.undo()
    library._attempt.cache_clear()


def test_import_and_ops_work_without_the_library():
    code = """
import torch, edet_kernels
from edet_kernels import library
assert not library.load()
print(library.status())
x = torch.ones(1, 4, 2, 2)
print(edet_kernels.weighted_fusion([x, x], fusion="sum").sum().item())
print({choice.backend for choice in edet_kernels.explain()})
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "EDET_LIBRARY": "0", "EDET_BACKEND": "auto"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "the op library is switched off by EDET_LIBRARY=0",
        "32.0",
        "{'reference'}",
    ]


RUN = """
import torch, edet_kernels
x = torch.ones(1, 4, 2, 2)
edet_kernels.weighted_fusion([x.double()], fusion="sum")
print("then")
for _ in range(2):
    edet_kernels.weighted_fusion([x], fusion="sum")
print(edet_kernels.library.status())
"""


@pytest.fixture
def in_source_folder(tmp_path):
    """Runs a program in a source folder without a library, beside what is installed in a site."""
    source, site = tmp_path / "source", tmp_path / "site"
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(edet_kernels.__file__).parent, source / "edet_kernels", ignore=skip)

    def run(*options: str, version: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        if version:
            (site / "edet_kernels").mkdir(parents=True)
            (site / "edet_kernels" / library.FILE_NAME).symlink_to(library.path())
            folder = site / f"edet_kernels-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: edet-kernels\nVersion: {version}\n"
            )
        unset = ("EDET_LIBRARY", "EDET_BACKEND")
        return subprocess.run(
            [sys.executable, *options, "-c", RUN],
            cwd=source,
            env={k: v for k, v in os.environ.items() if k not in unset}
            | {"PYTHONPATH": f"{source}:{site}", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@needs_library
def test_an_installed_library_serves_a_source_folder(in_source_folder, tmp_path):
    done = in_source_folder("-W", "error", version=edet_kernels.__version__)
    assert done.returncode == 0, done.stderr
    assert f"loaded {tmp_path}/site/edet_kernels/{library.FILE_NAME}: CPU kernels" in done.stdout


@pytest.mark.parametrize("version", ["", "9.8.7"])
def test_a_warning_once_where_there_is_no_library(in_source_folder, version):
    if version and not library.load():
        pytest.skip(library.status())
    done = in_source_folder("-W", "always", version=version)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "runs its reference, several times slower" in done.stderr
    assert "the op library is not built" in done.stderr and "make build" in done.stderr
    done = in_source_folder("-W", "error")
    assert done.returncode == 1 and done.stdout == "then\n"  # at the first op with a kernel


@pytest.mark.parametrize("variable", ["EDET_BACKEND", "EDET_LIBRARY"])
def test_no_warning_of_what_was_asked_for(in_source_folder, variable):
    value = {"EDET_BACKEND": "reference", "EDET_LIBRARY": "0"}[variable]
    done = in_source_folder("-W", "error", **{variable: value})
    assert done.returncode == 0, done.stderr


@needs_library
def test_an_operator_with_other_arguments_is_not_used(monkeypatch):
    assert library.has_op("nms") and not library.missing("nms")
    monkeypatch.setattr(library, "fake_kernel", lambda op: lambda boxes, scores: None)
    assert not library.has_op("nms")
    assert "older than this package" in library.missing("nms")


def test_not_built(status, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    message = status("")
    assert "the op library is not built" in message
    assert f"{tmp_path / library.FILE_NAME} is missing" in message
    assert "make build" in message


def test_setting_that_names_no_file(status, tmp_path):
    assert (
        status(str(tmp_path / "a.so"))
        == f"EDET_LIBRARY names {tmp_path / 'a.so'}, which is not a file"
    )


def test_file_that_is_no_library(status, tmp_path):
    file = tmp_path / "a.so"
    file.write_text("hello")
    assert f"{file} cannot be used: it is not a shared library of this system" in status(str(file))


@needs_library
def test_library_of_another_processor(status, tmp_path):
    file = tmp_path / "a.so"
    content = bytearray(library.path().read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # RISC-V
    file.write_bytes(content)
    assert "it was built for another processor than this" in status(str(file))


@needs_library
@pytest.mark.parametrize("size", [20, 4096, -1])
def test_incomplete_library(status, tmp_path, size):
    file = tmp_path / "a.so"
    file.write_bytes(library.path().read_bytes()[:size])
    message = status(str(file))
    assert message.startswith(f"{file} cannot be used: it is ")
    assert "make build" in message


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to make a library")
def test_library_for_another_torch(status, tmp_path):
    file = tmp_path / "a.so"
    source = 'extern "C" void torch_of_the_future(); extern "C" void f() { torch_of_the_future(); }'
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(file)],
        input=source.encode(),
        check=True,
    )
    message = status(str(file))
    assert f"torch {torch.__version__} has no torch_of_the_future" in message
    assert "it was built for another torch" in message


def test_library_of_a_newer_system():
    error = "/lib/libstdc++.so.6: version `GLIBCXX_3.4.99' not found (required by a.so)"
    assert (
        library._explain(error) == "it was built on a newer system: this one lacks GLIBCXX_3.4.99"
    )


@needs_library
def test_library_of_another_version(status, monkeypatch):
    monkeypatch.setattr(edet_kernels, "__version__", "9.8.7")
    mine = library._read_build_info(library.path()).version
    message = status(str(library.path()))
    assert f"cannot be used: it is of edet-kernels {mine}, this is 9.8.7" in message


@needs_library
def test_loaded():
    info = library.build_info()
    assert library.status().startswith(f"loaded {library.path()}: CPU kernels baseline")
    assert info.cpu[0] == "baseline"
    assert library.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("edet_kernels::fusion_node", "CPU")
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(
        "edet_kernels::weighted_fusion", "CUDA"
    )
    assert has_cuda == bool(info.cuda) == bool(info.cuda_archs)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-virtual", (9, 0), True),
        ("90", (9, 0), True),
        ("90", (12, 0), True),
        ("90", (8, 9), False),
        ("120-virtual", (10, 0), False),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
    ],
)
def test_which_gpu_an_architecture_runs_on(arch, capability, runs):
    assert library._runs_on(arch, capability) is runs


@pytest.mark.parametrize(
    ("archs", "capability", "words"),
    [
        (("80-real", "90"), (9, 0), ""),
        (("80-real",), (9, 0), "this GPU has 90: build it with EDET_CUDA_ARCHS=90"),
        ((), (9, 0), "built without CUDA kernels"),
    ],
)
def test_cuda_refusal(monkeypatch, archs, capability, words):
    info = library.BuildInfo("0.1.0", ("baseline",), "13.0" if archs else "", archs, ())
    monkeypatch.setattr(library, "_attempt", lambda: info)
    message = library.cuda_refusal(capability)
    assert words in message if words else message == ""


def test_path_is_beside_the_package(monkeypatch):
    monkeypatch.delenv("EDET_LIBRARY", raising=False)
    assert library.path() == Path(library.__file__).parent / "libedet_kernels.so"
