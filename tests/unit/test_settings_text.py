"""A settings file that is wrong says where, by file, line and field."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.model.settings_text import SettingsError, parse_agent_settings, parse_relay_settings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node: a\nrelays:\n  - name: r\n    address: nowhere\n", "agent.yaml:4: relays[0].address"),
        ("node: a\nintercept:\n  port: many\n", "agent.yaml:3: intercept.port"),
        ("node: a\nintercept:\n  prot: 1\n", "agent.yaml:3: intercept.prot: there is no such field"),
        ("node: a\nvirtual-cidrs: [10.0.0.1/8]\n", "agent.yaml:2: virtual-cidrs[0]"),
        ("node: a\n\nlink-port: 70000\n", "agent.yaml:3: link-port"),
        ("site: x\n", "agent.yaml:1: node"),
        ("node: [\n", "agent.yaml:2: not YAML"),
        ("node: a\ndns:\n  upstreams: [not-an-address]\n", "agent.yaml:3: dns.upstreams[0]"),
        ("- node\n", "agent.yaml:1: the file"),
        ("node: 2001-99-99\n", "agent.yaml:1: cannot be read"),
    ],
)
def test_the_error_names_file_line_and_field(text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_agent_settings(text, "agent.yaml")
    assert str(caught.value).startswith(says)


def test_defaults_are_those_that_users_of_the_field_know() -> None:
    settings = parse_agent_settings("node: edge-1", "agent.yaml")
    assert settings.intercept.address_v4 == "169.254.96.16"
    assert (settings.intercept.port, settings.link_port) == (40001, 20006)
    assert (settings.dns.domain, settings.dns.ttl_s) == ("cluster.local", 30)
    assert parse_relay_settings("", "relay.yaml").listen.endswith(":20004")


@given(st.text(max_size=200))
def test_any_text_is_settings_or_a_settings_error(text: str) -> None:
    try:
        parse_agent_settings(text, "agent.yaml")
    except SettingsError as error:
        assert str(error).startswith("agent.yaml:")
