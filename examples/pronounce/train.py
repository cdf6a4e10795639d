"""Trains the model: progress bar, checkpoints, Ctrl-C and --resume.

python -m examples.pronounce.train --recipe default --output examples/pronounce/runs/default
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import PAD, Batch, Dictionary, TrainingSet, load_dictionary, split_dictionary, subset
from .evaluate import pronounce_words, total_score
from .model import Config, Pronouncer

RUNS = Path(__file__).resolve().parent / "runs"
DEV_WORDS = 1000  # for the scores during training


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW; the learning rate rises for 10 % of the steps and falls to 0 along a cosine."""

    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: float = 0.1
    label_smoothing: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    seed: int = 1

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        warmup_steps = self.warmup * total_steps
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


RECIPES = {
    "default": (Config(), Recipe()),
    "full": (
        Config(width=192, feedforward=768, encoder_layers=3, dropout=0.1),
        Recipe(epochs=13, learning_rate=1.5e-3),
    ),
}


class StopRequest:
    """Turns the first Ctrl-C into a flag, so that no step is left half done; a second one stops."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


class Trainer:
    """The state of a training run; everything that a checkpoint holds."""

    def __init__(
        self, config: Config, recipe: Recipe, training_set: TrainingSet, device: str = "cpu"
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.config, self.recipe, self.training_set = config, recipe, training_set
        self.device = torch.device(device)
        self.model = Pronouncer(config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0  # of training, over all sessions
        self.steps_per_epoch = training_set.steps_per_epoch(recipe.batch_size)
        self.total_steps = recipe.epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def train_step(self, batch: Batch) -> Tensor:
        """One update; returns the loss of the batch, in nats per phone."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step, self.total_steps)
        batch = batch.to(self.device)
        logits = self.model(batch.letters, batch.letter_lengths, batch.phones[:, :-1])
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            batch.phones[:, 1:].flatten(),
            ignore_index=PAD,
            label_smoothing=self.recipe.label_smoothing,
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def save(self, path: Path) -> None:
        """Writes beside the old checkpoint first: a crash never leaves half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "config": dataclasses.asdict(self.config),
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "random_state": torch.get_rng_state(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Goes on exactly where the checkpoint was written, in the middle of an epoch too.

        (On a GPU with dropout: not with the same random numbers.)
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = {"config": dataclasses.asdict(self.config)}
        ours["recipe"] = dataclasses.asdict(self.recipe)
        for part, values in ours.items():
            if state[part] != values:
                raise ValueError(
                    f"cannot resume {path}: it was written with the {part} {state[part]}, "
                    f"this run has {values}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random_state"])

    def batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        return self.training_set.epoch(self.recipe.batch_size, generator, first_batch)


def train(trainer: Trainer, checkpoint: Path, dev_words: Dictionary) -> bool:
    """Trains to the end or to Ctrl-C; either way the checkpoint is written. True at the end."""
    trainer.model.train()
    start = time.monotonic() - trainer.seconds
    average: Tensor | None = None  # of the loss, over about the last 100 steps
    with (
        StopRequest() as stop,
        tqdm(total=trainer.total_steps, initial=trainer.step, unit="step", mininterval=0.5) as bar,
    ):
        while not trainer.finished:
            epoch, first_batch = divmod(trainer.step, trainer.steps_per_epoch)
            bar.set_description(f"epoch {epoch + 1}/{trainer.recipe.epochs}")
            for batch in trainer.batches(epoch, first_batch):
                loss = trainer.train_step(batch)
                average = loss if average is None else average.lerp(loss, 0.01)
                if trainer.step % 20 == 0:
                    bar.set_postfix(loss=f"{float(average):.3f}", refresh=False)
                bar.update()
                trainer.seconds = time.monotonic() - start
                if stop.requested:
                    trainer.save(checkpoint)
                    return False
            trainer.save(checkpoint)
            trainer.model.eval()
            pronounced = pronounce_words(
                trainer.model.greedy, list(dev_words), device=str(trainer.device)
            )
            trainer.model.train()
            score = total_score({w: item.phones for w, item in pronounced.items()}, dev_words)
            bar.write(f"epoch {epoch + 1}: loss {float(average):.3f}, dev {score}")
    return True


def run(
    recipe_name: str,
    output: Path,
    resume: bool = False,
    device: str = "cpu",
    dictionary: Path | None = None,
    epochs: int | None = None,
) -> Trainer:
    """Trains by a named recipe into output/checkpoint.pt; unfinished if Ctrl-C ended it early."""
    config, recipe = RECIPES[recipe_name]
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs)
    words = load_dictionary(dictionary)
    checkpoint = output / "checkpoint.pt"
    training_set = TrainingSet(split_dictionary(words, "train"))
    trainer = Trainer(config, recipe, training_set, device)
    if resume and checkpoint.is_file():
        trainer.resume(checkpoint)
        print(f"resuming {checkpoint} at step {trainer.step} of {trainer.total_steps}")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{len(training_set)} pronunciations to learn, {parameters:,} parameters, {config}")
    if not train(trainer, checkpoint, subset(split_dictionary(words, "dev"), DEV_WORDS)):
        print(f"stopped at step {trainer.step}; {checkpoint} is usable, --resume goes on from it")
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--output", type=Path, help="folder of the checkpoint (runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint there")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dictionary", type=Path, help="a file in the format of cmudict.dict")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's default)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    output = args.output or RUNS / args.recipe
    trainer = run(args.recipe, output, args.resume, args.device, args.dictionary, args.epochs)
    sys.exit(0 if trainer.finished else 130)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
