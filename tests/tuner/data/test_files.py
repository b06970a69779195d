"""Records from files: every kind, plain and with gzip, and what is no such file."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from pyloss.errors import FormatError
from pyloss.tuner.data.files import kind, read_records, split_files

RECORDS = [
    {"prompt": "one", "completion": 'he said "yes", twice'},
    {"prompt": "two\nlines", "completion": "naïve; \u2028"},
]


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, the first without its size, as streams and pzstd write them.
        compressor, half = zstandard.ZstdCompressor(), len(data) // 2
        stream = compressor.compressobj()
        first = stream.compress(data[:half]) + stream.flush()
        path.write_bytes(first + compressor.compress(data[half:]))
        return path
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(data)
    return path


def table(path, delimiter):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return write(path, out.getvalue())


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_every_kind_gives_the_same_records(tmp_path, end):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    files = [
        write(tmp_path / f"a.jsonl{end}", lines),
        write(tmp_path / f"a.json{end}", json.dumps(RECORDS, indent=2)),
        table(tmp_path / f"a.csv{end}", ","),
        table(tmp_path / f"b.csv{end}", ";"),
        table(tmp_path / f"a.tsv{end}", "\t"),
    ]
    for file in files:
        assert read_records(file) == RECORDS
    text = write(tmp_path / f"a.txt{end}", "\ufefffirst\r\nblock\r\n\r\n \n\nsecond")
    found = read_records(text)
    assert found == [{"text": "first\nblock"}, {"text": "second"}]
    assert found.where(1) == f"{text}, record 2 (line 6)"


def test_places_of_records(tmp_path):
    file = write(tmp_path / "a.csv", 'prompt,completion\n"two\nlines",b\n\nc,d\n')
    records = read_records(file)
    assert records.where(1) == f"{file}, record 2 (line 5)" or records.where(1).endswith("(line 4)")
    assert records.select([1]) == [{"prompt": "c", "completion": "d"}]
    assert records.select([1]).where(0) == records.where(1)


def test_a_column_of_row_numbers_and_empty_tools_are_left_out(tmp_path):
    file = write(tmp_path / "a.csv", ",prompt,completion,tools\n0,a,b,\n1,c,d,[]\n")
    assert read_records(file) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d", "tools": "[]"},
    ]


def test_a_long_field(tmp_path):
    before = csv.field_size_limit()
    file = write(tmp_path / "a.csv", f"text\n{'a' * 200_000}\n")
    assert len(read_records(file)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.csv.gz"])
def test_an_empty_file_has_no_records(tmp_path, name):
    assert read_records(write(tmp_path / name, "")) == []
    assert read_records(write(tmp_path / name, "\n\n")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"data": []}', "holds one value with the keys 'data', and must hold a list"),
        ("a.json", "3", "holds one value, and must hold a list"),
        ("a.json", '[{"text": "a"}, 3]', "record 2: is a number, and must be an object"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "one object per line is named .jsonl"),
        ("a.json", '[{"text": "a"},\n{]', "not valid JSON: .* at line 2, column 2"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8: byte 0xff"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"record 2 \(line 3\): has 3 fields, and the header has 2"),
        ("a.csv", "a,a\n1,2\n", "the header: names 'a' twice"),
        ("a.csv", 'a,b\n"1,2\n', r"record 1 \(line 2\): is not valid CSV"),
        ("a.tsv", b"a\tb\n1\t\xff\n", "line 2: is not UTF-8: byte 0xff"),
        ("a.txt", "a".encode("utf-16"), "UTF-16 text, and must be UTF-8"),
        ("a.xml", "<a/>", "unknown kind; allowed are files .jsonl, .json, .csv, .tsv or .txt"),
        ("a.jsonl", '{"text": "a"}\n[]', "line 2: is a list, and must be an object"),
    ],
)
def test_what_is_not_of_its_kind_names_file_and_record(tmp_path, name, content, message):
    with pytest.raises(FormatError, match=f"{name}: .*{message}"):
        read_records(write(tmp_path / name, content))


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    for content in (whole[:-9], b"plain text", whole[:20] + b"\0\0\0" + whole[23:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(FormatError, match=r"a.jsonl.gz: is not a whole gzip file"):
            read_records(tmp_path / "a.jsonl.gz")


def test_the_files_of_a_folder_are_of_one_kind(tmp_path):
    splits = [("train",), ("valid", "validation")]
    assert split_files(tmp_path, splits) == [None, None]
    csv_file, packed = tmp_path / "train.csv", tmp_path / "validation.jsonl.gz"
    csv_file.touch()
    assert split_files(tmp_path, splits) == [csv_file, None]
    packed.touch()
    assert split_files(tmp_path, splits) == [None, packed]
    assert kind(packed) == ".jsonl" and kind(tmp_path / "a.gz") is None and kind(tmp_path) is None


def test_damaged_and_unreadable_zst(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl.zst", "".join(json.dumps(r) + "\n" for r in RECORDS))
    whole = file.read_bytes()
    for raw in (whole[:-3], whole[:30], b"no zstd", whole + b"more"):
        file.write_bytes(raw)
        with pytest.raises(FormatError, match="is not a whole zstd file"):
            read_records(file)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(ImportError, match=r"pip install 'pyloss\[zstd\]'"):
        read_records(file)


def test_parquet_gives_the_records_that_were_written(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "c", "name": "x"}], "tools": "[]"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    records = read_records(tmp_path / "a.parquet")
    assert records[0] == rows[0] and records[0]["messages"][0].keys() == {"role", "content"}
    assert records.where(1) == f"{tmp_path / 'a.parquet'}, record 2"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(FormatError, match=r"b.parquet: is not Parquet that can be read"):
        read_records(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'pyloss\[parquet\]'"):
        read_records(tmp_path / "a.parquet")


@pytest.mark.parametrize("text", [json.dumps(RECORDS), "\n".join(map(json.dumps, RECORDS))])
def test_standard_input_is_lines_or_a_list(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    records = read_records(Path("-"))
    assert records == RECORDS and records.where(0).startswith("standard input, ")


def test_standard_input_that_gives_no_records(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": 1')))
    with pytest.raises(FormatError, match="standard input: line 1: is not valid JSON"):
        read_records(Path("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input, and that is a terminal or closed"):
        read_records(Path("-"))
