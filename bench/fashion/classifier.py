"""A small classifier, whose features tell how near drawn clothes are to real ones.

``python -m bench.fashion.classifier`` trains it, on the first 50,000 of the training pictures. The other 10,000 stand
beside the drawn ones in the scores: pictures that it has not seen, and that are real.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import NAMES, Split, load_fashion, to_unit

WEIGHTS = Path(__file__).parents[1] / "weights" / "fashion_classifier" / "model.safetensors"
FEATURES = 96
SEEN = 50_000  # of the training pictures
EPOCHS, BATCH, LR = 8, 128, 4e-3


class Classifier(nn.Module):
    """Three convolutions, a layer of features, and the classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.body = nn.Sequential()
        for index, (taken, given) in enumerate(pairwise(widths)):
            self.body.append(nn.Conv2d(taken, given, 3, padding=1, bias=False))
            self.body.append(nn.BatchNorm2d(given))
            self.body.append(nn.ReLU())
            if index < 2:
                self.body.append(nn.MaxPool2d(2))
        self.features_of = nn.Linear(64 * 7 * 7, FEATURES)
        self.drop = nn.Dropout(0.3)
        self.classes_of = nn.Linear(FEATURES, len(NAMES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, 96), from 0 up, and logits (n, 10) of pictures (n, 1, 28, 28) in 0…1."""
        features = torch.relu(self.features_of(self.body(pictures * 2 - 1).flatten(1)))
        return features, self.classes_of(self.drop(features))


def load_classifier(path: str | Path = WEIGHTS) -> Classifier:
    """The trained classifier, in float32 and eval mode.

    Raises:
        FileNotFoundError: there are no weights.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there: train it with `python -m bench.fashion.classifier`")
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def train(data: Split, *, epochs: int = EPOCHS, seed: int = 0, say: bool = True) -> Classifier:
    """A new classifier; the learning rate rises and falls once."""
    torch.manual_seed(seed)
    model, order = Classifier().train(), torch.Generator().manual_seed(seed)
    steps = epochs * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    with torch.enable_grad():
        for epoch in range(epochs):
            total = 0.0
            for chosen in torch.randperm(len(data), generator=order).split(BATCH)[: len(data) // BATCH]:
                logits = model(to_unit(data.pictures[chosen]))[1]
                loss = nn.functional.cross_entropy(logits, data.labels[chosen].long())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                rate.step()
                total += loss.item()
            if say:
                print(f"epoch {epoch + 1} of {epochs}: loss {total / (len(data) // BATCH):.3f}", flush=True)
    return model.eval()


def part(data: Split, first: int, end: int | None = None) -> Split:
    """Some of the pictures, in the order of the files."""
    return Split(data.pictures[first:end], data.labels[first:end])


@torch.no_grad()
def look(model: Classifier, pictures: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Features and probabilities of pictures in 0…1, or in bytes, in float64."""
    parts = [model(to_unit(part) if part.dtype == torch.uint8 else part) for part in pictures.split(batch)]
    features, logits = (torch.cat(each).double() for each in zip(*parts, strict=True))
    return features, logits.softmax(-1)


def accuracy(model: Classifier, data: Split) -> float:
    """The share that is told rightly."""
    return (look(model, data.pictures)[1].argmax(-1) == data.labels).double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fashion.classifier", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the four idx files (default: where Debian puts them)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one epoch on 5,000 pictures, to try it out")
    options = parser.parse_args(arguments)
    from safetensors.torch import save_file

    data, begun = load_fashion("train", options.data), time.process_time()
    seen = 5_000 if options.quick else SEEN
    model = train(part(data, 0, seen), epochs=1 if options.quick else options.epochs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in model.state_dict().items()}, options.out)
    kept = load_classifier(options.out)  # what is measured is what was written, in half precision
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {time.process_time() - begun:.0f} s of processor time")
    print(f"accuracy on the {seen:,} it was trained on: {accuracy(kept, part(data, 0, seen)):.2%}")
    print(f"accuracy on the others: {accuracy(kept, part(data, SEEN)):.2%}")
    print(f"accuracy on the test pictures: {accuracy(kept, load_fashion('test', options.data)):.2%}")


if __name__ == "__main__":
    main()
