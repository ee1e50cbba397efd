"""The bytes-lm task: real text split by file, a GPT as GPT-2 begins, and bits that it saves."""

import math
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from launcher.config import load_config
from launcher.errors import UsageError
from launcher.tasks import resolve_task
from launcher.tasks.bytes_lm import BytesLM, source_files
from launcher.tasks.gpt import GPT
from launcher.tasks.recorder import Recorder

SMALL = ("TASK.LAYERS", "2", "TASK.HEADS", "2", "TASK.WIDTH", "8", "TASK.CONTEXT", "6")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on several, above all where other tests run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def task(*words: str, config: str | None = None) -> BytesLM:
    words = words if config else ("TASK.NAME", "bytes-lm", *words)
    return BytesLM(load_config(config, words, resolve_task).cfg)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own, of which b.py and what is in c are in no order on disk."""
    for name in ("os.py", "c/z.py", "c/a.py", "b.py", "site-packages/torch.py", "c/data.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n" * 9)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    return tmp_path


def test_the_text_is_the_librarys_own_source_by_file_in_one_order() -> None:
    files = {split: source_files(split) for split in ("train", "val")}
    assert not files["train"].keys() & files["val"].keys()
    both = files["train"] | files["val"]
    folder = Path(sysconfig.get_path("stdlib"))
    tops = [top for top in folder.iterdir() if not top.name.endswith("-packages")]
    here = [p for top in tops for p in [top, *top.rglob("*.py")] if p.name.endswith(".py")]
    assert both == {p.relative_to(folder).as_posix(): p for p in here}
    assert [*files["train"]] == sorted(files["train"]) and [*files["val"]] == sorted(files["val"])
    sizes = {split: sum(p.stat().st_size for p in found.values()) for split, found in files.items()}
    assert 0.05 < sizes["val"] / sum(sizes.values()) < 0.2
    # On its side by its own name: the same with any other files, in any Python.
    assert "os.py" in files["train"] and "random.py" in files["val"]


def test_samples_are_the_bytes_of_their_splits_files(library: Path) -> None:
    (library / "random.py").write_text("val " * 20)
    small = task(*SMALL)
    train, val = small.build_dataset("train"), small.build_dataset("val")
    text = b"".join((library / name).read_bytes() for name in ("b.py", "c/a.py", "c/z.py", "os.py"))
    assert len(train) == (len(text) - 1) // 6 and len(val) == 79 // 6
    for tokens, following in train:
        assert bytes(tokens.tolist()) in text
        assert bytes(tokens.tolist() + following[-1:].tolist()) in text
    # Each once, in an order that is shuffled and always the same.
    order = [bytes(tokens.tolist()) for tokens, _ in val]
    held = (b"val " * 20)[: 6 * 13]
    assert Counter(order) == Counter(held[i : i + 6] for i in range(0, 78, 6))
    assert order == [bytes(tokens.tolist()) for tokens, _ in task(*SMALL).build_dataset("val")]
    other = task(*SMALL, "SEED", "1").build_dataset("train")
    assert [w[0].tolist() for w in train] != [w[0].tolist() for w in other]


def test_a_python_without_source_and_a_strange_split_are_told(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=f"{library} has none for val: use a Python that has"):
        task().build_dataset("val")
    with pytest.raises(UsageError, match="the splits train and val, not 'test'"):
        task().build_dataset("test")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library / "python.zip"))
    with pytest.raises(UsageError, match=r"the standard library, .*python\.zip: No such file"):
        task().build_dataset("train")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("TASK.LAYERS 0", r"TASK\.LAYERS must be at least 1, not 0"),
        ("TASK.HEADS 3", r"TASK\.WIDTH 128 is no multiple of TASK\.HEADS 3"),
        ("TASK.DROPOUT 1", r"TASK\.DROPOUT is from 0"),
        ("TASK.SHOW_BYTES -1", r"TASK\.SHOW_BYTES at least 0"),
    ],
)
def test_wrong_keys_are_named(words: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        task(*words.split())


def test_the_model_is_that_of_the_formulas_by_hand() -> None:
    """Pre-norm blocks, causal attention by heads, tanh GELU, tied embeddings."""
    torch.manual_seed(0)
    model = task(*SMALL).build_model().eval()
    for weight in model.parameters():  # biases and norms too
        torch.nn.init.normal_(weight, std=0.5)
    tokens = torch.randint(256, (3, 5))
    w = dict(model.named_parameters())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["tokens.weight"][tokens] + w["positions.weight"][:5]
    for i in range(2):
        of = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{of}.norm_attention"), f"{of}.qkv").split(8, dim=-1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 2  # the root of 4
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{of}.attention_out")
        h = linear(norm(x, f"{of}.norm_mlp"), f"{of}.mlp_in")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{of}.mlp_out")
    expected = norm(x, "norm") @ w["tokens.weight"].T
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)


def test_weights_begin_as_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(256, 64, layers=8, heads=4, width=64, dropout=0.0)
    assert (
        len([n for n, p in model.named_parameters() if p.shape == (256, 64) and "mlp" not in n])
        == 1
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.01 if name == "positions.weight" else 0.02
            std = 0.02 / 4 if "_out" in name else std  # the root of twice 8 layers
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
    # So that at first it knows nothing.
    loss = F.cross_entropy(model(torch.arange(64)[None])[0], torch.arange(64) * 3 % 256)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_flops_are_those_of_the_matrix_products() -> None:
    lm = task(*SMALL)
    model = lm.build_model()
    tokens = torch.randint(256, (2, 6))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm.train_step(model, (tokens, tokens))["loss"].backward()
    assert lm.flops() == counter.get_total_flops() / 2


def test_dropout_is_a_key_also_within_attention() -> None:
    tokens = torch.randint(256, (2, 6))
    model = task(*SMALL, "TASK.DROPOUT", "0.5").build_model()
    assert not torch.equal(model(tokens), model(tokens))
    torch.testing.assert_close(model.eval()(tokens), model(tokens))
    kept = model.train().blocks[0]
    kept.dropout.p, kept.dropout.training = 0.5, False  # in attention alone
    x = torch.randn(2, 6, 8)
    assert not torch.equal(kept(x), kept(x))
    model = task(*SMALL).build_model()
    torch.testing.assert_close(model(tokens), model(tokens))


def test_the_steps_agree_and_bf16_comes_near() -> None:
    lm = task(*SMALL)
    torch.manual_seed(0)
    model, batch = lm.build_model(), tuple(torch.randint(256, (2, 4, 6)))
    logits = model(batch[0])
    by_hand = -logits.log_softmax(-1).gather(2, batch[1][..., None]).mean()
    trained, tested = lm.train_step(model, batch), lm.eval_step(model, batch)
    assert sorted(tested) == sorted(lm.metrics()) and tested["loss"].shape == (4,)
    for found in (trained, tested):
        torch.testing.assert_close(found["loss"].mean(), by_hand)
        torch.testing.assert_close(found["bits_per_byte"].mean(), by_hand / math.log(2))
    with torch.autocast("cpu", torch.bfloat16):
        halved = lm.train_step(model, batch)["loss"]
        assert model(batch[0]).dtype == torch.bfloat16
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, by_hand, atol=0.03, rtol=0)


class Texts(Recorder):
    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def text(self, name: str, text: str) -> None:
        self.found[name] = text


def test_it_shows_what_it_writes_longer_than_its_context() -> None:
    lm = task(*SMALL, "TASK.SHOW_BYTES", "20")
    model = lm.build_model().eval()
    lengths = list[int]()

    def alphabet(tokens: torch.Tensor) -> torch.Tensor:
        """After each letter the next one, by heart."""
        lengths.append(tokens.shape[1])
        return F.one_hot((tokens + 1) % 256, 256) * 100.0

    model.forward = alphabet
    lm.recorder = Texts()
    lm.show(model)
    assert lm.recorder.found == {"sample": "```\n\ndef !\"#$%&'()*+,-./01234\n```"}
    assert lengths == [5] + [6] * 19
    lm.recorder = Texts()
    lm.cfg.defrost()
    lm.cfg.TASK.SHOW_BYTES = 0
    lm.show(model)
    assert lm.recorder.found == {}


@pytest.mark.parametrize(("size", "millions"), [("1m", 1), ("10m", 11), ("40m", 41), ("124m", 124)])
def test_the_configs_have_as_many_weights_as_they_say(size: str, millions: int) -> None:
    lm = task(config=f"bytes-lm-{size}")
    with torch.device("meta"):
        model = lm.build_model()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_the_smallest_is_soon_better_than_the_frequencies_of_bytes() -> None:
    lm = task("TASK.CONTEXT", "32", config="bytes-lm-1m")
    torch.manual_seed(0)
    train, val, model = lm.build_dataset("train"), lm.build_dataset("val"), lm.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), fused=True)
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 5)
        batch = default_collate(train.__getitems__([*range(16 * step, 16 * step + 16)]))
        optimizer.zero_grad()
        lm.train_step(model, batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held_out = default_collate([val[i] for i in range(200)])
    with torch.no_grad():
        bits = lm.eval_step(model, held_out)["bits_per_byte"].mean().item()
    text = b"".join(path.read_bytes() for path in source_files("train").values())
    shares = np.bincount(np.frombuffer(text, np.uint8), minlength=256) + 1.0
    unigram = -np.log2(shares / shares.sum())[held_out[1].numpy()].mean()
    assert 4.5 < unigram < 5.0 and bits < unigram - 0.1
