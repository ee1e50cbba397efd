"""Coercion: nothing is lost on the way from text to a key's type, or it is a mistake."""

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.config.coerce import coerce, expand
from launcher.config.problem import Mistake
from launcher.config.source import parse_word

finite = st.floats(allow_nan=False, allow_infinity=False)


def from_text(text: str, default: object) -> Any:
    return coerce(yaml.ScalarNode("tag:yaml.org,2002:str", text), default)


def from_yaml(text: str, default: object, element: object = None) -> Any:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None
    return coerce(node, default, element)


@given(st.booleans() | st.integers() | finite | st.text())
@example(-0.0)
def test_the_text_of_a_value_gives_the_value_back(value: object) -> None:
    assert repr(from_text(str(value), value)) == repr(value)


@given(
    st.lists(st.booleans(), min_size=1)
    | st.lists(st.integers(), min_size=1)
    | st.lists(finite, min_size=1)
    | st.lists(st.text(), min_size=1)
    | st.lists(st.lists(st.integers(), min_size=1), min_size=1)
)
def test_lists_and_tuples_survive_yaml(value: list[object]) -> None:
    assert from_yaml(yaml.safe_dump(value), value) == value
    assert from_yaml(yaml.safe_dump(value), tuple(value)) == tuple(value)


@given(st.none() | st.booleans() | st.integers() | finite | st.lists(st.text() | st.integers()))
def test_a_default_of_none_takes_any_plain_value(value: object) -> None:
    assert repr(from_yaml(yaml.safe_dump(value), None)) == repr(value)


@given(st.integers())
def test_a_whole_number_is_a_float_only_where_exact(value: int) -> None:
    if abs(value) < 2**1000 and int(float(value)) == value:
        assert repr(from_text(str(value), 0.0)) == repr(float(value))
    else:
        with pytest.raises(Mistake):
            from_text(str(value), 0.0)


@given(finite)
def test_a_number_is_whole_only_where_nothing_is_cut_off(value: float) -> None:
    if value.is_integer() and abs(value) < 2**53:
        assert repr(from_text(str(value), 0)) == repr(int(value))
    elif not value.is_integer():
        with pytest.raises(Mistake, match="fraction would be lost"):
            from_text(str(value), 0)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("1_000", 0, 1000),
        ("1e3", 0, 1000),
        ("0x10", 0, 16),
        ("yes", False, True),
        ("OFF", True, False),
        ("0", True, False),
        ("1", "", "1"),
        ("1.10", "", "1.10"),
        ("yes", "", "yes"),
        ("2024-01-01", "", "2024-01-01"),
        ("2024-01-01", None, "2024-01-01"),
        ('"20ep"', "", "20ep"),
        ('"5"', 0, 5),
        ("[1, 2.0]", (0.5, 0.5), (1.0, 2.0)),
        ("[1e-3, 2]", [1, 0.5], [1e-3, 2.0]),
        ("[5ep, 8ep]", [], ["5ep", "8ep"]),
    ],
)
def test_yaml_lands_in_the_type_of_the_default(text: str, default: object, value: object) -> None:
    result = from_yaml(text, default, element="" if default == [] else None)
    assert repr(result) == repr(value)  # 1 == 1.0 == True


@pytest.mark.parametrize(
    ("text", "default", "says"),
    [
        ("1e999999999", 0, "too large"),
        ("010", 0, "leading zero"),
        ("true", 0, "not a whole number"),
        ("true", 0.0, "not a number"),
        ("abc", 0.0, "not a number"),
        ("nan", 0.0, "not a finite number"),
        (".inf", 0.0, "not a finite number"),
        ("1e999", 0.0, "not a finite number"),
        ("1e-999", 0.0, "would become 0"),
        ("9007199254740993", 0.0, "more digits"),
        ("2", False, "neither true nor false"),
        ("null", "", 'write "" for none'),
        ("~", [], r"write \[\] for none"),
        ("null", 0, "leave the key out"),
        ("5", [1], "not a list"),
        ("[5]", 5, "a list is given where a whole number"),
        ("[5, x]", [1], "'x' is not a whole number"),
        ("{a: 1}", None, "takes a value"),
        (".nan", None, "not a finite number"),
        ("!!int x", None, "cannot be read"),
    ],
)
def test_what_would_lose_something_is_a_mistake(text: str, default: object, says: str) -> None:
    with pytest.raises(Mistake, match=says):
        from_yaml(text, default)


def test_a_word_of_the_command_line_is_not_cut_at_a_comment() -> None:
    assert coerce(parse_word("a #b"), None) == "a #b"
    assert coerce(parse_word("#fff"), None) == "#fff"
    assert coerce(parse_word("*.png"), None) == "*.png"
    assert coerce(parse_word("[1, 2]"), None) == [1, 2]
    with pytest.raises(Mistake, match="quote a list"):
        parse_word("[1,")


def test_a_path_has_its_home_and_its_variables_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "/data")
    assert expand("~/runs/$WHERE") == "/home/me/runs//data"
    assert expand(["${WHERE}/a.py:T", "plain", "$5"]) == ["/data/a.py:T", "plain", "$5"]
    with pytest.raises(Mistake, match="no variable NOWHERE"):
        expand("${NOWHERE}/x")
