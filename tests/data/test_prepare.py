"""The cache is never stale, whatever the file's form and however many processes make it."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qwen_lit.data.faults import DataError
from qwen_lit.data.prepare import Task, cache_key, prepare, raise_if_too_many_faults, read_report
from qwen_lit.data.rows import Rows
from qwen_lit.data.sources import Source, read_rows


def task(*paths, fields=None, **options):
    return Task([Source(str(path)) for path in paths], {"max_length": 256, **options}, fields or {})


def zstd(raw):
    return pyarrow.Codec("zstd").compress(raw).to_pybytes()


def write(path, rows, newline="\n"):
    path.write_bytes(newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + newline.encode())
    return path


@pytest.mark.parametrize(
    "form", ["jsonl", "bom", "crlf", "no newline", "gz", "zst", "array", "parquet", "blank lines"]
)
def test_every_form_of_a_file_gives_the_same_rows(form, rows, tokenizer, tmp_path):
    plain = write(tmp_path / "plain.jsonl", rows)
    raw = plain.read_bytes()
    made = {
        "jsonl": ("a.jsonl", raw),
        "bom": ("a.jsonl", b"\xef\xbb\xbf" + raw),
        "crlf": ("a.jsonl", raw.replace(b"\n", b"\r\n")),
        "no newline": ("a.jsonl", raw[:-1]),
        "gz": ("a.jsonl.gz", gzip.compress(raw)),
        "zst": ("a.jsonl.zst", zstd(raw)),
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
    raw = json.dumps(rows).encode()
    packed = {"a.jsonl.gz": gzip.compress(raw), "a.jsonl.zst": zstd(raw)}
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
        raise_if_too_many_faults(report, "error", 0.1)
    text = str(caught.value)
    assert "13 of 14 rows are faulty (bad JSON: 12, missing field: 1)" in text and "… and 3 more" in text
    assert f"{path}:10" in text and f"{path}:11" not in text
    with pytest.raises(DataError, match="more than data.max_bad_share 0.1"):
        raise_if_too_many_faults(report, "skip", 0.1)
    raise_if_too_many_faults(report, "skip", 0.95)


GOOD = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', "a.json:2: something follows the JSON array"),
        ("[]\n" + json.dumps(GOOD), "a.json:2: something follows"),
        ('[{"a": 1} {"a": 2}]', "a comma or ] is missing"),
        ('[{"a": 1},,{"a": 2}]', "breaks off"),
        ('[{"a": 1},\n]', "a.json:2: the JSON array breaks off"),
        ('[{"a": 1}', "a comma or ] is missing"),
    ],
)
def test_a_json_array_is_read_to_its_end_or_refused(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert message in str(caught.value)


def test_rows_of_an_array_on_one_line_have_places_of_their_own(tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {"instruction": "a"}, {**GOOD, "output": "c"}]))
    report = read_report(prepare(task(path), tokenizer, tmp_path / "cache"))
    assert report.examples == 2 and report.faults == {"missing field": 1}
    assert [fault.source for fault in report.first] == [f"{path}:1[2]"]


@pytest.mark.parametrize("share", [0.1, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_ends_early_is_refused(kind, share, tmp_path):
    import random

    draw = random.Random(0)
    raw = "".join(json.dumps({**GOOD, "output": str(draw.random())}) + "\n" for _ in range(5000)).encode()
    packed = zstd(raw) if kind == "zst" else gzip.compress(raw)
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed)
    assert len(list(read_rows(path))) == 5000
    path.write_bytes(packed * 2)
    assert len(list(read_rows(path))) == 10_000
    path.write_bytes(packed[: int(len(packed) * share)])
    with pytest.raises(DataError, match=rf"a\.jsonl\.{kind}: cannot be read \(Truncated compressed stream"):
        list(read_rows(path))


def test_rows_that_no_library_takes_are_faults_of_their_own(tokenizer, tmp_path):
    path, asked = tmp_path / "a.jsonl", {"role": "user", "content": "a"}
    call = {"role": "assistant", "tool_calls": [{"name": "\ud83d\n", "arguments": "{bad"}]}
    deep = {"messages": [asked, {"role": "assistant", "content": "b"}], "tools": [{"type": "function", "x": "DEEP"}]}
    rows = [deep, {"messages": [asked, call]}, {**GOOD, "instruction": "\ud83d"}, GOOD]
    path.write_text("\n".join(map(json.dumps, rows)).replace('"DEEP"', "[" * 600 + "]" * 600))
    folder = prepare(task(path), tokenizer, tmp_path / "cache")
    report = read_report(folder)
    assert report.examples == 1 and report.faults == {"bad JSON": 1, "bad tool call": 1, "lone surrogate": 1}
    assert len((folder / "rows.log").read_text().splitlines()) == 3


def test_a_date_among_tools_is_one_fault(tokenizer, tmp_path):
    import datetime

    path = tmp_path / "a.parquet"
    tools = [[{"name": "f", "since": datetime.date(2020, 1, 1)}], None]
    rows = {"instruction": ["a", "b"], "output": ["c", "d"], "tools": tools}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    report = read_report(prepare(task(path), tokenizer, tmp_path / "cache"))
    assert report.examples == 1 and report.faults == {"wrong type": 1}


def test_a_folder_with_brackets_in_its_name_is_found(rows, tokenizer, tmp_path):
    folder = tmp_path / "data [v1]"
    folder.mkdir()
    write(folder / "a.jsonl", rows)
    assert read_report(prepare(task(folder), tokenizer, tmp_path / "cache")).examples == len(rows)
