"""The protocol: requests are kept until they are sent, and state is each callback's own."""

from types import SimpleNamespace

import pytest

from launcher.callbacks import Callbacks, parse
from launcher.data.plan import Plan
from launcher.errors import RunError, UsageError
from launcher.runtime.progress import Every
from tests.callbacks.helpers import view


class Patient:
    """Asks for something at its third step."""

    def __init__(self, request: str = "finish") -> None:
        self.request, self.steps = request, 0

    def on_step(self) -> str | None:
        self.steps += 1
        return self.request if self.steps == 3 else None

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class Measuring:
    def __init__(self, name: str) -> None:
        self.name = name

    def local_figures(self) -> dict[str, int]:
        return {self.name: 1}

    def figures(self, record: dict[str, float], ranks: list[dict[str, int]]) -> dict[str, float]:
        return {f"perf/{self.name}": record["perf/step_s"] + sum(rank[self.name] for rank in ranks)}


def test_a_request_is_kept_until_it_is_taken_and_its_author_until_the_end() -> None:
    callbacks = Callbacks([Patient(), Measuring("a")])
    for step in range(1, 4):
        callbacks.call("on_step")
        assert callbacks.asked == ({"finish": "Patient"} if step == 3 else {})
    callbacks.call("on_gradients")  # nobody has one
    assert callbacks.take() == {"finish"} and callbacks.take() == frozenset()
    assert callbacks.reasons == {"finish": "Patient"}


class Explains(Patient):
    reason = "enough is enough"


def test_whoever_has_a_reason_is_quoted_with_it_and_who_asks_first_is_why() -> None:
    callbacks = Callbacks([Patient("stop"), Explains(), Patient()])
    for _ in range(3):
        callbacks.call("on_step")
    assert callbacks.asked == {"stop": "Patient", "finish": "Explains: enough is enough"}
    callbacks.take()
    callbacks.asked["finish"] = "somebody later"
    callbacks.take()
    assert callbacks.reasons == {"stop": "Patient", "finish": "Explains: enough is enough"}


def test_why_something_was_asked_survives_until_it_is_done() -> None:
    """On CUDA it is seen steps later, and a resume may come between."""
    callbacks, again = Callbacks([Explains(), Patient("stop")]), Callbacks()
    for _ in range(3):
        callbacks.call("on_step")
    waiting = callbacks.requests([])
    assert waiting == {"asked": {"finish": "Explains: enough is enough"}, "reasons": {}}
    callbacks.take()
    assert callbacks.requests([["evaluate"], []]) == {"asked": {}, "reasons": {}}  # it was done
    on_its_way = callbacks.requests([[], ["finish"]])
    again.add_requests(on_its_way)
    assert again.reasons == {"finish": "Explains: enough is enough"} and not again.asked
    Callbacks().add_requests({"asked": {}})  # of an earlier version


class Hooked:
    """A task with hooks, and methods that are called as a callback's but are its own."""

    reason = "a task's"

    def __init__(self, called: list[str]) -> None:
        self.called = called
        for name in ("on_start", "on_record", "on_evaluation", "on_checkpoint", "on_end"):
            setattr(self, name, lambda *_, name=name: called.append(f"task {name}"))

    def on_step(self) -> str:
        return "finish"

    def before_step(self, samples: int) -> None:
        raise AssertionError("its own")

    on_gradients = on_backward = on_saved = figures = local_figures = late_figures = sink = (
        state_dict
    ) = before_step


class Listens:
    def __init__(self, called: list[str]) -> None:
        for name in ("on_start", "on_record", "on_evaluation", "on_checkpoint", "on_end"):
            setattr(self, name, lambda *_, name=name: called.append(name))


