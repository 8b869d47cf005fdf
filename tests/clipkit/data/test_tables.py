import csv
import io
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.data.tables import read_table
from clipkit.errors import DataError

COLUMNS = ("image", "caption")


def table(tmp_path, content, encoding="utf-8"):
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


def pairs(path):
    return [(row.values["image"], row.values["caption"]) for row in read_table(path, COLUMNS)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_as_spreadsheet_programs_write_it(tmp_path, encoding, separator, end):
    lines = [f"Image {separator}CAPTION", f"0.jpg{separator}a café", f'1.jpg{separator}"a, b; c"', separator, ""]
    text = end.join(lines)
    data = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding)
    assert pairs(table(tmp_path, data)) == [("0.jpg", "a café"), ("1.jpg", "a, b; c")]


def test_empty_lines_before_the_header_and_lines_in_it(tmp_path):
    (row,) = read_table(table(tmp_path, '\n\nimage;"size\n(in, cm)";caption\n0.jpg;3;a\n'), COLUMNS)
    assert (row.number, row.values) == (4, {"image": "0.jpg", "caption": "a"})


def test_a_separator_that_is_named_in_the_first_line(tmp_path):
    assert pairs(table(tmp_path, "sep=;\r\nimage;caption\r\n0.jpg;a, b\r\n")) == [("0.jpg", "a, b")]


def test_the_other_separator_may_stand_in_the_header(tmp_path):
    assert pairs(table(tmp_path, "id;image;caption;size, cm\n1;0.jpg;a cat;3\n")) == [("0.jpg", "a cat")]


def test_fields_of_a_megabyte_newlines_and_nul(tmp_path):
    limit, long = csv.field_size_limit(), "x" * 2_000_000
    assert pairs(table(tmp_path, f'image,caption\n0.jpg,{long}\n1.jpg,"two\nlines"\n2.jpg,a\0b\n')) == [
        ("0.jpg", long),
        ("1.jpg", "two\nlines"),
        ("2.jpg", "a b"),
    ]
    assert csv.field_size_limit() == limit  # which is everybody's


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption\n0.jpg,a cat, sitting\n1.jpg,a dog\n", "row 2 has 3 where the header has 2 fields; put quotes"),
        (
            "image,caption\n0.jpg,a\n1.jpg\n2.jpg,b,c\n",
            "row 3 has 1 where the header has 2 fields, and 1 more are wrong",
        ),
        ("image,caption,size\n0.jpg,a,1\n1.jpg,b\n", "row 3 has 2 where the header has 3 fields"),
        ("file,text\n", "has the columns file, text; it needs image,caption"),
        ("image\ncaption\n", "has the columns image; it needs image,caption"),
        ("", r"has the columns \(none\); it needs"),
        ("image,caption,Caption\n", "two columns 'caption'"),
        ('image,caption\n0.jpg,"never closed\n1.jpg,b\n', "not a readable CSV: .*, in line 3"),
        ('image,caption\n0.jpg,"a" b\n', "not a readable CSV: "),
        ("image,caption\n0.jpg,caf\xe9\n".encode("latin-1"), "is not text in UTF-8"),
        (b"\xff\xfei\0", "has the columns i; it needs"),
        (b"\xff\xfei", "is not text in UTF-16"),
    ],
)
def test_what_would_be_cut_or_guessed_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as found:
        pairs(table(tmp_path, content))
    assert "\n" not in str(found.value)


def test_empty_fields_at_the_end_of_a_row_cut_nothing(tmp_path):
    assert pairs(table(tmp_path, "image,caption,\n0.jpg,a,,\n,,,\n1.jpg,,\n")) == [("0.jpg", "a"), ("1.jpg", "")]


def test_rows_are_counted_as_spreadsheets_do(tmp_path):
    rows = read_table(table(tmp_path, 'image,caption\n0.jpg,"a\nb"\n\n1.jpg,c\n'), COLUMNS)
    assert [row.number for row in rows] == [2, 4]


def test_a_pipe_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("image,caption\n0.jpg,a\n",))
    writer.start()
    assert pairs(pipe) == [("0.jpg", "a")]
    writer.join()


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory):
    return tmp_path_factory.mktemp("t") / "t.csv"


@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1)] * 2)))
def test_what_a_csv_writer_wrote_is_read(anywhere, rows):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([COLUMNS, *rows])
    anywhere.write_bytes(buffer.getvalue().encode())
    assert pairs(anywhere) == [(a.strip(), b.strip()) for a, b in rows if a.strip() or b.strip()]
