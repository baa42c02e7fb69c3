"""Files that appear whole or not at all: what stands at the target is not turned into a file."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

import edet
from edet.files import check_target, replacing

FOUND = edet.Detections(
    torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), (4, 4)
)


def write(path, text="new", **options):
    with replacing(path, **options) as temporary:
        temporary.write_text(text)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    """Where what is written in place waits; it must be empty at the end."""
    folder = tmp_path.parent / (tmp_path.name + "-tmp")
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert names(folder) == []


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_appears_when_the_block_ends(tmp_path, sync):
    target = tmp_path / "x.json"
    with replacing(target, sync=sync) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == tmp_path
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["x.json"]


def test_nothing_is_left_when_the_block_fails(tmp_path):
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert names(tmp_path) == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def reading(path):
    """A thread that reads ``path`` to its end, and the list its content goes to."""
    read = []
    thread = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, read


def test_a_fifo_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link.json").symlink_to("pipe")
    for path in (pipe, tmp_path / "link.json"):
        thread, read = reading(pipe)
        write(path)
        thread.join(10)
        assert read == [b"new"]
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["link.json", "pipe"]


def test_a_device_stays_one(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.open("wb").close()
    except PermissionError:  # no right to make or to use devices here
        null.unlink(missing_ok=True)
        null.symlink_to("/dev/null")
    write(null)
    assert stat.S_ISCHR(null.stat().st_mode)
    (tmp_path / "link").symlink_to(null)
    write(tmp_path / "link")
    assert stat.S_ISCHR(null.stat().st_mode)
    assert names(tmp_path) == ["link", "null"]


def test_a_full_device_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        write("/dev/full")


@pytest.mark.parametrize("way", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", "link"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_goes_on_where_it_is(tmp_path, way, kind):
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "import sys; from edet.files import replacing; print('before', flush=True)\n"
        "with replacing(sys.argv[1]) as temporary: temporary.write_text('new\\n')\n"
        "print('after')"
    )
    run = [sys.executable, "-c", code, way]
    if kind == "pipe":
        out = subprocess.run(run, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
    else:
        with (tmp_path / "out").open("wb") as stream:
            subprocess.run(run, cwd=tmp_path, stdout=stream, check=True)
        out = (tmp_path / "out").read_bytes()
    assert out == b"before\nnew\nafter\n"
    assert os.readlink("/dev/stdout").startswith("/proc/")


def test_a_descriptor_that_cannot_be_written(tmp_path):
    (tmp_path / "x").touch()
    with (tmp_path / "x").open("rb") as stream, pytest.raises(OSError, match="Bad file desc"):
        check_target(f"/dev/fd/{stream.fileno()}")


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "real").write_text("old")
    (tmp_path / "once.json").symlink_to("store/real")
    (tmp_path / "twice.json").symlink_to("once.json")
    (tmp_path / "dangling.json").symlink_to("store/coming")
    for name, real in (("once.json", "real"), ("twice.json", "real"), ("dangling.json", "coming")):
        with replacing(tmp_path / name) as temporary:
            assert temporary.suffix == ".json"  # the format of what was asked for
            temporary.write_text(name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "store" / real).read_text() == name
        assert not (tmp_path / "store" / real).is_symlink()
    assert names(tmp_path / "store") == ["coming", "real"]
    assert names(tmp_path) == ["dangling.json", "once.json", "store", "twice.json"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_folder").symlink_to("folder")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("none/x.json")
    for name, number in (
        ("folder", errno.EISDIR),
        ("to_folder", errno.EISDIR),
        (".", errno.EISDIR),
        ("file/x.json", errno.ENOTDIR),
        ("none/x.json", errno.ENOENT),
        ("lost", errno.ENOENT),
        ("loop", errno.ELOOP),
        ("n" * 256, errno.ENAMETOOLONG),
    ):
        with pytest.raises(OSError) as caught:
            check_target(tmp_path / name)
        assert caught.value.errno == number, name
        with pytest.raises(OSError) as caught, replacing(tmp_path / name):
            pytest.fail("the work was begun")
        assert caught.value.errno == number, name
    assert names(tmp_path) == ["file", "folder", "loop", "lost", "to_folder"]


@pytest.mark.parametrize("name", ["n" * 250 + ".json", "ü" * 125 + ".json", "x." + "y" * 253])
def test_the_longest_names(tmp_path, name):
    assert len(os.fsencode(name)) == 255
    write(tmp_path / name)
    write(tmp_path / name, "newer")
    assert (tmp_path / name).read_text() == "newer"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_permissions_stay(tmp_path, mode):
    target = tmp_path / "x.json"
    target.touch()
    target.chmod(mode)
    with replacing(target) as temporary:
        assert temporary.stat().st_mode & 0o077 == 0  # never more readable than the target
        temporary.write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == mode
    if os.geteuid() == 0:
        os.chown(target, 1234, 4321)
        write(target)
        assert (target.stat().st_uid, target.stat().st_gid) == (1234, 4321)
        assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    write(tmp_path / "ours")
    (tmp_path / "any").write_text("new")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_what_a_user_may_not_write(monkeypatch):
    """A read-only file stays; a writable one is written, though its folder may not be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "waiting").mkdir(mode=0o777)
        (folder / "waiting").chmod(0o777)
        monkeypatch.setattr("tempfile.tempdir", str(folder / "waiting"))
        for name, mode in (("mine", 0o666), ("theirs", 0o644)):
            (folder / name).write_text("old")
            (folder / name).chmod(mode)
        inode = (folder / "mine").stat().st_ino
        os.seteuid(65534)
        try:
            write(folder / "mine")
            for name in ("theirs", "another"):
                with pytest.raises(PermissionError):
                    check_target(folder / name)
        finally:
            os.seteuid(0)
        assert (folder / "mine").read_text() == "new"
        assert (folder / "mine").stat().st_ino == inode
        assert (folder / "theirs").read_text() == "old"
        assert names(folder) == ["mine", "theirs", "waiting"]
        assert names(folder / "waiting") == []


