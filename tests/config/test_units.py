"""Durations: what is read, what is refused, and that the text survives a round trip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import Duration, parse_duration


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("20ep", Duration(20, "ep")),
        ("20.0ep", Duration(20, "ep")),
        (" 500 step ", Duration(500, "step")),
        ("90s", Duration(90, "s")),
        ("0.1min", Duration(6, "s")),
        ("1.5h", Duration(5400, "s")),
        ("0.25s", Duration(0.25, "s")),
        ("", None),
    ],
)
def test_durations_are_read_and_empty_means_never(text: str, duration: Duration | None) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("20", "has no unit"),
        ("20epochs", "'epochs' is not a unit"),
        ("ep", "is not a duration"),
        ("1.5ep", "whole numbers"),
        ("0ep", 'write "" for never'),
        ("0.0h", 'write "" for never'),
        ("-3step", "negative"),
        ("9" * 400 + "h", "out of range"),
        ("0." + "0" * 400 + "1s", "out of range"),
        ("nan s", "is not a duration"),
    ],
)
def test_what_is_no_duration_says_why_and_shows_examples(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="20ep, 500step, 90s, 30min, 24h") as caught:
        parse_duration(text)
    assert says in str(caught.value)


@given(
    st.tuples(st.integers(1, 10**9), st.sampled_from(["ep", "step"]))
    | st.tuples(
        st.decimals("0.000001", 10**9, places=6) | st.integers(1, 10**9),
        st.sampled_from(["s", "min", "h"]),
    )
)
def test_the_canonical_text_reads_back_the_same(pair: tuple[object, str]) -> None:
    duration = parse_duration(f"{pair[0]}{pair[1]}")
    assert duration is not None
    assert parse_duration(str(duration)) == duration
