"""The documentation names every option, setting, field of the API and error code, and nothing that is not there."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import msgspec
import pytest
import yaml

import isthmus
from isthmus.cli.main import COMMANDS, load
from isthmus.explain.advice import ADVICE
from isthmus.explain.check import Check
from isthmus.explain.doctor import CHECKS, Result
from isthmus.explain.hop import Report
from isthmus.explain.trace import Trace
from isthmus.model.errors import IsthmusError
from isthmus.model.findings import Code
from isthmus.model.settings import AgentSettings, RelaySettings
from isthmus.wire import local

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROW = re.compile(r"^\| (.+?) \| (.*?) \|(?: (.*?) \|)?$", re.MULTILINE)
CODE = re.compile(r"(?:agent|data|dns|identity|interception|kernel|lab|link|manifest|proxy|relay|settings|state|store)"
                  r"(?:\.[a-z][a-z-]+)+|(?:uninstall|virtual|wire|worker)(?:\.[a-z][a-z-]+)+")  # fmt: skip
FILES = (".json", ".msgpack", ".sock", ".yaml")


def section(page: str, heading: str) -> str:
    text = (DOCS / page).read_text()
    match = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"{page} has no section “{heading}”"
    return match[2]


def names_in(text: str, column: int = 1) -> list[str]:
    return [name for row in ROW.finditer(text) for name in re.findall(r"`([^`]+)`", row[column])]


# Settings


def fields_of(kind: type, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for field in msgspec.structs.fields(kind):
        default = field.default
        if isinstance(default, msgspec.Struct):
            found |= fields_of(type(default), f"{prefix}{field.encode_name}.")
        else:
            found[prefix + field.encode_name] = default
    return found


def documented(part: str) -> dict[str, str]:
    return {row[1].strip("`"): row[2] for row in ROW.finditer(part) if row[1].startswith("`")}


@pytest.mark.parametrize(("heading", "kind"), [("## The agent", AgentSettings), ("## The relay", RelaySettings)])
def test_every_setting_is_documented_with_its_default(heading, kind):
    page = (DOCS / "settings.md").read_text()
    part = page[page.index(heading) :].split("\n## ")[0 if heading != "## " else 1]
    rows = documented(part if part.startswith("##") else heading + part)
    expected = fields_of(kind)
    if kind is AgentSettings:
        expected |= {"relays.name": msgspec.NODEFAULT, "relays.address": msgspec.NODEFAULT, "relays.site": ""}
    assert set(rows) == set(expected)
    for name, default in expected.items():
        if rows[name] == "none, must be set":
            assert default in ("", msgspec.NODEFAULT)
        else:
            told = yaml.safe_load(rows[name].strip("`"))
            assert told == (list(default) if isinstance(default, tuple) else default), name


# The local API


STRUCTS = [
    *(local.Status, local.StoreStatus, local.InterceptionStatus, local.IdentityStatus, local.WorkerStatus),
    *(local.RelayStatus, local.PeerStatus, local.TroubleRow),
    *(local.ServiceRow, local.EndpointRow, local.LinkRow, local.RuleRow),
]


@pytest.mark.parametrize("kind", STRUCTS)
def test_every_field_of_the_api_is_documented_in_its_order(kind):
    told = names_in(section("api.md", kind.__name__))
    assert tuple(told) == kind.__struct_fields__


def test_every_question_is_documented():
    assert names_in(section("api.md", "The protocol")) == ["what", *local.QUESTIONS]


@pytest.mark.parametrize(("page", "kind"), [("trace", Trace), ("trace", Report)])
def test_every_field_of_a_trace_is_documented(page, kind):
    told = names_in(section(f"commands/{page}.md", "JSON"))
    assert set(kind.__struct_fields__) <= set(told)
    assert set(told) == {*Trace.__struct_fields__, *Report.__struct_fields__}


def test_every_check_of_doctor_is_documented_with_what_it_depends_on():
    rows = list(ROW.finditer((DOCS / "commands/doctor.md").read_text()))
    told = [(row[1].strip("`"), tuple(re.findall(r"`([^`]+)`", row[3] or ""))) for row in rows if row[1][:1] == "`"]
    assert told == [(check.code, check.depends_on) for check in CHECKS]
    text = section("commands/doctor.md", "JSON")
    assert all(f"`{field}`" in text for field in Result.__struct_fields__)
    assert isinstance(CHECKS[0], Check)


# Errors


def modules() -> list[str]:
    found = pkgutil.walk_packages(isthmus.__path__, "isthmus.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def errors() -> set[type[IsthmusError]]:
    for name in modules():
        importlib.import_module(name)

    def below(kind: type[IsthmusError]) -> set[type[IsthmusError]]:
        return {kind}.union(*(below(one) for one in kind.__subclasses__()))

    return {kind for kind in below(IsthmusError) if kind.__module__.startswith("isthmus.")}


def literals() -> set[str]:
    """Every text in the code that looks like a code: troubles are not classes."""
    settings = set(fields_of(AgentSettings))
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                found.add(node.value)
    return {text for text in found if text not in settings and not text.endswith(FILES)}


def documented_codes() -> list[str]:
    return names_in((DOCS / "errors.md").read_text())


def test_every_error_code_is_documented_once_and_no_other():
    told = documented_codes()
    assert len(told) == len(set(told))
    made = {kind.code for kind in errors()} | {code.value for code in Code} | literals()
    assert set(told) == made | {"system", "internal"}


def test_every_error_class_has_a_code_of_its_own_and_says_what_it_means():
    kinds = errors()
    own = [kind.code for kind in kinds if "code" in vars(kind)]
    assert len(own) == len(set(own)), sorted(code for code in own if own.count(code) > 1)
    assert all(kind.__doc__ for kind in kinds)


def test_advice_is_for_codes_that_exist():
    assert set(ADVICE) <= set(documented_codes())


def test_every_problem_of_the_store_has_advice():
    notes = {Code.UNKNOWN_KIND, Code.NOT_SERVED}
    assert {code.value for code in Code if code not in notes} <= set(ADVICE)


# Commands


def options(command) -> list[list[str]]:
    """The spellings of each option, those of sub-commands included."""
    found = [one.opts for one in command.params if one.opts[0].startswith("-") and "--help" not in one.opts]
    return found + [one for inner in getattr(command, "commands", {}).values() for one in options(inner)]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_a_page_that_names_its_options(name):
    page = (DOCS / "commands" / f"{name}.md").read_text()
    assert re.match(rf"# `?isthmus {name}`?\n", page)
    words = set(re.findall(r"(?<![\w-])--?\w[\w-]*", page))
    assert [spellings for spellings in options(load(name)) if not words & set(spellings)] == []


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", text):
        assert ((DOCS / page).parent / target).exists(), target
