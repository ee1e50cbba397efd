"""Options and overrides in any order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli.arguments import split_overrides
from launcher.cli.train import parser

PIECES = {
    "file": ["--config-file", "a.yaml"],
    "flag": ["--resume"],
    "pair": ["OPTIM.LR", "-1e-3"],
    "joined": ["SEED=4"],
}


@pytest.mark.parametrize("order", list(itertools.permutations(PIECES)), ids="-".join)
def test_any_order(order: tuple[str, ...]) -> None:
    options, overrides = split_overrides(parser(), [w for piece in order for w in PIECES[piece]])
    assert (options.config_file, options.resume, options.overwrite) == ("a.yaml", True, False)
    assert overrides == [w for piece in order if piece in ("pair", "joined") for w in PIECES[piece]]


values = st.text(min_size=1).filter(lambda text: text not in parser()._option_string_actions)
pairs = st.lists(st.tuples(st.sampled_from(["SEED", "TASK.X", "a"]), values), max_size=5)


@settings(deadline=None)
@given(pairs=pairs, joined=st.booleans())
def test_a_value_is_taken_whatever_it_looks_like(
    pairs: list[tuple[str, str]], joined: bool
) -> None:
    words = [w for k, v in pairs for w in ([f"{k}={v}"] if joined else [k, v])]
    options, overrides = split_overrides(parser(), [*words, "--check"])
    assert options.check and overrides == words


@pytest.mark.parametrize("value", ["-1", "-1e-3", "-.5", "-inf", "--x", "-", "--", "", "a=b"])
def test_values_with_a_minus(value: str) -> None:
    for words in (["OPTIM.LR", value], [f"OPTIM.LR={value}"]):
        assert split_overrides(parser(), words)[1] == words


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("SEED", ["SEED"]),
        ("SEED --resume", ["SEED"]),
        ("SEED --resume OPTIM.LR 1", ["SEED", "OPTIM.LR", "1"]),
    ],
)
def test_a_missing_value_does_not_eat_an_option(words: str, overrides: list[str]) -> None:
    """The config's report then says that SEED has no value."""
    options, found = split_overrides(parser(), words.split())
    assert (found, options.resume) == (overrides, "--resume" in words)


def test_an_option_may_hold_its_value_and_the_last_one_wins() -> None:
    words = ["--config-file", "a.yaml", "SEED", "1", "--config-file=b.yaml"]
    options, overrides = split_overrides(parser(), words)
    assert (options.config_file, overrides) == ("b.yaml", ["SEED", "1"])
