"""Which text a source is, how it reads, and what is refused."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ringspan.train.documents import (
    SNIFF_BYTES,
    check_text,
    find_source,
    fingerprint,
    read_documents,
    without_binaries,
)


def texts(path) -> list[str]:
    source, _ = without_binaries(find_source(None if path is None else str(path)))
    return [row["text"] for row in read_documents(source)]


def refusal(path) -> str:
    """What a user is told: one line, beginning with the field and its value."""
    with pytest.raises(ValueError) as error:
        check_text(find_source(str(path)))
    assert str(error.value).startswith(f"data.path={str(path)!r} ")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a", "über.md"])
def test_a_file_is_one_document_to_the_byte(tmp_path, name):
    content = "one\r\ntwo\n\n東京\x0c\u2028 end "
    (tmp_path / name).write_bytes(content.encode())
    assert texts(tmp_path / name) == [content]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path / "a.txt") == ["one"]


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert texts("~/a.txt") == ["one"]


def make_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_folder_is_its_text_files_in_path_order(tmp_path):
    png = b"\x89PNG\r\n\x1a\n\0\0"
    make_files(
        tmp_path, {"b/z.md": b"2", "b.txt": b"1", "c/d/e": b"3", "empty": b"", "a.png": png, "z.txt": b"\xe9t\xe9"}
    )
    make_files(tmp_path, {".git/config": b"x", ".hidden": b"x", "b/__pycache__/z.pyc": b"x"})
    (tmp_path / "broken").symlink_to("nowhere")
    source, skipped = without_binaries(find_source(str(tmp_path)))
    assert [row["text"] for row in read_documents(source) if row["text"]] == ["1", "2", "3"]
    assert skipped == ["a.png", "z.txt"]
    check_text(find_source(str(tmp_path)))


def test_names_that_are_not_utf8_are_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xe9.txt", "w") as file:
        file.write("one")
    assert texts(tmp_path) == ["one"]
    assert fingerprint(find_source(str(tmp_path)))


def test_jsonl_is_a_document_a_line(tmp_path):
    lines = b'{"text": "one\\ntwo", "id": 3}\r\n\n{"text": ""}\n{"text": "\\u6771\xe4\xba\xac\xe2\x80\xa8"}'
    (tmp_path / "a.jsonl").write_bytes(lines)
    assert texts(tmp_path / "a.jsonl") == ["one\ntwo", "", "東京\u2028"]
    assert texts(tmp_path) == ["one\ntwo", "", "東京\u2028"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"content": "x"}', '{"text": 3}', '{"text": null}', '{"text": "\\ud800"}']
)
def test_a_line_that_is_not_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line)
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2: a JSON object with a string under "text" is expected'):
        texts(tmp_path / "a.jsonl")


def test_what_is_not_there(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing.txt")
    assert "does not exist" in refusal("")


def test_what_is_empty(tmp_path):
    assert "is empty" in refusal(tmp_path)
    (tmp_path / "a.txt").touch()
    assert "is empty" in refusal(tmp_path)
    assert "is empty" in refusal(tmp_path / "a.txt")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"text\0", "has a NUL byte at byte 4"),
        ("text".encode("utf-16"), "has a NUL byte"),
        ("naïve".encode("latin-1"), "is not UTF-8 at byte 2"),
        (b"cut \xe6\x9d", "is not UTF-8 at byte 4"),
        (b"a" * (SNIFF_BYTES - 1) + b"\xff", f"is not UTF-8 at byte {SNIFF_BYTES - 1}"),
    ],
)
def test_what_is_not_text(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    assert f"is not text: a.txt {reason}" in refusal(tmp_path / "a.txt")
    assert f"is not text: a.txt {reason}" in refusal(tmp_path)


@pytest.mark.parametrize(("extra", "reason"), [(b"\xff", "is not UTF-8"), (b"\0", "has a NUL byte")])
def test_what_is_not_text_far_inside_is_found_when_it_is_read(tmp_path, extra, reason):
    (tmp_path / "a.txt").write_bytes(b"a" * 2 * SNIFF_BYTES + extra)
    for path in (tmp_path / "a.txt", tmp_path):
        check_text(find_source(str(path)))
        with pytest.raises(ValueError, match=f"is not text: a.txt {reason} at byte {2 * SNIFF_BYTES}"):
            texts(path)


def test_a_character_across_the_end_of_the_first_look_is_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * (SNIFF_BYTES - 1) + "東".encode())
    check_text(find_source(str(tmp_path / "a.txt")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"):
        check_text(find_source(str(tmp_path / "a.txt")))


def test_what_goes_away_while_it_is_read(tmp_path):
    make_files(tmp_path, {"a.txt": b"one", "b.txt": b"two"})
    source = find_source(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    for use in (fingerprint, check_text, without_binaries, lambda source: list(read_documents(source))):
        with pytest.raises(ValueError, match=r"b\.txt cannot be read: No such file"):
            use(source)


def test_fingerprint_sees_every_change(tmp_path):
    file = make_files(tmp_path, {"a.txt": b"one", "b.txt": b"two"}) / "a.txt"

    def now() -> str:
        return fingerprint(find_source(str(tmp_path)))

    seen = [now()]
    assert now() == seen[0]
    stat = file.stat()
    file.write_bytes(b"eno")  # same size, and the time set back, as archives and `cp -p` do
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.append(now())
    file.rename(tmp_path / "c.txt")
    seen.append(now())
    (tmp_path / "b.txt").unlink()
    seen.append(now())
    assert len(set(seen)) == 4


def library(root: Path, monkeypatch) -> Path:
    """A standard library of three documents, with what must be left out of it."""
    make_files(
        root, {"zlib_.py": b"z = 1\n", "pack/__init__.py": b"", "pack/b/c.py": b"c = 1\n", "pack/a.py": b"a = 1"}
    )
    make_files(root, {"pack-x.py": b"x = 1\n", "pack/data.txt": b"x", "LICENSE.txt": b"x", "_sysconfigdata_x.py": b"x"})
    for folder in ("test", "pack/tests", "idlelib/idle_test", "site-packages/numpy", "config-3-x", "__pycache__"):
        make_files(root, {f"{folder}/x.py": b"\xff"})
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(root)}.__getitem__)
    return root


def test_standard_library_joins_packages(tmp_path, monkeypatch):
    library(tmp_path, monkeypatch)
    package = "# pack/__init__.py\n\n# pack/a.py\na = 1\n# pack/b/c.py\nc = 1\n"
    assert texts(None) == ["# pack-x.py\nx = 1\n", package, "# zlib_.py\nz = 1\n"]


def test_a_python_without_its_source_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    with pytest.raises(ValueError, match=r"data.path=null .*no source files in .*; give data.path a text file"):
        find_source(None)


def test_this_python_has_a_library():
    source = find_source(None)
    files = list(source.files())
    assert {"argparse.py", "asyncio/base_events.py", "email/message.py"} <= set(files)
    assert not {"test", "tests", "site-packages"}.intersection(part for file in files for part in file.split("/"))
    assert sum((source.root / file).stat().st_size for file in files) > 5e6  # bytes; 11 to 12e6 in 3.11 to 3.13
    check_text(source)


def test_nothing_is_left_in_the_caches_of_datasets(tmp_path, monkeypatch):
    """Nor is the network asked. In a fresh process, as the library picks its folders when it is imported."""
    make_files(tmp_path, {"text/a.txt": b"one"})
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from ringspan.train.documents import find_source, read_documents
print([row["text"] for row in read_documents(find_source(sys.argv[1]))])
"""
    home = tmp_path / "home"
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text")],
        env={**variables, "HOME": str(home), "USE_TORCH": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "['one']\n"
    assert run.stderr == ""
    assert list(home.iterdir()) == []
