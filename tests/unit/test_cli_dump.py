"""``isthmus dump``: what is listed, in which order and form; JSON fields are a promise."""

import json

import pytest
import yaml
from answering_agent import LISTS, answering
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cli.dump import LISTINGS, What
from isthmus.cli.main import run
from isthmus.cli.output import Column, fitting, sort_rows
from isthmus.wire.local import EndpointRow, LinkRow, RuleRow, ServiceRow

FIELDS = {
    "services": "namespace name kind addresses ports endpoints ready balance state origin",
    "endpoints": "namespace name node address visible_address ports distance ready resting connections pod",
    "links": "node path address relay state streams bytes_out bytes_in age_s tls",
    "rules": "name hook match action comment present",
}


@pytest.fixture
def dump(tmp_path, capsys):
    def run_it(*arguments, answers=LISTS):
        with answering(tmp_path, answers):
            code = run(["dump", *arguments, "--run-directory", str(tmp_path)])
        return code, *capsys.readouterr()

    return run_it


@pytest.mark.parametrize("what", list(What))
def test_json_has_the_documented_fields_in_their_order(dump, what):
    code, out, _ = dump(what, "-o", "json")
    assert code == 0
    assert [list(row) for row in json.loads(out)] == [FIELDS[what].split()] * 2


@pytest.mark.parametrize("what", list(What))
def test_yaml_says_the_same_as_json(dump, what):
    assert yaml.safe_load(dump(what, "-o", "yaml")[1]) == json.loads(dump(what, "-o", "json")[1])


@pytest.mark.parametrize("what", list(What))
def test_a_table_in_a_pipe_has_one_line_a_row_no_colour_and_nothing_cut(dump, what):
    _, out, _ = dump(what)
    lines = out.splitlines()
    assert len(lines) == 3 and "\x1b" not in out and "…" not in out
    for row in LISTS[what]:
        assert any(all(column.cell(row) in line for column in LISTINGS[what].columns) for line in lines)


@pytest.mark.parametrize("what", list(What))
def test_an_empty_table_says_so(dump, what):
    code, out, _ = dump(what, answers={what.value: []})
    assert code == 0 and out.startswith("No ")


def test_an_empty_list_in_json_is_a_list(dump):
    assert dump("links", "-o", "json", answers={"links": []})[1] == "[]\n"


def test_rows_come_by_name_unless_told_otherwise(dump):
    names = [row["name"] for row in json.loads(dump("services", "-o", "json")[1])]
    assert names == ["kube-dns", "web"]


@pytest.mark.parametrize("key", ["bytes_in", "bytes-in", "BYTES_IN"])
def test_rows_are_sorted_by_any_field_and_numbers_as_numbers(dump, key):
    rows = json.loads(dump("links", "-o", "json", "--sort-by", key)[1])
    assert [row["bytes_in"] for row in rows] == [20, 1024]


def test_rules_keep_the_kernels_order(dump):
    rows = json.loads(dump("rules", "-o", "json")[1])
    assert [row["name"] for row in rows] == [row.name for row in LISTS["rules"]]


def test_a_wrong_sort_key_lists_the_columns_before_anything_is_asked(capsys, tmp_path):
    assert run(["dump", "links", "--sort-by", "size", "--run-directory", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "“size”" in error and FIELDS["links"].replace(" ", ", ") in error


@pytest.mark.parametrize("row", [ServiceRow, EndpointRow, LinkRow, RuleRow])
def test_every_field_can_be_sorted_by(row):
    rows = LISTS[next(what for what, listing in LISTINGS.items() if listing.row is row)]
    for field in row.__struct_fields__:
        assert len(sort_rows(rows, row, field)) == len(rows)


@given(
    st.lists(st.tuples(st.text(max_size=30), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(1, 120),
)
def test_a_narrow_terminal_leaves_out_the_most_spare_columns_first(specs, width):
    columns = [Column(heading, lambda row: "x", spare=spare) for heading, spare in specs]
    shown = fitting(LISTS["links"], columns, width)
    left_out = [column for column in columns if column not in shown]
    assert all(column.spare > 0 for column in left_out)
    kept = max((column.spare for column in shown), default=0)
    assert all(column.spare >= kept for column in left_out)
