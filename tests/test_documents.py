"""Which text a source is, how it reads, and what is refused."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ringspan.train import reading
from ringspan.train.documents import SNIFF_BYTES, find_source
from ringspan.train.reading import READ_BYTES, Columns, Segment, Skipped


def read(path, refuse: bool = False, **columns) -> tuple[list[str], list[str]]:
    """(texts of all documents, names of what was left out)"""
    source = find_source(None if path is None else str(path))
    skipped = Skipped(source.setting, refuse)
    found, open_ = [], ""
    for segment in source.segments(Columns(**columns), skipped):
        open_ += segment.content
        if segment.last:
            found.append(open_)
            open_ = ""
    assert open_ == ""
    assert len(skipped.names) == skipped.count
    return found, skipped.names


def texts(path) -> list[str]:
    return read(path)[0]


def refusal(path) -> str:
    """What a user is told: one line, beginning with the field and its value."""
    with pytest.raises(ValueError) as error:
        find_source(str(path)).check()
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
    assert read(tmp_path) == (["1", "2", "3"], ["a.png", "empty", "z.txt"])
    find_source(str(tmp_path)).check()


def test_names_that_are_not_utf8_are_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xe9.txt", "w") as file:
        file.write("one")
    assert texts(tmp_path) == ["one"]
    assert find_source(str(tmp_path)).fingerprint()


def test_jsonl_is_a_document_a_line(tmp_path):
    lines = b'{"text": "one\\ntwo", "id": 3}\r\n\n{"text": ""}\n{"text": "\\u6771\xe4\xba\xac\xe2\x80\xa8"}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    for path in (tmp_path / "a.jsonl", tmp_path):
        assert read(path) == (["one\ntwo", "東京\u2028"], ["a.jsonl line 3"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", 'has no "text" (data.column)'),
        ("3", 'has no "text" (data.column)'),
        ('{"content": "x", "id": 1}', 'has no "text" (data.column); it has content, id'),
        ('{"text": 3}', 'has no text, token ids or chat turns under "text", but int'),
        ('{"text": null}', 'has no text, token ids or chat turns under "text", but NoneType'),
        ('{"text": "x\\ud800"}', "has half of a surrogate pair at character 1"),
        ('{"text": [1, -1]}', 'has something else than token ids under "text"'),
        ('{"text": [1, 2.0]}', 'has something else than token ids under "text"'),
        ('{"text": [{"role": "user"}]}', 'has a chat turn without text under "role" and "content"'),
        ('{"text": ""}', "is empty"),
        ('{"text": []}', "is empty"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + '\n{"text": "two"}', errors="surrogateescape")
    assert read(tmp_path / "a.jsonl") == (["one", "two"], ["a.jsonl line 2"])
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.jsonl", refuse=True)
    assert f": a.jsonl line 2 {reason}; mend or remove it" in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    ("extra", "reason"), [(b"\xff", "is not UTF-8"), (b"\0", "has a NUL byte"), (b"\xe6", "is not")]
)
@pytest.mark.parametrize("size", [2 * SNIFF_BYTES, READ_BYTES, READ_BYTES + 1, 2 * READ_BYTES + 5])
def test_what_is_not_text_far_inside_is_found_when_it_is_read(tmp_path, size, extra, reason):
    (tmp_path / "a.txt").write_bytes(b"a" * size + extra)
    for path in (tmp_path / "a.txt", tmp_path):
        find_source(str(path)).check()
        assert read(path) == ([], ["a.txt"])
        with pytest.raises(ValueError, match=rf"a.txt {reason}.* at byte {size}; mend or remove it"):
            read(path, refuse=True)


@pytest.mark.parametrize("line", ["東京 is a city\n", "東" * 70, "\n"])
def test_a_long_text_comes_in_segments_that_end_with_lines(tmp_path, monkeypatch, line):
    monkeypatch.setattr(reading, "SEGMENT_CHARACTERS", 100)
    monkeypatch.setattr(reading, "READ_BYTES", 251)  # cuts characters
    text = line * 99 + "end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    segments = list(find_source(str(tmp_path)).segments(Columns(), Skipped("x")))
    assert "".join(segment.content for segment in segments) == text
    assert [segment.last for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert max(len(segment.content) for segment in segments) <= 100
    assert len(segments) <= 2 * -(-len(text) // 100)
    if "\n" in line:
        assert all(segment.content.endswith("\n") for segment in segments[:-1])


def test_a_character_across_the_end_of_the_first_look_is_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * (SNIFF_BYTES - 1) + "東".encode())
    find_source(str(tmp_path / "a.txt")).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"):
        find_source(str(tmp_path / "a.txt")).check()


def test_what_goes_away_while_it_is_read(tmp_path):
    make_files(tmp_path, {"a.txt": b"one", "b.txt": b"two"})
    source = find_source(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    for use in (source.fingerprint, source.check, lambda: list(source.segments(Columns(), Skipped("x")))):
        with pytest.raises(ValueError, match=r"b\.txt cannot be read: No such file"):
            use()


def test_fingerprint_sees_every_change(tmp_path):
    file = make_files(tmp_path, {"a.txt": b"one", "b.txt": b"two"}) / "a.txt"

    def now() -> str:
        return find_source(str(tmp_path)).fingerprint()

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
    source.check()


TABLE_ROWS = ["one", "two\nlines", "東京"]


def write_tables(folder: Path, columns: dict) -> None:
    """a.parquet in several row groups, and b/ as Dataset.save_to_disk leaves it."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=2)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "b"))
    datasets.enable_progress_bars()


