"""Launch configurations of the Triton kernels: look-up, files, and tuning without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from edet_kernels.triton import configs, tune

# lanes outside a map hold anything
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

LATERAL = {"BLOCK_P": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def entry(channels=64, pixels=1024, dtype="any", kernel="lateral", **config):
    config = {**LATERAL, **config}
    return {
        "kernel": kernel,
        "dtype": dtype,
        "channels": channels,
        "pixels": pixels,
        "config": config,
    }


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Tuned tables lie in a folder of the test's own."""
    monkeypatch.setenv("EDET_TRITON_CONFIGS", str(tmp_path))
    configs.clear()
    yield tmp_path
    configs.clear()


def test_defaults_have_every_kernel():
    table = configs.read(configs.DEFAULTS)
    assert {e["kernel"] for e in table if e["dtype"] == "any"} == set(configs.FIELDS)


@pytest.mark.parametrize("kernel", configs.FIELDS)
def test_every_call_finds_a_configuration(kernel):
    for channels, pixels in ((1, 0), (64, 4096), (5000, 2**31 - 1)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            config = configs.find(kernel, torch.empty(0, dtype=dtype), channels, pixels)
            assert set(config) == set(configs.FIELDS[kernel])


def test_the_nearest_entry_is_used():
    table = [
        entry(64, 1024, BLOCK_P=16),
        entry(64, 65536, BLOCK_P=32),
        entry(256, 1024, BLOCK_P=64),
        entry(64, 1024, "float32", BLOCK_P=128),
    ]

    def tile(channels, pixels, dtype="float16"):
        return configs.nearest([table], "lateral", dtype, channels, pixels)["BLOCK_P"]

    assert tile(64, 1024) == tile(88, 4000) == tile(1, 0) == 16
    assert tile(64, 30000) == tile(64, 10**9) == 32
    assert tile(160, 512) == 64
    assert tile(160, 10**6, "float32") == 128  # the dtype's own before the nearer one of any
    with pytest.raises(LookupError, match="no configuration for fusion_node"):
        configs.nearest([table], "fusion_node", "float16", 64, 64)


def test_the_tuned_table_comes_first(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (80 GB)")
    file = configs.tuned_file("NVIDIA H200 (80 GB)")
    assert file == files / "nvidia-h200-80-gb.json"
    arguments = (torch.device("cuda"), torch.float16, 64, 1024)
    default = configs._find("lateral", *arguments)
    configs.write(file, [entry(BLOCK_N=128)])
    configs.clear()
    assert configs._find("lateral", *arguments) == {**LATERAL, "BLOCK_N": 128} != default
    assert configs._find("weighted_fusion", *arguments)  # not in it: the default


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("EDET_TRITON_CONFIGS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.folder() == tmp_path / "edet_kernels" / "triton"


def test_writing_replaces_the_file_in_one_step(files, monkeypatch):
    file = files / "deep" / "gpu.json"
    configs.write(file, [entry()])
    assert configs.read(file) == [entry()]
    monkeypatch.setattr(configs.os, "replace", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        configs.write(file, [])
    assert configs.read(file) == [entry()]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("not json", "is not JSON"),
        ({}, "must hold a list of entries, got dict"),
        ([1], "an entry has kernel, dtype, channels, pixels and config, in 1"),
        ([entry(kernel="conv")], "kernel must be one of weighted_fusion"),
        ([entry(dtype="float64")], "dtype must be one of float32, float16, bfloat16, any"),
        ([entry(channels=0)], "channels must be a positive integer, got 0"),
        ([entry(BLOCK_P=48)], "BLOCK_P must be a power of two from 16 up, got 48"),
        ([entry(num_warps=3)], "num_warps must be 1, 2, 4, 8 or 16, got 3"),
        ([entry(depth=3)], "config must have BLOCK_P, BLOCK_N, BLOCK_K, num_warps, num_stages"),
    ],
    ids=str,
)
def test_a_bad_table_is_refused(files, table, message):
    file = files / "bad.json"
    file.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=message) as error:
        configs.read(file)
    assert str(file) in str(error.value)


# Tuning.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(files, capsys):
    assert tune.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(files.iterdir())


@pytest.mark.parametrize("kernel", configs.FIELDS)
def test_candidates_are_valid(kernel):
    found = list(tune.candidates(kernel))
    assert len(found) > 10
    for config in found:
        example = {**entry(kernel=kernel), "config": config}
        assert configs._problem(example) == ""
    assert sum(config.get("launches") == 2 for config in found) == (kernel == "fusion_node")


@pytest.mark.parametrize("kernel", configs.FIELDS)
def test_tuned_calls_use_the_kernel(kernel, monkeypatch):
    asked = []
    find = configs.find
    monkeypatch.setattr(configs, "find", lambda *a: asked.append(a[0]) or find(*a))
    tune.call(kernel, torch.float32, 16, 1, torch.device("cpu"))()
    assert kernel in asked


def test_the_fastest_candidate_that_runs_wins():
    times = {16: 3.0, 32: 1.0, 64: 2.0}

    def timer(run):
        tile = configs.find("lateral", torch.empty(0), 64, 64)["BLOCK_P"]
        if tile == 128:
            raise RuntimeError("out of shared memory")
        return times[tile]

    among = [{**LATERAL, "BLOCK_P": tile} for tile in (128, 16, 32, 64)]
    assert tune.best("lateral", lambda: None, timer, among) == (1.0, among[2])
    with pytest.raises(RuntimeError, match="no configuration of lateral runs: out of shared"):
        tune.best("lateral", lambda: None, timer, among[:1])


def test_other_entries_stay():
    old = [entry(64), entry(88, BLOCK_P=16)]
    new = [entry(88, BLOCK_P=64)]
    assert tune.merged(old, new) == [entry(64), entry(88, BLOCK_P=64)]
