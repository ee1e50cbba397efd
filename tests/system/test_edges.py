"""Models of odd parts on two ranks: exact over a crash, each rank's own buffers included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.edges import zoo
from tests.edges.test_zoo import assert_same_run, same, words
from tests.system import edge_tasks, jobs

MANY = [part for part in zoo.MODELS if part not in zoo.REFUSED and part != "sparse"]


@pytest.mark.parametrize(
    ("parts", "optimiser"),
    [(MANY, "adam"), jobs.slow(["sparse", "frozen", "extra"], "plain sgd", id="sparse gradients")],
)
def test_two_ranks_go_on_exactly(parts: list[str], optimiser: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    case = words(parts, optimiser, "data class")
    jobs.train(*case, "OUTPUT_DIR", whole, ranks=2).ok()
    failed = jobs.train(*case, "OUTPUT_DIR", broken, ranks=2, env={zoo.FAIL_AT: "5"})
    assert failed.code != 0 and "a planned failure" in failed.output
    jobs.train(*case, "OUTPUT_DIR", broken, "--resume", ranks=2).ok()
    assert_same_run(broken, whole)
    ours, theirs = jobs.state(broken)["ranks"], jobs.state(whole)["ranks"]
    assert same([rank["buffers"] for rank in ours], [rank["buffers"] for rank in theirs])
    if "queue" in parts:  # what other ranks wrote is theirs, and was not lost
        own = {"queue": "queue", "renamed": "queue", "unsaved": "trace"}
        names = {f"parts.{parts.index(part)}.{name}" for part, name in own.items()}
        mine, other = (rank["buffers"] for rank in theirs)
        assert mine.keys() == other.keys() == names
        assert not any(torch.equal(mine[name], other[name]) for name in names)


def odd(name: str, *words: object) -> list[object]:
    task = ("TASK.NAME", f"{edge_tasks.__file__}:{name}", "EVAL.EVERY", "")
    return [*task, "TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "2ep", *words]


def test_weights_that_differ_between_ranks_are_told_at_the_next_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    failed = jobs.train(*odd("Apart", "CHECKPOINT.EVERY", "3step"), "OUTPUT_DIR", run, ranks=2)
    assert failed.code != 0
    told = jobs.failure(run)["exception"]
    assert "the ranks' weights differ at step 3: body.weight. " in told
    assert not list((run / "checkpoints").glob("step_*"))


def test_a_model_that_grows_is_refused_at_its_first_save(tmp_path: Path) -> None:
    """What `build_model` makes could not take its state: a checkpoint would be worth nothing."""
    failed = jobs.train(*odd("Grows"), "OUTPUT_DIR", tmp_path / "run")
    assert failed.code == 1
    told = jobs.failure(tmp_path / "run")["exception"]
    assert "body.seen, late.weight, late.bias: of another shape or type than at the start" in told
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_collective_of_the_tasks_own_is_refused_where_ranks_will_be_idle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    failed = jobs.train(*odd("Gathers"), "OUTPUT_DIR", run, ranks=2)
    assert failed.code != 0 and jobs.failure(run)["step"] == 0
    assert "Gathers.train_step begins a collective" in jobs.failure(run)["exception"]
    assert "TRAIN.DROP_LAST True" in failed.output


def test_a_collective_in_summarize_is_an_error_at_once(tmp_path: Path) -> None:
    """By the rank that began it, and nothing trained is lost. The timeout is that of a save: 30
    minutes."""
    run = tmp_path / "run"
    failed = jobs.train(*odd("Collects", "EVAL.EVERY", "2step"), "OUTPUT_DIR", run, ranks=2)
    assert failed.code != 0
    told = jobs.failure(run)
    assert told["rank"] == 0 and "Collects.summarize began a collective" in told["exception"]
    assert "sync_on_compute=False" in failed.err
    assert (run / "checkpoints/step_2/state.pt").exists()


def test_a_rank_without_samples_moves_no_weight_that_nobody_uses(tmp_path: Path) -> None:
    """Decay acts on a gradient of zeros, but not where there is none."""
    words = ("OPTIM.WEIGHT_DECAY", "0.1", "DIST.FIND_UNUSED_PARAMETERS", "True")
    for name, how in (("two", {"ranks": 2}), ("one", {})):
        jobs.train(*odd("Plain", *words), "OUTPUT_DIR", tmp_path / name, **how).ok()
    two, one = (jobs.state(tmp_path / name)["model"] for name in ("two", "one"))
    start = edge_tasks.Plain(None).build_model().state_dict()  # type: ignore[arg-type]
    assert torch.equal(two["spare.weight"], start["spare.weight"])
    torch.testing.assert_close(two, one)
    assert not torch.equal(two["body.weight"], start["body.weight"])


def test_a_buffer_is_its_ranks_own_unless_the_task_shares_it(tmp_path: Path) -> None:
    words = ("DIST.FIND_UNUSED_PARAMETERS", "True", "TRAIN.DROP_LAST", "True")
    jobs.train(*odd("Buffered", *words), "OUTPUT_DIR", tmp_path / "run", ranks=2).ok()
    state = jobs.state(tmp_path / "run")
    assert [float(rank["buffers"]["body.mine"]) for rank in state["ranks"]] == [2.0, 4.0]
    assert {name for rank in state["ranks"] for name in rank["buffers"]} == {"body.mine"}
    assert float(state["model"]["body.ours"]) == 2.0  # rank 0's, before each forward pass


def test_an_evaluation_without_eval_step_is_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    """With `EVAL.EVERY ""`, as everywhere above, none is needed."""
    refused = jobs.train(*odd("Plain", "EVAL.EVERY", "1ep"), "OUTPUT_DIR", tmp_path / "run")
    assert refused.code == 2 and not (tmp_path / "run").exists()
    assert "has no eval_step" in refused.err and 'EVAL.EVERY ""' in refused.err


def test_variables_in_the_paths_of_files_are_put_in(tmp_path: Path) -> None:
    """Quoted, as a job file has them; the shell would put in others."""
    (tmp_path / "base.yaml").write_text("SEED: 7\n")
    (tmp_path / "run.yaml").write_text("_BASE_: $WHERE/base.yaml\n")
    words = ("--config-file", "$WHERE/run.yaml", "OUTPUT_DIR", "${WHERE}/run", "--check")
    out = jobs.train(*odd("Plain"), *words, env={"WHERE": str(tmp_path)}).ok().out
    assert "SEED: 7" in out and f"OUTPUT_DIR: {tmp_path}/run" in out


def test_weights_that_a_step_does_not_use_are_named_with_the_remedy(tmp_path: Path) -> None:
    failed = jobs.train(*odd("Plain", "TRAIN.DROP_LAST", "True"), "OUTPUT_DIR", tmp_path, ranks=2)
    assert failed.code != 0
    told = jobs.failure(tmp_path)
    assert told["step"] == 0 and "does not use spare.weight, spare.bias" in told["exception"]
    assert "DIST.FIND_UNUSED_PARAMETERS True" in told["exception"]


@pytest.mark.parametrize("local_rank", ["--local-rank=0", "--local_rank=0"])
def test_torch_distributed_launch_starts_a_run(local_rank: str) -> None:
    """It puts an argument before or after the words of the command."""
    for put in ((local_rank, "train", "--check"), ("train", local_rank, "--check")):
        assert "BATCH_SIZE" in jobs.launch(*put, *odd("Plain")).ok().out
