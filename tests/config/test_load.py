"""Loading: the order of sources, the report of all mistakes, tasks, and config.yaml again."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config import KEYS, CfgNode, Config, ConfigError, defaults, flatten, load_config
from launcher.config.keys import STEPS, TIME
from launcher.errors import UsageError


class Toy:
    """A task with a key of each kind."""

    @classmethod
    def defaults(cls) -> CfgNode:
        nested = CfgNode({"DEPTH": 2, "EMPTY": CfgNode()})
        return CfgNode({"WIDTH": 128, "NET": nested, "ANY": None, "SIZE": (1, 2)})

    @classmethod
    def metrics(cls) -> list[str] | None:
        return ["loss", "accuracy"]


def resolve(name: str, search: list[Path], builtin_only: bool) -> type | None:
    if name == "toy" or (name.endswith(":Toy") and not builtin_only):
        return Toy
    if name and builtin_only:
        return None
    raise UsageError(f"no task {name!r}; the built-in tasks are: toy")


def load(file: str | None = None, *words: str, **more: Any) -> Config:
    more.setdefault("resolve_task", resolve)
    return load_config(file, words, **more)


def mistakes(file: str | None = None, *words: str, **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(file, *words, **more)
    return caught.value


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return path


# --- sources and their order


def test_defaults_alone_are_the_keys() -> None:
    config = load_config(None, require_task=False)
    assert flatten(config.cfg) == {key.name: key.default for key in KEYS}
    assert set(config.origins.values()) == {"default"}
    assert config.cfg.is_frozen()
    with pytest.raises(AttributeError):
        config.cfg.TRAIN.BATCH_SIZE = 1


def test_default_lists_are_not_shared_between_configs() -> None:
    defaults().OPTIM.BETAS.append(0.5)
    assert defaults().OPTIM.BETAS == [0.9, 0.999]


EXPECTED = {
    "OPTIM.LR": (1e-3, "base.yaml:3"),
    "TRAIN.BATCH_SIZE": (8, "c/x.yaml:3"),
    "TASK.WIDTH": (64, "c/x.yaml:5"),
    "SEED": (8, "command line"),
    "TASK.ANY": (None, "default"),
}


def test_every_value_knows_where_it_came_from() -> None:
    write("base.yaml", "TASK: {NAME: toy}\nOPTIM:\n  LR: 1e-3\n")
    write("c/x.yaml", "_BASE_: ../base.yaml\n\nTRAIN.BATCH_SIZE: 8\nTASK:\n  WIDTH: 64.0\n")
    config = load("c/x.yaml", "SEED=7", "LOG.LEVEL", "DEBUG", "SEED", "8")
    found = flatten(config.cfg)
    assert config.task is Toy
    assert {key: (found[key], config.origins[key]) for key in found if key in EXPECTED} == EXPECTED


layers = st.dictionaries(
    st.sampled_from(["SEED", "TRAIN.BATCH_SIZE", "EVAL.BATCH_SIZE"]), st.integers(1, 99)
)


@settings(max_examples=40)
@given(sources=st.lists(layers, min_size=5, max_size=5))
def test_the_last_one_wins(sources: list[dict[str, int]]) -> None:
    def layer(path: str, values: dict[str, int], *bases: str) -> None:
        write(path, yaml.safe_dump({**values, "_BASE_": list(bases)}))

    layer("oldest.yaml", sources[0])
    layer("first.yaml", sources[1], "oldest.yaml")
    layer("second.yaml", sources[2])
    layer("own.yaml", sources[3], "first.yaml", "second.yaml")
    words = [word for key, value in sources[4].items() for word in (key, str(value))]
    found = flatten(load("own.yaml", *words, require_task=False).cfg)
    expected = {key: value for source in sources for key, value in source.items()}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TRAIN: &a {BATCH_SIZE: &n 8}\nEVAL: {<<: *a, EVERY: 2ep}\nSEED: *n", (8, "2ep", 8)),
        ("TRAIN: &a {BATCH_SIZE: 8}\nEVAL: {<<: *a, BATCH_SIZE: 9}", (9, "1ep", 0)),
        ("TRAIN: &a {BATCH_SIZE: 8}\nEVAL: {<<: [*a, {BATCH_SIZE: 9}]}", (8, "1ep", 0)),
        ("", (256, "1ep", 0)),
        ("\ufeffSEED: 3\n", (256, "1ep", 3)),
    ],
    ids=["anchors", "own keys win", "the first merged one wins", "empty", "byte order mark"],
)
def test_what_yaml_offers(text: str, expected: tuple[int, str, int]) -> None:
    config = load(write("x.yaml", text), require_task=False)
    assert expected == (config.cfg.EVAL.BATCH_SIZE, config.cfg.EVAL.EVERY, config.cfg.SEED)
    if "*n" in text:
        assert config.origins["EVAL.BATCH_SIZE"] == "x.yaml:1"


def test_output_dir_follows_the_config_file_or_the_task() -> None:
    write("configs/digits.v2.yaml", "TASK.NAME: toy")
    assert load("configs/digits.v2.yaml").cfg.OUTPUT_DIR == "runs/digits.v2"
    assert load(None, "TASK.NAME", "toy").cfg.OUTPUT_DIR == "runs/toy"
    assert load(None, "TASK.NAME", "pkg.mod:Toy").cfg.OUTPUT_DIR == "runs/Toy"
    assert load(None, "TASK.NAME", "toy", "OUTPUT_DIR", "a").cfg.OUTPUT_DIR == "a"


def test_a_task_file_is_sought_beside_the_config_then_here_and_named_from_here() -> None:
    spy = Mock(return_value=Toy)
    write("configs/mine.py", "")
    write("configs/x.yaml", "TASK.NAME: mine.py:Toy")
    config = load("configs/x.yaml", resolve_task=spy)
    spy.assert_called_once_with("mine.py:Toy", [Path("configs"), Path.cwd()], False)
    assert config.cfg.TASK.NAME == "configs/mine.py:Toy"
    assert load(write("runs/x/config.yaml", config.cfg.dump())).cfg == config.cfg


# --- the report


def test_the_report_holds_every_mistake_even_an_overridden_one_with_place_and_hint() -> None:
    write("x.yaml", "TASK.NAME: toy\nTRAIN:\n  BATCHSIZE: 8\n  PRECISION: FP16\n")
    words = "TRAIN.PRECISION fp16 OPTIM.LR abc TRAIN.LR=1 TASK.WIDHT=3 SEED"
    error = mistakes("x.yaml", *words.split())
    assert error.exit_code == 2
    assert str(error).splitlines() == [
        "6 mistakes in the config:",
        "  command line  SEED: has no value; write KEY VALUE or KEY=VALUE",
        "  x.yaml:3      TRAIN.BATCHSIZE: unknown key (did you mean TRAIN.BATCH_SIZE?)",
        "  x.yaml:4      TRAIN.PRECISION: 'FP16' is not one of fp32, tf32, bf16, fp16"
        " (did you mean fp16?)",
        "  command line  OPTIM.LR: 'abc' is not a number",
        "  command line  TRAIN.LR: unknown key (did you mean OPTIM.LR?)",
        "  command line  TASK.WIDHT: unknown key (did you mean TASK.WIDTH?)",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr", "OPTIM.LR"),
        ("train.batch_size", "TRAIN.BATCH_SIZE"),
        ("TRIAN.BATCH_SIZE", "TRAIN.BATCH_SIZE"),
        ("TRAIN.NESTROV", "OPTIM.NESTEROV"),
        ("OPTIM.LEVEL", "LOG.LEVEL"),
        ("OPTIM.MODE", "CHECKPOINT.MODE"),
        ("XYZZY", ""),
    ],
)
def test_the_nearest_key_is_named(name: str, hint: str) -> None:
    (problem,) = mistakes(None, name, "1", require_task=False).problems
    assert (problem.key, problem.message, problem.hint) == (name, "unknown key", hint)


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        ("TRAIN.BATCH_SIZE 0", "TRAIN.BATCH_SIZE", "must be at least 1"),
        ("OPTIM.LR 0", "OPTIM.LR", "above 0"),
        ("OPTIM.BETAS [0.9]", "OPTIM.BETAS", "takes 2 values, not 1"),
        ("OPTIM.BETAS [0.9,1]", "OPTIM.BETAS", "below 1"),
        ("TRAIN.DURATION 24h", "TRAIN.DURATION", "a time limit is not the duration"),
        ("TRAIN.DURATION=", "TRAIN.DURATION", "must not be empty"),
        ("LOG.EVERY 10", "LOG.EVERY", "has no unit"),
        ("DIST.INIT_TIMEOUT 5ep", "DIST.INIT_TIMEOUT", "this is a time; write for example 90s"),
        ("CHECKPOINT.KEEP_EVERY 1h", "CHECKPOINT.KEEP_EVERY", "makes no sense"),
        ("OPTIM.MILESTONES 5ep", "OPTIM.MILESTONES", "is not a list"),
        ("OPTIM.MILESTONES [5ep,3ep]", "OPTIM.MILESTONES", "rising order"),
        ("OPTIM.MILESTONES [5ep,5ep]", "OPTIM.MILESTONES", "rising order"),
        ("OPTIM.SCHEDULE step", "OPTIM.SCHEDULE", "needs OPTIM.MILESTONES"),
        ("OPTIM.NESTEROV true OPTIM.MOMENTUM 0", "OPTIM.NESTEROV", "above 0"),
        ("OPTIM.NESTEROV true OPTIM.NAME adamw", "OPTIM.NESTEROV", "sgd"),
        ("OPTIM.WARMUP 11ep", "OPTIM.WARMUP", "longer than TRAIN.DURATION"),
        ("OPTIM.WARMUP 6ep OPTIM.HORIZON 5ep", "OPTIM.WARMUP", "longer than OPTIM.HORIZON (5ep)"),
        ("OPTIM.NAME adamv", "OPTIM.NAME", "not one of sgd, adam, "),
        ("OPTIM.ARGS [amsgrad]", "OPTIM.ARGS", "'amsgrad' is no key=value"),
        ("OPTIM.ARGS [lr=1]", "OPTIM.ARGS", "set OPTIM.LR"),
        ("OPTIM.NAME adam OPTIM.ARGS [eps=1]", "OPTIM.ARGS", "set OPTIM.EPS"),
        ("OPTIM.GROUPS [head]", "OPTIM.GROUPS", "write for example backbone.* LR_SCALE=0.1"),
        ("OPTIM.LR_SCALING linear", "OPTIM.LR_SCALING", "needs OPTIM.LR_BATCH"),
        ("OPTIM.LR_BATCH 256", "OPTIM.LR_BATCH", "set it to linear or sqrt"),
        ("OPTIM.SCHEDULE multistep OPTIM.PERIOD 2ep", "OPTIM.SCHEDULE", "needs OPTIM.MILESTONES"),
        (
            "OPTIM.SCHEDULE step OPTIM.PERIOD 2ep OPTIM.MILESTONES [2ep]",
            "OPTIM.SCHEDULE",
            "not both",
        ),
        ("OPTIM.SCHEDULE exponential", "OPTIM.SCHEDULE", "needs OPTIM.PERIOD"),
        ("OPTIM.SCHEDULE invsqrt", "OPTIM.SCHEDULE", "needs OPTIM.WARMUP or OPTIM.PERIOD"),
        ("OPTIM.SCHEDULE wsd", "OPTIM.SCHEDULE", "needs OPTIM.DECAY"),
        ("OPTIM.SCHEDULE wsd OPTIM.DECAY 11ep", "OPTIM.DECAY", "longer than TRAIN.DURATION (10ep)"),
        (
            "OPTIM.SCHEDULE wsd OPTIM.DECAY 7ep OPTIM.WARMUP 4ep",
            "OPTIM.DECAY",
            "7ep, after OPTIM.WARMUP 4ep, is longer",
        ),
        (
            "OPTIM.MOMENTUM_SCHEDULE linear OPTIM.MOMENTUM_FACTOR 1.2",
            "OPTIM.MOMENTUM_FACTOR",
            "1.2 times the momentum of 0.9 is not below 1",
        ),
        ("DIST.BACKEND nccl DIST.DEVICE cpu", "DIST.BACKEND", "CUDA only"),
        ("CHECKPOINT.METRIC val/acuracy", "CHECKPOINT.METRIC", "not among what the task returns"),
        ("TASK digits", "TASK", "such as TASK.NAME"),
        ("SEED.X 5", "SEED.X", "lies below a key"),
        ("OUTPUT_DIR null", "OUTPUT_DIR", 'write "" for none'),
        ("TASK.SIZE [1,x]", "TASK.SIZE", "not a whole number"),
        ("TASK.NET 1", "TASK.NET", "is a section"),
        # A mistake is not told again by the checks that build on it.
        ("OPTIM.SCHEDULE step OPTIM.MILESTONES [5h]", "OPTIM.MILESTONES", "makes no sense"),
        # A key is not taken for the value of the one before.
        ("TRAIN.BATCH_SIZE OPTIM.LR 0.5", "TRAIN.BATCH_SIZE", "has no value"),
    ],
)
def test_each_rule_is_one_problem(words: str, key: str, says: str) -> None:
    (problem,) = mistakes(None, "TASK.NAME", "toy", *words.split()).problems
    assert (problem.where, problem.key) == ("command line", key)
    assert says in problem.message


@pytest.mark.parametrize(
    "words",
    [
        "TRAIN.BATCH_SIZE 8 TRAIN.MICRO_BATCH_SIZE 16",
        "OPTIM.WARMUP 500step",
        "OPTIM.WARMUP 20ep OPTIM.HORIZON 30ep",
        "OPTIM.NAME my.module:Class OPTIM.ARGS [eps=1,betas=2]",
        "OPTIM.SCHEDULE invsqrt OPTIM.WARMUP 100step",
        "OPTIM.NAME muon OPTIM.NESTEROV true",
        "OPTIM.SCHEDULE step OPTIM.MILESTONES [5ep,500step,8ep]",
        "CHECKPOINT.METRIC val/f1 CHECKPOINT.KEEP_BEST 0",
        "CHECKPOINT.METRIC val/f1 EVAL.EVERY=",
        "CHECKPOINT.METRIC val/accuracy",
        "EVAL.EVERY 30min",
        "OPTIM.FINAL_FACTOR 1",
        f"SEED {2**32 - 1}",
        "DATALOADER.NUM_WORKERS -1",
    ],
)
def test_what_is_no_mistake(words: str) -> None:
    load(None, "TASK.NAME", "toy", *words.split())


# --- files


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("SEED: 1\nTRAIN: [", "x.yaml:2", "not valid YAML"),
        ("SEED: 1\nSEED: 2", "x.yaml:2", "given twice, in lines 1 and 2"),
        ("TRAIN:\n  BATCH_SIZE: 1\nTRAIN.BATCH_SIZE: 2", "x.yaml:3", "in lines 2 and 3"),
        ("- SEED", "x.yaml:1", "a config is a mapping"),
        ("just text", "x.yaml:1", "a config is a mapping"),
        ("SEED: 1\n---\nSEED: 2", "x.yaml:2", "not valid YAML"),
        ("SEED: *nowhere", "x.yaml:1", "undefined alias"),
        ("TRAIN: &a\n  EVAL: *a", "x.yaml:1", "inside its own anchor"),
        ("? [a]\n: b", "x.yaml:1", "a key is a name"),
        ("TRAIN:\n  <<: 5", "x.yaml:2", "merges sections"),
        ("TRAIN:\n", "x.yaml:1", "is a section"),
        ("SEED: {A: 1}", "x.yaml:1", "lies below a key"),
        ("SEED: !!set {a}", "x.yaml:1", "tag !!set is not allowed"),
        ("_BASE_: {a: b}", "x.yaml:1", "unknown key"),
        ("TASK:\n  NAME: tyo", "x.yaml:2", "no task 'tyo'; the built-in tasks are: toy"),
        ("_BASE_:", "x.yaml:1", "takes a path or a list of paths"),
        ("_BASE_: gone.yaml", "x.yaml:1", "gone.yaml: no such file"),
        ("_BASE_: x.yaml", "x.yaml:1", "x.yaml -> x.yaml goes round in a circle"),
        ("SEED: " + "[" * 3000, "x.yaml", "nested too deeply"),
    ],
)
def test_each_broken_file_is_one_problem(text: str, where: str, says: str) -> None:
    (problem,) = mistakes(write("x.yaml", text), require_task=False).problems
    assert problem.where == where
    assert says in problem.message


def test_files_that_cannot_be_read() -> None:
    write("configs/digits.yaml", "")
    Path("latin.yaml").write_bytes(b"OUTPUT_DIR: caf\xe9")
    for name, says in {
        "configs/digit.yaml": "list) (did you mean configs/digits.yaml?)",
        "configs": "is a directory",
        "latin.yaml": "not UTF-8 text",
        "n" * 300: "cannot be read: File name too long",
        "nul\0.yaml": "is not the name of a file",
        "": "is not the name of a file",
    }.items():
        (problem,) = mistakes(name).problems  # and no word of a missing TASK.NAME
        assert says in str(problem)


def test_circles_and_gaps_among_bases_show_the_chain_and_hide_nothing_else() -> None:
    write("a.yaml", "_BASE_: b.yaml\nSEED: x\n")
    write("b.yaml", "_BASE_: [a.yaml, gone.yaml]\n")
    error = mistakes("a.yaml")
    assert [problem.where for problem in error.problems] == ["b.yaml:1", "b.yaml:1", "a.yaml:2"]
    assert "a.yaml -> b.yaml -> a.yaml" in error.problems[0].message
    assert "gone.yaml: no such file (a.yaml -> b.yaml -> gone.yaml)" in error.problems[1].message


def test_a_base_that_two_files_share_is_no_circle_and_reports_once() -> None:
    write("root.yaml", "SEED: x")
    write("a.yaml", "_BASE_: root.yaml")
    write("b.yaml", "_BASE_: root.yaml")
    write("c.yaml", "_BASE_: [a.yaml, b.yaml]")
    assert len(mistakes("c.yaml", require_task=False).problems) == 1


def test_nothing_runs_from_a_file() -> None:
    write("evil.py", "open('marker', 'w')\ncfg = {}\n")
    assert "not run" in str(mistakes("evil.py"))
    for tag in ("!!python/object/apply:os.mkdir [marker]", "!!python/name:os.mkdir ''", "!mine 3"):
        write("x.yaml", f"SEED: {tag}\nOPTIM.LR: [1, {tag}]\nTASK.NAME: toy\n")
        problems = mistakes("x.yaml").problems
        assert [problem.where for problem in problems] == ["x.yaml:1", "x.yaml:2"]
        assert all("is not allowed" in problem.message for problem in problems)
        word = mistakes(None, "TASK.NAME", "toy", "TASK.ANY", tag).problems[0]
        assert "is not allowed" in word.message
    write("x.yaml", "_BASE_: evil.py")
    assert "not run" in str(mistakes("x.yaml"))
    assert not Path("marker").exists()


# --- tasks


def test_a_missing_task_names_the_built_in_ones() -> None:
    (problem,) = mistakes().problems
    assert problem.key == "TASK.NAME" and "toy" in problem.message


def test_a_mistake_in_a_built_in_key_keeps_foreign_tasks_unloaded() -> None:
    error = mistakes(None, "TASK.NAME", "my.py:Toy", "TASK.WIDHT", "3", "SEED", "x")
    assert [problem.key for problem in error.problems] == ["SEED"]
    assert str(error).splitlines()[-1].startswith("Keys under TASK are not checked yet")


def test_without_a_resolver_task_keys_are_kept_as_they_are() -> None:
    write("x.yaml", "TASK:\n  NAME: gone\n  WIDTH: 5\n  NET: {DEPTH: 1.5, EMPTY: {}}\n")
    config = load("x.yaml", "TASK.TAGS", "[a, 1]", resolve_task=None)
    assert config.task is None
    task = {"NAME": "gone", "WIDTH": 5, "NET.DEPTH": 1.5, "TAGS": ["a", 1]}
    assert flatten(config.cfg.TASK) == task
    for key in ("TASK.WIDTH.X", "TASK.WIDTH.X.Y"):
        assert "lies below" in str(mistakes("x.yaml", key, "1", resolve_task=None))


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (RuntimeError("boom"), "Broken.defaults() fails: RuntimeError: boom"),
        (None, "returns NoneType, not a CfgNode"),
        ({"X": object()}, "fails: AssertionError"),
        ({"NAME": "x"}, "declares NAME"),
        ({"A": {"B.C": 1}}, "'B.C' is not a key"),
        ({"X": float("inf")}, "X cannot be written as YAML"),
        ({"X": [object()]}, "X cannot be written as YAML"),
    ],
)
def test_tasks_with_broken_defaults(returned: object, says: str) -> None:
    task = type("Broken", (), {"defaults": Mock(side_effect=[returned])})
    (problem,) = mistakes(None, "TASK.NAME", "b", resolve_task=lambda *_: task).problems
    assert problem.key == "TASK.NAME" and says in problem.message


def test_a_task_may_declare_nothing() -> None:
    config = load(None, "TASK.NAME", "object", resolve_task=lambda *_: object)
    assert flatten(config.cfg.TASK) == {"NAME": "object"}


# --- config.yaml


amounts = st.integers(1, 99)
# Text that may be a path, in which `~` and `$NAME` have a meaning: tested by themselves.
paths = st.text(min_size=1).filter(lambda text: text[0] != "~" and "$" not in text)
# A key of each kind.
CONFIGS = {
    "OUTPUT_DIR": paths,
    "SEED": st.integers(0, 2**32 - 1),
    "DATALOADER.NUM_WORKERS": st.integers(-1),
    "DATALOADER.PIN_MEMORY": st.sampled_from(["auto", "true", "false", "True", "False"]),
    "DIST.BACKEND": st.sampled_from(["", "gloo"]),
    "EVAL.EVERY": st.just("") | st.builds("{}{}".format, amounts, st.sampled_from(STEPS + TIME)),
    "OPTIM.NESTEROV": st.booleans(),
    "OPTIM.LR": st.floats(0, exclude_min=True, allow_infinity=False),
    "OPTIM.FINAL_FACTOR": st.floats(0, 1),
    "OPTIM.BETAS": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "OPTIM.MILESTONES": amounts.map(lambda n: [f"{n}ep", f"{n}step", f"{n + 1}ep"]),
    "CALLBACKS": st.lists(paths),
    "CHECKPOINT.METRIC": st.sampled_from(["val/loss", "val/accuracy"]),
    "TASK.NAME": paths,
    "TASK.WIDTH": st.integers(),
    "TASK.ANY": st.none() | st.text() | st.lists(st.integers()),
    "TASK.SIZE": st.tuples(st.integers(), st.integers()),
}


@settings(max_examples=60)
@given(values=st.fixed_dictionaries(CONFIGS))
def test_config_yaml_loads_back_to_the_same_config(values: dict[str, Any]) -> None:
    first = load(write("x.yaml", yaml.safe_dump(values)), resolve_task=lambda *_: Toy)
    found = flatten(first.cfg)
    assert {name: found[name] for name in values} == values
    again = load(write("run/config.yaml", first.cfg.dump()), resolve_task=lambda *_: Toy)
    assert again.cfg == first.cfg
    assert str(again.cfg) == str(first.cfg)  # 1 == 1.0 == True, but their texts differ
    assert "default" not in set(again.origins.values())
