"""Uses a wheel in an empty environment without a compiler: ops, a network, the command line.

    python tests/build/try_wheel.py dist/edet_kernels-….whl

torch and the other requirements are those of the Python that runs this; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Run in the new environment: the library is loaded, each op agrees with its reference, and so
#: does D0, fused against PyTorch's layers.
PROBE = """
import sys
from pathlib import Path

import torch

import edet
import edet_kernels
from edet_kernels import library
from edet_kernels.testing.numeric import relative_difference
from edet_kernels.testing.samples import SAMPLES, sample

for package in (edet, edet_kernels):
    assert Path(package.__file__).is_relative_to(sys.prefix), package
assert library.load(), library.status()
assert library.path().is_relative_to(sys.prefix), library.path()
for op in SAMPLES:
    torch.manual_seed(0)
    sample(op).check(torch.float32)

torch.manual_seed(0)
model = edet.create_model("tf_efficientdet_d0").eval()
images = torch.randn(1, 3, 256, 256)
with torch.no_grad():
    fused = model(images)
layers = model(images)  # gradients are possible: PyTorch's layers
for ours, theirs in zip(fused, layers):
    difference = relative_difference(ours, [x.detach() for x in theirs])
    assert difference < 1e-4, difference
print(library.status())
"""


#: As its command does, which is in no fixed place.
AUDIT = "import sys; from torch_abi_audit.cli import main; sys.exit(main(['--json', sys.argv[1]]))"


def try_wheel(wheel: Path, folder: Path) -> str:
    """Installs ``wheel`` into an environment made in ``folder`` and uses it.

    Returns:
        what the library says of itself.

    Raises:
        RuntimeError: something failed; the message is what it printed.
    """
    env = folder / "env"
    venv.create(env)
    [site] = env.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("EDET_", "PYTHON")) and key not in ("CXX", "CUDA_HOME", "CUDACXX")
    }
    clean["PATH"] = str(env / "bin")  # no compiler, no cmake

    def run(*command: str, env: dict[str, str] | None = clean) -> str:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python")
    run(*pip, str(env / "bin/python"), "install", "--no-deps", "--force-reinstall", str(wheel))
    said = run(str(env / "bin/python"), "-W", "error::RuntimeWarning", "-c", PROBE)
    audit = json.loads(run(sys.executable, "-c", AUDIT, str(next(site.glob("*/*.so"))), env=None))
    [library] = audit["bundled_libs"]
    if not library["torch"]["stable"] or library["torch"]["min_torch_version"] != "2.10.0":
        raise RuntimeError(f"torch-abi-audit: must be stable since 2.10.0, got {library['torch']}")
    run(str(env / "bin/edet"), "predict", str(ROOT / "docs/demo.jpg"), "--json", "found.json")
    [entry] = json.loads((folder / "found.json").read_text())
    names = [found["name"] for found in entry["detections"]]
    if "person" not in names:
        raise RuntimeError(f"edet predict found no person in {entry['file']} but {names}")
    return said.strip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(try_wheel(Path(sys.argv[1]).resolve(), Path(name)))
