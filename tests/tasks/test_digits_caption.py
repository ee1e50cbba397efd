"""The digits-caption task: padding that counts for nothing, attention by the formula, words."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from launcher.config import load_config
from launcher.errors import UsageError
from launcher.tasks import resolve_task
from launcher.tasks.digits_caption import ALPHABET, LONGEST, NAMES, DigitsCaption, distance
from launcher.tasks.recorder import Recorder
from launcher.tasks.speller import AdditiveAttention


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on several, above all where other tests run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shown(Recorder):
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def text(self, name: str, text: str) -> None:
        self.found[name] = text

    def image(self, name: str, image: Any) -> None:
        self.found[name] = image


def task(*words: str) -> DigitsCaption:
    words = ("TASK.NAME", "digits-caption", *words)
    made = DigitsCaption(load_config(None, words, resolve_task).cfg)
    made.recorder = Shown()
    return made


def samples(*labels: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(1, 8, 8), torch.tensor(label)) for label in labels]


def test_a_batch_is_padded_to_its_longest_name() -> None:
    batch = task().collate(samples(6, 3, 1))  # six, three, one
    letters = [[(" " + ALPHABET)[i] for i in row] for row in batch["letters"].tolist()]
    assert ["".join(row) for row in letters] == ["six   ", "three ", "one   "]
    assert batch["mask"].int().tolist() == [[1] * 4 + [0] * 2, [1] * 6, [1] * 4 + [0] * 2]
    assert batch["images"].shape == (3, 1, 8, 8) and batch["labels"].tolist() == [6, 3, 1]
    assert task().collate(samples(6, 1))["letters"].shape == (2, 4)


def test_the_split_is_that_of_digits() -> None:
    from launcher.tasks.digits import Digits

    plain = Digits(load_config(None, ["TASK.NAME", "digits"], resolve_task).cfg)
    for split in ("train", "val"):
        ours, theirs = task().build_dataset(split), plain.build_dataset(split)
        assert all(map(torch.equal, ours.tensors, theirs.tensors))


def test_padding_counts_for_nothing_and_letters_weigh_alike() -> None:
    """A batch's loss and gradient are the means over its letters, taken name by name."""
    caption, kept = task(), samples(3, 6, 1, 8, 0)
    torch.manual_seed(0)
    model = caption.build_model()
    found = caption.train_step(model, caption.collate(kept))
    found["loss"].backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    letters = sum(len(NAMES[int(label)]) + 1 for _, label in kept)
    assert found["weight"].item() == letters
    total = 0.0
    for one in kept:
        batch = caption.collate([one])
        logits = model(batch["images"], batch["letters"])[0]
        part = F.cross_entropy(logits, batch["letters"][0], reduction="sum") / letters
        part.backward()
        total += part.item()
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)
    for ours, theirs in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-6, rtol=1e-4)
    tested = caption.eval_step(model, caption.collate(kept))
    for name in ("loss", "letter_accuracy"):
        mean = (tested[name] * tested["weight"]).sum() / tested["weight"].sum()
        torch.testing.assert_close(mean, found[name])


def test_padding_is_never_a_letter_guessed() -> None:
    caption = task()
    model = caption.build_model()
    nn.init.constant_(model.out.bias, 0)
    with torch.no_grad():
        model.out.bias[0] = 1e3  # guesses a name's end at every letter
    batch = caption.collate(samples(3, 6))
    assert caption.train_step(model, batch)["letter_accuracy"].item() == pytest.approx(2 / 10)
    assert caption.eval_step(model, batch)["letter_accuracy"].tolist() == pytest.approx(
        [1 / 6, 1 / 4]
    )


def test_attention_is_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(query=3, places=5, width=4)
    query, places = torch.randn(2, 3), torch.randn(2, 7, 5)
    seen, weights = attention(query, places)
    w, b = attention.query.weight, attention.query.bias
    for i in range(2):
        scores = torch.stack(
            [
                attention.score.weight[0]
                @ torch.tanh(w @ query[i] + b + attention.places.weight @ p)
                for p in places[i]
            ]
        )
        torch.testing.assert_close(weights[i], scores.exp() / scores.exp().sum())
        torch.testing.assert_close(seen[i], weights[i] @ places[i])