def test_parquet_and_arrow_are_a_document_a_row(tmp_path):
    write_tables(tmp_path / "text", {"body": TABLE_ROWS, "id": [1, 2, 3]})
    for name in ("a.parquet", "b", "b/data-00000-of-00001.arrow"):
        assert read(tmp_path / "text" / name, content="body") == (TABLE_ROWS, [])
    assert read(tmp_path / "text/a.parquet") == ([], [f"a.parquet row {n}" for n in range(3)])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("keep", [0, 9, 0.5, 0.98])
def test_a_damaged_table_is_named_and_what_was_whole_is_kept(tmp_path, name, keep):
    write_tables(tmp_path / "t", {"text": ["some text"] * 3000})
    whole = (tmp_path / "t" / ("a.parquet" if name == "a.parquet" else "b/data-00000-of-00001.arrow")).read_bytes()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    (tmp_path / "text" / "z.txt").write_text("z")
    found, names = read(tmp_path / "text")
    assert found[-1] == "z"
    assert set(found[:-1]) <= {"some text"}
    assert names == [name]
    with pytest.raises(ValueError, match=rf"{name} (is empty|is damaged: [\d,]+ rows could be read, then: )") as error:
        read(tmp_path / "text", refuse=True)
    assert "\n" not in str(error.value)


def test_token_ids_masks_and_chat_turns(tmp_path):
    def segments(row: dict, **columns) -> list[Segment]:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        skipped = Skipped("x", refuse=True)
        return list(find_source(str(tmp_path / "a.jsonl")).segments(Columns(**columns), skipped))

    (ids,) = segments({"ids": [5, 0, 7], "m": [0, 1, 1]}, content="ids", mask="m")
    assert (ids.content.tolist(), ids.trained.tolist(), ids.last) == ([5, 0, 7], [False, True, True], True)
    (ids,) = segments({"ids": [5, 0]}, content="ids")
    assert (ids.content.tolist(), ids.trained.tolist()) == ([5, 0], [True, True])
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
    assert segments({"text": turns}) == [
        ("<|user|>\n", False, False),
        ("why?\n", False, False),
        ("<|assistant|>\n", False, False),
        ("so.\n", True, True),
    ]
    for bad in (
        {"text": [1]},
        {"text": [1], "m": 3},
        {"text": [1], "m": [1, 1]},
        {"text": [1], "m": [2]},
        {"text": [1], "m": [[1]]},
    ):
        with pytest.raises(ValueError, match=r"a\.jsonl line 1 has (a mask of|no list under)"):
            segments(bad, mask="m")


@pytest.mark.parametrize("streaming", [True, False])
def test_the_hub_without_a_network_is_one_line(streaming, monkeypatch):
    source = find_source("hub:nobody/nothing:small:validation", streaming)
    assert (source.name, source.config, source.split) == ("nobody/nothing", "small", "validation")
    with pytest.raises(
        ValueError, match=r"data\.path='hub:nobody/nothing:small:validation': the hub does not give it"
    ) as e:
        source.check()
    assert "\n" not in str(e.value)
    assert len({find_source(f"hub:{name}").fingerprint() for name in ("a/b", "a/b:c", "a/b:c:d", "a/b::d")}) == 4
    for bad in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(ValueError, match="give hub:OWNER/NAME"):
            find_source(bad)


def test_rows_of_the_hub_are_read_through_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "one"}, {"text": 3}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hub:a/b") == (["one", "two"], ["row 1"])
    assert asked == [(("a/b", None), {"split": "train", "streaming": True})]


def test_nothing_is_left_in_the_caches_of_datasets(tmp_path, monkeypatch):
    """Nor is the network asked. In a fresh process, as the library picks its folders when it is imported."""
    write_tables(tmp_path / "text", {"text": ["one"]})
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from ringspan.train.documents import find_source
from ringspan.train.reading import Columns, Skipped
print([one.content for one in find_source(sys.argv[1]).segments(Columns(), Skipped(""))])
"""
    home = tmp_path / "home"
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text")],
        env={**variables, "HOME": str(home), "USE_TORCH": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "['one', 'one']\n"
    assert run.stderr == ""
    assert list(home.iterdir()) == []
