"""Coverage-guided fuzzing with atheris, with a watch on what no input may make a reader do.

    python tests/fuzz/run.py picture --runs 100000
    python tests/fuzz/run.py all --runs 100000 --corpus corpus   # goes on from what it has found

A finding ends the run with its traceback; the input is kept in a file ``crash-…`` of the folder
``build/fuzz``. Findings are what leaves a target (see targets.py), more than 2 GB of memory, 20
seconds for one input, a file written outside of the folder for that, a process, a socket, and
anything unpickled that is no tensor.
"""

from __future__ import annotations

import argparse
import io
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: The ops; their package itself is imported when the fuzzer watches.
OPS = [
    op
    for ops in ("OPS", "INT8_OPS")
    for op in runpy.run_path(os.fspath(ROOT / "edet_kernels" / "names.py"))[ops]
]

#: Packages whose branches guide the fuzzer.
WATCHED = ["PIL", "edet", "edet_kernels"]

#: Audit events of what no input may cause.
FORBIDDEN = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "socket.connect",
    "subprocess.Popen",
    "pickle.find_class",
)


class Escape(BaseException):
    """An input made the reader do what it must not; no reader's ``except Exception`` catches it."""


def forbid(folder: Path) -> None:
    """From now on makes every forbidden event, and writing outside ``folder``, an Escape."""
    inside = (os.fspath(folder) + os.sep, os.devnull)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            raise Escape(f"{event}{arguments}")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode, flags = arguments
            writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writes and not os.path.abspath(os.fsdecode(path)).startswith(inside):
                raise Escape(f"{os.fsdecode(path)} was opened to be written")

    sys.addaudithook(hook)


def seeds(name: str) -> list[bytes]:
    """A few good inputs of a target, from which the fuzzer begins."""
    import numpy as np
    import torch
    from PIL import Image, features

    if name == "picture":
        pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
        found = []
        modes = {"PNG": "RGBA", "TIFF": "RGB", "GIF": "P", "BMP": "RGB", "JPEG": "L", "PPM": "RGB"}
        modes |= {"ICO": "RGBA", "TGA": "RGB", "PCX": "P", "SGI": "RGB", "DDS": "RGBA"}
        if features.check("webp"):
            modes["WEBP"] = "RGBA"
        exif = Image.Exif()
        exif[0x0112] = 6
        for fmt, mode in modes.items():
            file = io.BytesIO()
            options = {"exif": exif} if fmt in ("JPEG", "PNG", "WEBP", "TIFF") else {}
            Image.fromarray(pixels).convert(mode).save(file, fmt, **options)
            found.append(file.getvalue())
        return found
    if name == "checkpoint":
        from safetensors.torch import save

        mark = "class_net.predict.conv_pw.weight"  # which tells a detector
        state = {"fpn.w": torch.ones(2, 3), mark: torch.zeros(1, dtype=torch.half)}
        found = [b"\1" + save(state)]
        for content in (state, {"state_dict": state, "epoch": 3, "args": argparse.Namespace(a=1)}):
            for zipped in (True, False):
                file = io.BytesIO()
                torch.save(content, file, _use_new_zipfile_serialization=zipped)
                found.append(b"\0" + file.getvalue())
        return found
    if name == "class_names":
        text = "cat\r\ndog\nbird\n\n"
        return [b"\3" + text.encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-32")]
    if name == "detections":
        row = '{"box": [1, 2, 3, 4.5], "score": 0.5, "label": 1, "name": "cat"}'
        return [f'{{"image_size": [4, 5], "detections": [{row}]}}'.encode()]
    # every decision the same, and all kinds of them
    return [bytes([i]) * 200 for i in (0, 1, 2, 3, 4, 60, 250)] + [
        np.random.default_rng(i).bytes(100) for i in range(40)
    ]


def fuzz(name: str, folder: Path, corpus: Path, flags: list[str]) -> None:
    """Fuzzes one target in this process, which atheris ends."""
    import atheris

    work = folder / "work"
    work.mkdir()
    os.environ["EDET_FUZZ_FOLDER"] = os.fspath(work)
    with atheris.instrument_imports(include=WATCHED):
        import targets
        from PIL import Image

        Image.init()  # all formats
    import torch
    import torch._dynamo  # torch imports it late, which tries the temporary folder

    torch.set_num_threads(1)
    target = targets.TARGETS[name]
    for i, data in enumerate(seeds(name)):
        target(data)  # imports what is imported late, before that is forbidden
        (corpus / f"seed-{i}").write_bytes(data)
    forbid(folder)
    atheris.Setup([sys.argv[0], *flags, os.fspath(corpus)], target)
    atheris.Fuzz()


def main() -> int:
    """Runs each target in a process of its own; the number of targets with a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("picture", "checkpoint", "class_names", "detections", *OPS)
    parser.add_argument("target", choices=(*names, "arguments", "all"))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer; the same, the same run")
    parser.add_argument("--corpus", type=Path, help="folder of inputs to begin with and to add to")
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # the process of one target
    options = parser.parse_args()
    chosen = names if options.target == "all" else (options.target,)
    if options.here is not None:
        corpus = options.here / "corpus" if options.corpus is None else options.corpus / chosen[0]
        corpus.mkdir(parents=True, exist_ok=True)
        flags = [
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            "-max_len=4096",
            "-timeout=20",
            "-rss_limit_mb=2048",
            f"-artifact_prefix={options.findings}/",
        ]
        fuzz(chosen[0], options.here, corpus, flags)
    options.findings.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in chosen:
        print(f"--- {name}", flush=True)
        arguments = [name, "--runs", str(options.runs), "--seed", str(options.seed)]
        arguments += ["--findings", os.fspath(options.findings.resolve())]
        if options.corpus is not None:
            arguments += ["--corpus", os.fspath(options.corpus.resolve())]
        with tempfile.TemporaryDirectory() as folder:
            run = [sys.executable, __file__, *arguments, "--here", folder]
            failed += subprocess.run(run, cwd=ROOT).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