def test_the_decoder_is_told_the_letters_before_and_no_other() -> None:
    caption = task()
    model, batch = caption.build_model(), caption.collate(samples(3))
    logits, letters = model(batch["images"], batch["letters"]), batch["letters"].clone()
    letters[0, 2] = 1 + (letters[0, 2] + 1) % 15
    changed = (model(batch["images"], letters) != logits).any(2)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3


def test_it_spells_greedily_what_teacher_forcing_would_tell() -> None:
    caption = task()
    torch.manual_seed(1)
    model, images = caption.build_model(), torch.randn(4, 1, 8, 8)
    spelled, looked = model.spell(images, 5)
    assert looked.shape == (4, 5, 16)
    torch.testing.assert_close(looked.sum(2), torch.ones(4, 5))
    assert torch.equal(model(images, spelled).argmax(2), spelled)


def test_the_metrics_of_whole_names_are_no_means() -> None:
    caption = task()
    spelled = ["six", "sax", "three", "three", "tree", ""]
    outputs = {"label": torch.tensor([6, 6, 3, 3, 3, 1]), "spelled": spelled}
    found = caption.summarize(outputs)
    assert found == {
        "exact_match": 3 / 6,
        "class_match": pytest.approx((0 + 2 / 3 + 1 / 2) / 3),
        "edit_rate": (1 + 1 + 3) / (3 + 3 + 5 + 5 + 5 + 3),
    }
    assert "| three | three: 2, tree: 1 |" in caption.recorder.found["spelled"]
    assert "| one | (nothing): 1 |" in caption.recorder.found["spelled"]


def test_the_distance_of_words() -> None:
    words = {("", "six"): 3, ("six", ""): 3, ("kitten", "sitting"): 3, ("one", "one"): 0}
    words |= {("nine", "five"): 2, ("tree", "three"): 1, ("ab", "ba"): 2}
    assert {pair: distance(*pair) for pair in words} == words


class Scripted(nn.Module):
    """Spells "two" whatever it sees, and looks at place 5 for the second letter."""

    SIDE = 4

    def spell(self, images: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        word = torch.tensor([ALPHABET.index(letter) + 1 for letter in "two"] + [0] * (length - 3))
        looked = torch.full((len(images), length, 16), 1 / 16)
        looked[:, 1] = torch.eye(16)[5]
        return word.expand(len(images), length), looked


def test_it_shows_where_it_looks() -> None:
    caption = task()
    caption.show(Scripted())
    assert caption.recorder.found["attention_to"] == "By row: " + ", ".join(["two"] * 10)
    picture = caption.recorder.found["attention"]
    tile = 8 * 6 + 4  # a pixel is a square of 6, with a gap of 4
    assert picture.shape == (3, 10 * tile, (1 + LONGEST) * tile)
    first, _, second = (picture[:, :48:6, k * tile : k * tile + 48 : 6] for k in range(3))
    assert torch.equal(first[0], first[1])  # as it is: grey
    # Place 5 is the second row's second one: pixels 2 and 3. It is red, all else is as it is.
    assert (second[0, 2:4, 2:4] == 1).all() and not second[1:, 2:4, 2:4].any()
    elsewhere = torch.ones(8, 8, dtype=torch.bool)
    elsewhere[2:4, 2:4] = False
    assert torch.equal(second[:, elsewhere], first[:, elsewhere])


def test_its_width_is_a_key_and_a_wrong_one_is_named() -> None:
    assert task("TASK.WIDTH", "32").build_model().cell.hidden_size == 32
    with pytest.raises(UsageError, match=r"TASK\.WIDTH must be a multiple of 16, not 24"):
        task("TASK.WIDTH", "24")


def test_it_learns() -> None:
    """A few names at first, by teacher forcing; the whole of it is a run, in tests/system."""
    caption = task("TASK.WIDTH", "32")
    torch.manual_seed(0)
    model, images = caption.build_model(), caption.build_dataset("train")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    kept = [images[i] for i in range(40)]
    batch = caption.collate(kept)

    def exact() -> float:
        with torch.no_grad():
            return caption.summarize(caption.eval_step(model, batch))["exact_match"]

    assert exact() == 0
    for _ in range(60):
        optimizer.zero_grad()
        caption.train_step(model, batch)["loss"].backward()
        optimizer.step()
    assert exact() > 0.9
