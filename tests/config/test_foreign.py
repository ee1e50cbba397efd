"""Words of other launchers: each is a mistake that names ours, as docs/migrate.md does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.cli.arguments import split_overrides
from launcher.cli.train import parser
from launcher.config import KEYS, CfgNode, ConfigError, load_config
from launcher.config.foreign import WORDS, Word, foreign
from tests.system.jobs import ROOT

OURS = {key.name for key in KEYS} | set(parser()._option_string_actions)
OF_TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
ALL = [word for words in WORDS.values() for word in words]
Captured = pytest.CaptureFixture[str]


def told(*words: str) -> dict[str, str]:
    """What the report of a config says of each key."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, words, require_task=False)
    return {problem.key: str(problem) for problem in caught.value.problems}


def told_of_option(name: str, capsys: Captured) -> str:
    with pytest.raises(SystemExit) as ended:
        split_overrides(parser(), [name, "1"])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_stands_on_the_right_side_exists() -> None:
    named = {word.ours for word in ALL} - {""}
    for word in ALL:
        named |= set(re.findall(r"\b[A-Z]+\.[A-Z_]+\b|(?<!\w)--[a-z][a-z-]*", word.note))
        assert word.ours or word.note, f"{word.theirs} says nothing"
    assert named - OF_TORCHRUN <= OURS
    assert len(named) > 40  # the pattern finds them


def test_what_stands_on_the_left_side_is_none_of_ours() -> None:
    assert not {word.theirs for word in ALL} & OURS
    answers: dict[str, set[Word]] = {}
    for word in ALL:
        answers.setdefault(word.theirs.lower(), set()).add(word._replace(theirs=""))
    assert [theirs for theirs, words in answers.items() if len(words) > 1] == []


def test_each_word_as_a_key_is_a_mistake_that_names_ours(capsys: Captured) -> None:
    found = told(*(f"{word.theirs}=1" for word in ALL))
    for word in ALL:
        told_of = found[word.theirs]
        assert told_of.startswith(f"{word.theirs}: unknown key")
        assert not word.ours or f"(did you mean {word.ours}" in told_of
        assert word.note in told_of


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("--num-gpus", "torchrun --nproc-per-node"),
        ("--per_device_train_batch_size", "did you mean TRAIN.BATCH_SIZE, the global batch"),
        ("--learning-rate=0.1", "--learning-rate: unknown option; a key has no dashes (did you"),
        ("--resume_from_checkpoint", "did you mean --resume, which"),
        ("--fast-dev-run", "did you mean --dry-run?"),
        ("--trainer.max_epochs=3", "did you mean TRAIN.DURATION, with its unit: 20ep?"),
        ("--cfg", "did you mean --config-file?"),
        ("--overwritte", "did you mean --overwrite?"),
        ("--optim.lr", "did you mean OPTIM.LR?"),
    ],
)
def test_an_unknown_option_is_told_with_ours(name: str, ours: str, capsys: Captured) -> None:
    assert ours in told_of_option(name, capsys)


def test_an_option_like_none_is_told_as_ever(capsys: Captured) -> None:
    assert told_of_option("--bogus", capsys).endswith("unrecognized arguments: --bogus\n")


def test_words_for_a_batch_of_one_device_explain_the_global_batch() -> None:
    for word in ALL:
        if re.match(r"per_.*train|gradient_accumulation|accumulate_grad", word.theirs):
            assert "global batch" in word.note
    hint = told("per_device_train_batch_size=8")["per_device_train_batch_size"]
    assert "over all ranks" in hint and "times devices, times accumulation steps" in hint


def test_words_in_a_file_also_below_sections_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(
        "SOLVER: {BASE_LR: 1, AMP: {ENABLED: true}}\nfit:\n  trainer: {max_epochs: 3}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), require_task=False)
    hints = [(p.key, p.where[-2:], p.hint.partition(",")[0]) for p in caught.value.problems]
    assert hints == [
        ("SOLVER.BASE_LR", ":1", "OPTIM.LR"),
        ("SOLVER.AMP.ENABLED", ":1", "TRAIN.PRECISION"),
        ("fit.trainer.max_epochs", ":3", "TRAIN.DURATION"),
    ]


def test_a_key_that_ends_like_one_of_ours_is_that_one() -> None:
    """batch_size alone is a script's word; eval.batch_size is a slip."""
    assert foreign("batch_size") and not foreign("eval.batch_size")
    assert told("eval.batch_size=1") == {
        "eval.batch_size": "eval.batch_size: unknown key (did you mean EVAL.BATCH_SIZE?)"
    }


def test_a_tasks_own_keys_are_its_own() -> None:
    class Mine:
        @classmethod
        def defaults(cls) -> CfgNode:
            return CfgNode({"LEARNING_RATES": [1.0], "PATIENCE": 3})

    words = ["TASK.NAME=mine", "TASK.PATIENCE=4", "TASK.LEARNING_RATE=1"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, words, lambda *_: Mine)
    (problem,) = caught.value.problems
    assert (problem.key, problem.hint) == ("TASK.LEARNING_RATE", "TASK.LEARNING_RATES")


PAGE = (ROOT / "docs/migrate.md").read_text(encoding="utf-8")


def test_the_page_has_the_same_tables() -> None:
    """In the same order, one below each heading."""
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)`|none) \| (.*?) ?\|$", PAGE, re.MULTILINE)
    heads = PAGE.split("| key or option | here | |\n")[1:]
    for part, (name, words) in zip(heads, WORDS.items(), strict=True):
        lines = [line for line in part.split("\n\n")[0].splitlines() if "---" not in line]
        assert lines == [row(word) for word in words], f"the table of {name} in docs/migrate.md"
    assert {Word(*found) for found in rows} >= set(ALL)


def row(word: Word) -> str:
    return f"| `{word.theirs}` | {f'`{word.ours}`' if word.ours else 'none'} | {word.note} |"


def test_the_page_names_nothing_that_is_not_there() -> None:
    """Its own keys in backquotes, those of the first chapter above all."""
    sections = {key.name.partition(".")[0] for key in KEYS if "." in key.name}
    theirs = {word.theirs for word in ALL}
    named = {n for n in re.findall(r"`([A-Z]+(?:\.[A-Z_]+)+)", PAGE) if n.split(".")[0] in sections}
    assert named - theirs - OURS <= {"MODEL.ROI_HEADS"}  # detectron2's, said to be absent


def test_the_pages_answer_is_the_launchers() -> None:
    (answer,) = re.findall(r"^      command line  max_epochs: (.*)$", PAGE, re.MULTILINE)
    assert told("max_epochs=20")["max_epochs"] == f"max_epochs: {answer}"
