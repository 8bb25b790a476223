"""CSV and TSV: every cell stays the text that it is, and what is no table is one line."""

import gzip

import pytest

from qwen_lit.data.faults import DataError
from qwen_lit.data.prepare import Task, prepare, read_report
from qwen_lit.data.sources import Source, read_rows

HEADER = "instruction,output\n"


def rows(path):
    return [(row.source.rpartition(":")[2], row.content) for row in read_rows(path)]


def test_cells_stay_as_they_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbfinstruction,output,input\r\n"
        b'007,NA,\r\n"two\nlines","say ""hi"", 1,5",null\r\n\r\n'
        b" 2026-01-01 ,1e3,\xe5\xa5\xbd\r\n"
    )
    assert rows(path) == [
        ("2", {"instruction": "007", "output": "NA"}),
        ("3", {"instruction": "two\nlines", "output": 'say "hi", 1,5', "input": "null"}),
        ("6", {"instruction": " 2026-01-01 ", "output": "1e3", "input": "好"}),
    ]


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.TSV"])
def test_tabs_and_compression_go_by_the_name(name, tmp_path):
    raw = b"instruction\toutput\nQ, \tA\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert rows(tmp_path / name) == [("2", {"instruction": "Q, ", "output": "A"})]


def test_a_record_of_other_cells_is_a_fault_by_its_first_line(tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + '"a\nb",c\nd\ne,f,g\nh,i\nj,\n')
    report = read_report(prepare(Task([Source(str(path))], {"max_length": 64}, {}), tokenizer, tmp_path / "cache"))
    assert report.rows == 5 and report.examples == 2
    assert [(one.source, one.kind) for one in report.first] == [
        (f"{path}:4", "cells"),
        (f"{path}:5", "cells"),
        (f"{path}:7", "missing field"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEADER.encode() + "续写下文,他说你好\n".encode("gb18030"), "not UTF-8 in line 2, likely gb18030; in Excel"),
        ("instruction,output\n续写,他说\n".encode("utf-16"), "likely utf-16"),
        (b"instruction;output\na;b\n", "has one column, 'instruction;output': its cells are separated by semicolons"),
        (b"instruction\toutput\na\tb\n", "separated by tabs, not by commas; save it as .tsv"),
        ("你好,您好\n再见,再会\n".encode(), "its first line names no column that is read .你好, 您好.; put the names"),
        (b"output,output\na,b\n", "two columns are named 'output'"),
        (b"", "is empty; its first line names the columns"),
        (HEADER.encode() + b'a,b\n"c,d\n', "a.csv:3: cannot be read as a record .*close its quotation"),
    ],
)
def test_what_is_no_table_is_one_line(content, said, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def test_columns_are_mapped_for_one_source_alone(tokenizer, tmp_path):
    for name, header in (("a.csv", "q,a"), ("b.csv", "a,q")):
        (tmp_path / name).write_text(f"{header}\nasked,answered\n")
    first = Source(str(tmp_path / "a.csv"), columns={"instruction": "q", "output": "a"})
    second = Source(str(tmp_path / "b.csv"), columns={"instruction": "a", "output": "q"})
    report = read_report(prepare(Task([first, second], {"max_length": 64}, {}), tokenizer, tmp_path / "cache"))
    assert report.examples == 2 and report.formats == {"alpaca": 2} and not report.absent()


def test_rows_of_empty_cells_as_spreadsheets_leave_them_are_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\na,b\n,\n , \n")
    assert rows(path) == [("2", {"instruction": "a", "output": "b"})]
