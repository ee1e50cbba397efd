"""Hugging Face accelerate: the loop is one's own, the set-up is not."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from common import LOG_EVERY, build_data, build_model, build_optimizer, loader_options, report, spec
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


def main() -> None:
    asked = spec()
    accelerator = Accelerator(
        cpu=True,
        log_with="tensorboard",
        project_dir=asked.out,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    accelerator.init_trackers("tensorboard")
    model = build_model()
    optimizer = build_optimizer(model.parameters())
    loader = DataLoader(
        build_data(asked.data),
        asked.batch,
        shuffle=True,
        **loader_options(asked),
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = epoch = 0
    saved = Path(asked.out, "checkpoint")
    if asked.epochs and (saved / "epoch").exists():
        accelerator.load_state(str(saved))
        epoch = int((saved / "epoch").read_text())
    while epoch < asked.epochs or step < asked.steps:
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                accelerator.log({"train/loss": loss.item()}, step)
            if step == asked.steps:
                break
        epoch += 1
        if asked.epochs:
            accelerator.save_state(str(saved))
            if accelerator.is_main_process:
                (saved / "epoch").write_text(str(epoch))
    accelerator.end_training()
    report(asked)


main()
