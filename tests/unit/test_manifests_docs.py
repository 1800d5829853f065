"""docs/manifests.md says what the code does."""

import re
from pathlib import Path

import pytest

from isthmus.model import labels
from isthmus.model.findings import Code
from isthmus.model.manifests import KINDS, MAX_TEXT_BYTES, parse_text
from isthmus.model.yamltext import MAX_ALIASED_NODES, MAX_DEPTH
from isthmus.plan.optout import LEFT_TO_THE_CLUSTER
from isthmus.plan.virtual import GRACE_S
from isthmus.store.files import SUFFIXES

PAGE = (Path(__file__).parents[2] / "docs" / "manifests.md").read_text()


def test_every_label_and_annotation_is_documented_with_its_values() -> None:
    for name in (labels.PROXY, labels.NOPROXY, labels.PROXY_NAME, labels.SITE, labels.ZONE, labels.SERVICE_NAME):
        assert f"`{name}" in PAGE
    for name, values in labels.SERVICE_ANNOTATIONS.items():
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}`")]
        assert re.findall(r"`([^`]+)`", row.split("|")[2]) == list(values)
    for namespace, name in LEFT_TO_THE_CLUSTER:
        assert f"`{namespace}/{name}`" in PAGE


def test_no_label_is_documented_that_the_code_does_not_know() -> None:
    known = {labels.PROXY, labels.SITE, *labels.SERVICE_ANNOTATIONS}
    assert set(re.findall(r"isthmus\.dev/[a-z-]+", PAGE)) == known


def test_the_codes_of_findings_are_the_documented_ones() -> None:
    documented = re.findall(r"^\| `((?:manifest|store|virtual|service)\.[a-z-]+)`", PAGE, re.MULTILINE)
    assert documented == [code.value for code in Code]


def test_the_kinds_are_the_documented_ones() -> None:
    assert re.findall(r"^\| `(\S+)` `(\w+)` \|", PAGE, re.MULTILINE) == list(KINDS)


@pytest.mark.parametrize(
    "text",
    [
        f"{MAX_TEXT_BYTES >> 20} MiB a file",
        f"nested {MAX_DEPTH} deep",
        f"{MAX_ALIASED_NODES:,} values repeated by aliases",
        *(f"`*{suffix}`" for suffix in SUFFIXES),
    ],
)
def test_limits_are_the_documented_ones(text: str) -> None:
    assert text in PAGE


def test_the_grace_is_the_documented_one() -> None:
    assert GRACE_S == 600
    assert "ten minutes longer" in PAGE


def test_the_example_is_read_without_a_finding() -> None:
    example = PAGE.split("```yaml\n")[1].split("```")[0]
    parsed = parse_text(example)
    assert len(parsed) == 3
    assert not [finding for one in parsed for finding in one.findings]


def test_the_finding_shown_is_the_one_that_is_made() -> None:
    example = (
        PAGE.split("```yaml\n")[1].split("```")[0].replace("  annotations:\n    isthmus.dev/prefer: same-site\n", "")
    )
    broken = example.replace("port: 80\n", "port: eighty\n", 1)
    (finding,) = parse_text(broken, "shop/web.yaml")[0].findings
    assert str(finding) in PAGE
