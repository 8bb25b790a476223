"""The cache is never stale, whatever the file's form and however many processes make it."""

import gzip
import json

import numpy as np
import pytest

from qwen_lit.data.prepare import Task, cache_key, judge, prepare, read_report
from qwen_lit.data.records import DataError
from qwen_lit.data.rows import Rows
from qwen_lit.data.sources import Source, read_rows


def task(*paths, fields=None, **options):
    return Task([Source(str(path)) for path in paths], {"max_length": 256, **options}, fields or {})


def write(path, rows, newline="\n"):
    path.write_bytes(newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + newline.encode())
    return path


@pytest.mark.parametrize(
    "form", ["jsonl", "bom", "crlf", "no newline", "gz", "zst", "array", "parquet", "blank lines"]
)
def test_every_form_of_a_file_gives_the_same_rows(form, rows, tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    plain = write(tmp_path / "plain.jsonl", rows)
    raw = plain.read_bytes()
    made = {
        "jsonl": ("a.jsonl", raw),
        "bom": ("a.jsonl", b"\xef\xbb\xbf" + raw),
        "crlf": ("a.jsonl", raw.replace(b"\n", b"\r\n")),
        "no newline": ("a.jsonl", raw[:-1]),
        "gz": ("a.jsonl.gz", gzip.compress(raw)),
        "zst": ("a.jsonl.zst", zstandard.ZstdCompressor().compress(raw)),
        "array": ("a.json", b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode()),
        "parquet": ("a.parquet", b""),
        "blank lines": ("a.jsonl", raw.replace(b"\n", b"\n\n")),
    }
    name, content = made[form]
    path = tmp_path / name
    path.write_bytes(content)
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    wanted = Rows(prepare(task(plain), tokenizer, tmp_path / "cache"))
    found = Rows(prepare(task(path), tokenizer, tmp_path / "cache"))
    assert len(found) == len(wanted) == len(rows)
    for number in range(len(rows)):
        assert np.array_equal(found[number][0], wanted[number][0])
        assert np.array_equal(found[number][1], wanted[number][1])
    assert found.column("hash").tolist() == wanted.column("hash").tolist()


def test_a_line_separator_inside_a_string_does_not_end_the_line(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a\u2028b\x85c", "output": "d\u2029e"}] * 2)
    assert [row.source for row in read_rows(path)] == [f"{path}:1", f"{path}:2"]
    assert read_report(prepare(task(path), tokenizer, tmp_path / "cache")).examples == 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json"])
def test_a_damaged_file_is_one_error_that_names_it(name, rows, tokenizer, tmp_path):
    import zstandard

    raw = json.dumps(rows).encode()
    packed = {"a.jsonl.gz": gzip.compress(raw), "a.jsonl.zst": zstandard.ZstdCompressor().compress(raw)}
    (tmp_path / name).write_bytes(packed.get(name, raw)[:200] if name != "a.parquet" else b"PAR1")
    if name == "a.jsonl.zst":
        (tmp_path / name).write_bytes(b"not zstd at all")
    with pytest.raises(DataError, match=name):
        prepare(task(tmp_path / name), tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_key_changes_with_content_tokenizer_template_and_options_and_with_nothing_else(rows, tokenizer, tmp_path):
    import copy

    path = write(tmp_path / "a.jsonl", rows)
    base = cache_key(task(path), tokenizer)
    path.touch()
    assert cache_key(task(path), tokenizer) == base
    keys = {base}
    for options in ({"train_on": "last"}, {"overlong": "drop"}, {"control_tokens": "escape"}, {"expand_turns": "off"}):
        keys.add(cache_key(task(path, **options), tokenizer))
    keys.add(cache_key(task(path, max_length=255), tokenizer))
    keys.add(cache_key(task(path, fields={"output": "answer"}), tokenizer))
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template + " "
    keys.add(cache_key(task(path), other))
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    keys.add(cache_key(task(path), other))
    write(path, [{**rows[0], "output": "x"}, *rows[1:]])
    keys.add(cache_key(task(path), tokenizer))
    assert len(keys) == 10


def test_several_processes_write_what_one_does(rows, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "output": f"{n}"} for n in range(130) for row in rows])
    one = prepare(task(path), tokenizer, tmp_path / "one", processes=1)
    two = prepare(task(path), tokenizer, tmp_path / "two", processes=2)
    assert (one / "rows.arrow").read_bytes() == (two / "rows.arrow").read_bytes()
    assert read_report(one) == read_report(two)


def test_a_second_preparation_reads_the_first(rows, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", rows)
    folder = prepare(task(path), tokenizer, tmp_path / "cache")
    before = (folder / "rows.arrow").stat().st_mtime_ns
    assert prepare(task(path), tokenizer, tmp_path / "cache") == folder
    assert (folder / "rows.arrow").stat().st_mtime_ns == before


def test_faulty_rows_stop_the_run_with_the_first_ten_and_the_counts_by_kind(rows, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("nonsense\n" * 12 + '{"instruction": "a"}\n' + json.dumps(rows[0]) + "\n")
    report = read_report(prepare(task(path), tokenizer, tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        judge(report, "error", 0.1)
    text = str(caught.value)
    assert "13 of 14 rows are faulty (bad JSON: 12, missing field: 1)" in text and "… and 3 more" in text
    assert f"{path}:10" in text and f"{path}:11" not in text
    with pytest.raises(DataError, match="more than data.max_bad_share 0.1"):
        judge(report, "skip", 0.1)
    judge(report, "skip", 0.95)