def test_a_file_that_cannot_be_renamed_over_is_written(tmp_path, monkeypatch):
    """As a single file that is mounted into a container."""
    target = tmp_path / "mounted.json"
    target.write_text("a longer old content")

    def busy(self, other):
        raise OSError(errno.EBUSY, "Device or resource busy", str(self), None, str(other))

    monkeypatch.setattr("pathlib.Path.replace", busy)
    write(target)
    assert target.read_text() == "new"
    assert names(tmp_path) == ["mounted.json"]


def test_two_writers_do_not_meet(tmp_path):
    with replacing(tmp_path / "x.json") as one, replacing(tmp_path / "x.json") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x.json").read_text() == "one"
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints_through_a_link_and_a_fifo(tmp_path, suffix):
    model = torch.nn.Linear(2, 2)
    (tmp_path / f"latest{suffix}").symlink_to(f"epoch-1{suffix}")
    edet.save_checkpoint(model, tmp_path / f"latest{suffix}")
    assert (tmp_path / f"latest{suffix}").is_symlink()
    whole = (tmp_path / f"epoch-1{suffix}").read_bytes()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    thread, read = reading(tmp_path / f"pipe{suffix}")
    edet.save_checkpoint(model, tmp_path / f"pipe{suffix}")
    thread.join(10)
    assert len(read[0]) == len(whole) > 100


def test_json_of_detections(tmp_path):
    (tmp_path / "link.json").symlink_to("real.json")
    FOUND.to_json(tmp_path / "link.json")
    assert edet.Detections.from_json((tmp_path / "real.json").read_text()).image_size == (4, 4)
    assert (tmp_path / "link.json").is_symlink()
    with pytest.raises(IsADirectoryError):
        FOUND.to_json(tmp_path)
