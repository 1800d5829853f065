"""A lab file is checked as a whole, and every error names file, line and field."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.lab.examples import DEMO
from isthmus.lab.labfile import NatType
from isthmus.lab.loader import LabFileError, check_name, load_lab_file, parse_lab_file
from isthmus.model.errors import UsageError

GOOD = """\
name: good
sites:
  - {name: cloud, public: true}
  - name: edge
    nat: {type: symmetric}
hosts:
  - {name: relay-host}
nodes:
  - {name: cloud-1, site: cloud}
  - {name: edge-1, site: edge}
pods:
  - {name: web, node: cloud-1, serve: {http: [80]}}
relays:
  - {name: relay-1, at: relay-host}
"""


def parse(text: str):
    return parse_lab_file(text, "lab.yaml", Path("/labs"))


def test_a_good_file_is_read():
    lab = parse(GOOD)
    assert (lab.name, lab.sites[1].nat.type, lab.pods[0].serve.http) == ("good", NatType.SYMMETRIC, (80,))


def test_manifests_are_relative_to_the_file():
    assert parse(GOOD + "manifests: things\n").manifests == "/labs/things"


def test_the_demos_file_is_good():
    lab = load_lab_file(DEMO)
    assert Path(lab.manifests).is_dir()


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("symmetric", "cubic"), 5, "sites[1].nat.type: invalid enum value 'cubic'"),
        (("nat: {type: symmetric}", "lan: 10.0.0.0/24"), 4, "sites[1]: a private site needs 'nat'"),
        (("public: true", "public: yes please"), 3, "sites[0].public: expected `bool`, got `str`"),
        (("site: edge", "site: moon"), 10, "nodes[1].site: there is no site 'moon'"),
        (("name: edge-1, site", "name: edge-1, sight: x, site"), 10, "nodes[1].sight: there is no such field"),
        (("name: edge-1", "name: cloud-1"), 10, "nodes[1].name: 'cloud-1' is already the name of nodes[0]"),
        (("name: edge-1", "name: Edge_1"), 10, "nodes[1].name: 'Edge_1' must be lower-case"),
        (("name: edge-1", "name: internet"), 10, "nodes[1].name: 'internet' is already the name of the network"),
        (("node: cloud-1", "node: cloud-9"), 12, "pods[0].node: there is no node 'cloud-9'"),
        (("serve: {http: [80]}", "address: 10.9.9.9"), 12, "pods[0].address: 10.9.9.9 is not a host of 10.244.1.0/24"),
        (("serve: {http: [80]}", "address: 10.244.1.1"), 12, "pods[0].address: 10.244.1.1 is the gateway"),
        (("serve:", "command: [true-ish], serve:"), 12, "pods[0].command: a pod either serves or runs a command"),
        (
            ("at: relay-host", "at: edge-1"),
            14,
            "relays[0].at: 'edge-1' is neither a host nor a node of the public site",
        ),
        (("at: relay-host", "on: relay-host"), 14, "the file: expected `str`"),
        (("name: good", "name: too-good"), 1, "name: 'too-good' cannot be a lab's name"),
        (("name: good", "name: good\nstore: link"), 2, "store: 'link' needs 'manifests'"),
        (("name: good", "name: good\ngenerate: [pods]"), 2, "generate: 'pods' needs 'nodes'"),
        (
            ("public: true}", "public: true}\n  - {name: sky, public: true}"),
            2,
            "sites: exactly one site must be public",
        ),
        (("type: symmetric", "type: symmetric, hairpin: true"), 5, "sites[1].nat.hairpin: a symmetric NAT"),
        (("sites:", "sites: ["), 3, "not YAML"),
    ],
)
def test_an_error_names_file_line_and_field(change, line, says):
    text = GOOD.replace(*change, 1)
    assert text != GOOD
    with pytest.raises(LabFileError) as caught:
        parse(text)
    assert says in caught.value.message
    if "on:" not in change[1]:  # a key that YAML reads as true has no path
        assert caught.value.message.startswith(f"lab.yaml:{line}: ")


def test_two_nodes_of_one_site_with_one_address_are_refused():
    text = GOOD.replace("  - {name: edge-1", "  - {name: edge-2, site: edge, address: 192.168.1.11}\n  - {name: edge-1")
    with pytest.raises(LabFileError, match="have the same address"):
        parse(text.replace("edge-1, site: edge", "edge-1, site: edge, address: 192.168.1.11"))


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(LabFileError, match=r"cannot read lab file .*: No such file"):
        load_lab_file(tmp_path / "none.yaml")


def test_what_is_no_text_or_no_file_is_no_lab_file(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\x00")
    for path, says in ((tmp_path / "binary", "not UTF-8"), (tmp_path, "Is a directory")):
        with pytest.raises(LabFileError, match=says):
            load_lab_file(path)


@pytest.mark.parametrize("name", ["", "a-b", "A", "waytoolonganame", "a/b", "..", "a\n"])
def test_a_name_that_could_meet_another_labs_is_refused(name):
    with pytest.raises(UsageError):
        check_name(name)


@given(st.integers(0, len(GOOD)), st.integers(0, 40), st.text(max_size=8))
def test_a_damaged_file_is_good_or_a_lab_file_error(at, length, text):
    try:
        parse(GOOD[:at] + text + GOOD[at + length :])
    except LabFileError as error:
        assert error.message.startswith("lab.yaml:")
