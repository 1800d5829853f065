"""docs/lab.md lists exactly the fields of the lab file, with their defaults; docs/commands/lab.md every command."""

import re
from pathlib import Path

import msgspec
import pytest
import typer
import yaml

from isthmus.cli.lab import app
from isthmus.lab import labfile
from isthmus.lab.examples import DEMO
from isthmus.lab.loader import load_lab_file
from isthmus.lab.topology import Role, plan_topology

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {
    "The file": labfile.LabFile,
    "`sites`": labfile.Site,
    "`nat`": labfile.Nat,
    "`nodes`": labfile.Node,
    "`pods`": labfile.Pod,
    "`serve`": labfile.Serve,
    "`hosts`": labfile.Host,
    "`relays`": labfile.Relay,
    "`agent`": labfile.AgentOverrides,
    "`relay`": labfile.RelayOverrides,
}


def rows(heading: str) -> dict[str, str]:
    """{field: default as it is written} of the table under ``heading``."""
    section = (DOCS / "lab.md").read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    return dict(re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", section, re.MULTILINE))


@pytest.mark.parametrize(("heading", "struct"), SECTIONS.items(), ids=[each.__name__ for each in SECTIONS.values()])
def test_every_field_is_documented_and_nothing_else(heading, struct):
    assert set(rows(heading)) == {field.encode_name for field in msgspec.structs.fields(struct)}


@pytest.mark.parametrize(("heading", "struct"), SECTIONS.items(), ids=[each.__name__ for each in SECTIONS.values()])
def test_a_default_that_is_a_plain_value_is_the_documented_one(heading, struct):
    for field in msgspec.structs.fields(struct):
        written = rows(heading)[field.encode_name]
        if isinstance(field.default, bool):
            assert written == f"`{str(field.default).lower()}`", field.encode_name
        elif isinstance(field.default, int | float | str) and field.default != "":
            assert written == f"`{field.default}`", field.encode_name
        elif field.default is msgspec.NODEFAULT:
            assert written == "required", field.encode_name


def test_every_command_is_documented():
    text = (DOCS / "commands" / "lab.md").read_text()
    commands = typer.main.get_group(app).commands
    assert set(re.findall(r"^## isthmus lab (\w+)", text, re.MULTILINE)) == set(commands)


def test_the_types_of_nat_are_documented_with_their_behaviours():
    text = (DOCS / "lab.md").read_text()
    for kind in labfile.NatType:
        assert f"`{kind}`" in text
        assert re.search(rf"^\| {kind.replace('-cone', ' cone')} \| .*dependent \|", text, re.MULTILINE)


@pytest.mark.parametrize(
    "file", sorted((DOCS.parent / "deploy" / "lab").glob("*/lab.yaml")), ids=lambda path: path.parent.name
)
def test_every_example_is_a_good_lab_file(file):
    assert Path(load_lab_file(file).manifests).is_dir()


def test_every_endpoint_of_the_demos_manifests_is_a_pod_of_the_lab():
    lab = load_lab_file(DEMO)
    pods = {(place.node, place.addresses[0]) for place in plan_topology(lab).of(Role.POD)}
    documents = [each for path in DEMO.parent.glob("manifests/*.yaml") for each in yaml.safe_load_all(path.read_text())]
    slices = [each for each in documents if each["kind"] == "EndpointSlice"]
    endpoints = {(end["nodeName"], end["addresses"][0]) for each in slices for end in each["endpoints"]}
    assert endpoints
    assert endpoints <= pods
    nodes = {
        each["metadata"]["name"]: each["status"]["addresses"][0]["address"]
        for each in documents
        if each["kind"] == "Node"
    }
    assert nodes == {place.label: place.addresses[0] for place in plan_topology(lab).of(Role.NODE)}