def test_a_tasks_hooks_come_first_but_at_the_end_and_its_other_methods_are_its_own() -> None:
    called: list[str] = []
    callbacks = Callbacks([Listens(called)], Hooked(called))
    names = ["on_start", "on_record", "on_evaluation", "on_checkpoint"]
    arguments = {"on_record": (None,), "on_evaluation": ({},)}
    for name in [*names, "on_end"]:
        callbacks.call(name, *arguments.get(name, ()))
    for other in ("before_step", "on_backward", "on_gradients", "on_saved"):
        callbacks.call(other, 1)
    assert callbacks.figures({}, []) == callbacks.local_figures() == callbacks.late_figures() == {}
    assert callbacks.sinks() == [] and callbacks.state_dict() == {}
    first = [word for name in names for word in (f"task {name}", name)]
    assert called == [*first, "on_end", "task on_end"]
    callbacks.call("on_step")
    assert callbacks.asked == {"finish": "Hooked: a task's"}


def test_an_error_in_a_hook_is_told_with_whose_it_is() -> None:
    task = SimpleNamespace(on_end=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        Callbacks([], task).call("on_end")
    assert error.value.__notes__ == ["in SimpleNamespace.on_end"]  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"SimpleNamespace\.on_start returned \['stop'\]"):
        Callbacks([], SimpleNamespace(on_start=lambda: ["stop"])).call("on_start")


def test_a_request_that_is_none_is_an_error_with_the_names_there_are() -> None:
    callbacks = Callbacks([Patient("quit")])
    callbacks.call("on_step")
    callbacks.call("on_step")
    with pytest.raises(RunError, match=r"Patient\.on_step returned 'quit'.*stop, finish, evaluate"):
        callbacks.call("on_step")


def test_figures_of_all_ranks_come_together_in_a_record() -> None:
    callbacks = Callbacks([Measuring("a"), Patient(), Measuring("b")])
    assert callbacks.local_figures() == {"a": 1, "b": 1}
    assert callbacks.late_figures() == {}
    ranks = [{"a": 1, "b": 1}, {"a": 5, "b": 7}]
    assert callbacks.figures({"perf/step_s": 0.5}, ranks) == {"perf/a": 6.5, "perf/b": 8.5}


def test_each_callback_gets_its_own_state_and_a_new_one_none() -> None:
    first, second = Patient(), Patient()
    first.steps, second.steps = 1, 2
    saved = Callbacks([first, Measuring("a"), second]).state_dict()
    # What has no state comes and goes, with the config or the terminal.
    again = [Measuring("b"), Patient(), Patient(), Patient()]
    Callbacks(again).load_state_dict(saved)
    assert [c.steps for c in again if isinstance(c, Patient)] == [1, 2, 0]


def test_a_callback_may_take_the_records_where_it_wants() -> None:
    callbacks = Callbacks([Measuring("a"), SimpleNamespace(sink=lambda: "a sink")])
    assert callbacks.sinks() == ["a sink"]


def test_an_entry_of_the_config() -> None:
    assert parse("early_stop") == ("early_stop", {})
    name, arguments = parse("my.py:Mine patience=3 metric=val/loss names='[x, y]' on=true")
    assert name == "my.py:Mine"
    assert parse("my.py:Mine a=1e-3 b=-2E4 c=1e d=e3 e='\"1e3\"'")[1] == {
        **{"a": 0.001, "b": -20000.0, "c": "1e", "d": "e3", "e": "1e3"}
    }
    assert arguments == {"patience": 3, "metric": "val/loss", "names": ["x", "y"], "on": True}


@pytest.mark.parametrize("text", ["name 3", "name 'open", "name x=[1"])
def test_an_entry_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match=r"CALLBACKS: .*is not a name with key=value arguments"):
        parse(text)


@pytest.mark.parametrize(
    ("every", "step", "due"),
    [
        ("3step", 2, True),
        ("3step", 1, False),
        ("1ep", 1, False),
        ("1ep", 2, True),  # the epoch's last, smaller batch
        ("", 2, False),
    ],
)
def test_whether_the_step_under_way_is_due(every: str, step: int, due: bool) -> None:
    run = view(plan=Plan(20, 8))
    run.progress.step, run.progress.samples = step, 8 * step
    assert run.is_due(Every(every)) == due
