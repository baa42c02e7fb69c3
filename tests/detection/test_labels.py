"""Names of classes: from text files as any editor writes them, each error naming its file."""

import codecs

import pytest

from edet.detection.labels import label_map, read_class_names

NAMES = ["cat", "dog", "bird"]


@pytest.mark.parametrize(
    "data",
    [
        b"cat\ndog\nbird",
        b"cat\ndog\nbird\n",
        b"cat\ndog\nbird\n\n",
        b"cat\ndog\nbird\n \t\n\n\n",
        b"cat\r\ndog\r\nbird\r\n",
        b"cat\r\ndog\r\nbird\r\n\r\n",
        b"cat\rdog\rbird\r",
        b"cat \n\tdog\nbird",
        b"\xef\xbb\xbfcat\r\ndog\r\nbird\r\n",
        "cat\r\ndog\r\nbird\r\n".encode("utf-16"),
        b"\xfe\xff" + "cat\ndog\nbird\n".encode("utf-16-be"),
        "cat\ndog\nbird\n".encode("utf-32"),
    ],
)
def test_however_an_editor_writes_it(tmp_path, data):
    (tmp_path / "names.txt").write_bytes(data)
    assert read_class_names(tmp_path / "names.txt", 3) == NAMES


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_script(tmp_path, monkeypatch, encoding):
    names = ["café", "猫", "кот", "قط", "😀", "line\u2028in\x0bside\x0c\x85"]
    (tmp_path / "names.txt").write_bytes("\n".join(names).encode(encoding))
    monkeypatch.setenv("LC_ALL", "C")
    assert read_class_names(tmp_path / "names.txt", 6) == [n.strip() for n in names]


def test_an_empty_line_between_names_is_a_name(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\nbird\n")
    assert read_class_names(tmp_path / "names.txt", 3) == ["cat", "", "bird"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must hold 3 names, one a line, got 0"),
        (b"cat\ndog\n", "must hold 3 names, one a line, got 2"),
        (b"cat\ndog\nbird\nfish\n", "must hold 3 names, one a line, got 4"),
        (b"dog\ncaf\xe9\nbird\n", "must be text in UTF-8, got the byte 0xe9 in line 2"),
        (b"cat\ndog\nbird\xff", "must be text in UTF-8, got the byte 0xff in line 3"),
        (b"c\0a\0t\0\n\0", "must be text in UTF-8, got a zero byte"),
        (b"\xff\xfec", "must be text in UTF-8, got the byte 0x63"),
        (b"n" * (1 << 24) + b"n", "must be a text file of class names, got more than 16 MiB"),
    ],
)
def test_errors_name_the_file(tmp_path, data, message):
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_class_names(tmp_path / "names.txt", 3)
    assert str(caught.value).startswith(f"{tmp_path / 'names.txt'} {message}")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('[\n"cat", "dog"\n]\n', "JSON"),
        ('{"1": "cat",\n"2": "dog",\n"3": "bird"}', "JSON"),
        ("0: cat\n1: dog\n2: bird\n", "numbered lines ('0: cat')"),
        ("1 cat\n2 dog\n3 bird\n", "numbered lines ('1 cat')"),
        ("1,cat\n2,dog\n3,bird\n", "numbered lines ('1,cat')"),
        ("item {\nid: 1 name: 'cat'\n}\n", "a label map in protobuf's text format"),
        ("names:\n- cat\n- dog\n", "YAML"),
        ("nc: 1\nnames: [cat]\n\n# end", "YAML"),
        ("[" * 100_000, "1"),
        ("0: cat\n2: dog\n5: bird\n", "numbered lines ('0: cat')"),
        ("1. cat\n2. dog\n3. bird\n", "numbered lines ('1. cat')"),
        ("0) cat\n1) dog\n2) bird\n", "numbered lines ('0) cat')"),
        ("id,name\n1,cat\n2,dog\n", "numbered lines ('1,cat')"),
        ("cat,0\ndog,1\nbird,2\n", "numbered lines ('cat,0')"),
        ("- cat\n- dog\n- bird\n", "a list in YAML ('- cat')"),
        ('"cat"\n"dog"\n"bird"\n', "names in quotes or with commas ('\"cat\"')"),
        ("'cat',\n'dog',\n'bird'\n", "names in quotes or with commas (\"'cat',\")"),
        ("cat,\ndog,\nbird,\n", "names in quotes or with commas ('cat,')"),
    ],
)
def test_another_kind_of_file_is_not_taken_for_names(tmp_path, text, kind):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=r"must hold 3 names, one a line, got ") as caught:
        read_class_names(tmp_path / "names.txt", 3)
    assert str(caught.value).endswith(f"got {kind}")


@pytest.mark.parametrize(
    "text",
    [
        *("7 up\n2 cats\n3 dogs", "12\n13\n14", "[x]\n{y}\nitem", "1 euro\n2 euro\n5 euro"),
        *("1.5 mm\n2.5 mm\n3.5 mm", "v1.0\nv1.1\nv1.2", "1:00\n2:00\n3:00", "-a\n- b\nc"),
        *("'90s car\n'60s car\ncar", "cat, wild\ncat, tame\ndog"),
    ],
)
def test_names_may_hold_numbers_and_brackets(tmp_path, text):
    (tmp_path / "names.txt").write_text(text)
    assert read_class_names(tmp_path / "names.txt", 3) == text.split("\n")


def test_a_mark_inside_of_joined_files_is_no_part_of_a_name(tmp_path):
    data = b"".join(codecs.BOM_UTF8 + name for name in (b"cat\n", b"dog\n", b"bird\n"))
    (tmp_path / "names.txt").write_bytes(data)
    assert read_class_names(tmp_path / "names.txt", 3) == ["cat", "dog", "bird"]


def test_a_device_without_end_is_refused():
    with pytest.raises(ValueError, match=r"/dev/zero must be a text file .*more than 16 MiB"):
        read_class_names("/dev/zero", 3)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_class_names(tmp_path / "none.txt", 3)
    with pytest.raises(IsADirectoryError):
        read_class_names(tmp_path, 3)


def test_names_by_label():
    assert label_map(NAMES, 3) == {1: "cat", 2: "dog", 3: "bird"}
    assert label_map({2: "dog"}, 3) == {2: "dog"}
