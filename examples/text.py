"""Text classification: from which package of Python's standard library is a piece of source?

An embedding of words and convolutions; no download, as the texts come with Python.
"""

import collections
import re
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adq_train

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "urllib", "xml")
WORDS, LENGTH = 1000, 24


def pieces(package: str) -> list[list[str]]:
    """The words of a package's files, LENGTH at a time, without those that name it."""
    folder = Path(sysconfig.get_paths()["stdlib"], package)
    found = []
    for path in sorted(folder.rglob("*.py")):
        words = re.findall(r"[A-Za-z]{3,}", path.read_text("utf-8", errors="ignore").lower())
        words = [word for word in words if package not in word]
        found += [words[i : i + LENGTH] for i in range(0, len(words) - LENGTH, LENGTH)]
    return found[:1500]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Word numbers (N, LENGTH), 0 for rare ones, and packages (N,), to train and to test."""
    texts = [(words, label) for label, name in enumerate(PACKAGES) for words in pieces(name)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    split = int(0.8 * len(texts))
    training = [texts[i] for i in order[:split]]
    counts = collections.Counter(word for words, _ in training for word in words)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 1), 1)}
    x = torch.tensor([[number.get(word, 0) for word in texts[i][0]] for i in order])
    y = torch.tensor([texts[i][1] for i in order])
    return x[:split], y[:split], x[split:], y[split:]


class TextNet(nn.Module):
    """Word numbers (N, LENGTH) to logits (N, packages)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.conv1 = nn.Conv1d(32, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the packages."""
        x = F.relu(self.conv1(self.embedding(words).transpose(1, 2)))
        x = F.relu(self.conv2(x)).amax(2)
        return self.head(F.relu(self.hidden(F.dropout(x, 0.3, self.training))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int):
    """Minimises the cross-entropy, with a rate that falls to zero."""
    model.train()
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right answers in per cent."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main(epochs: int = 5, images: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Accuracy of the float network, after calibration and after QAT."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data()
    x, y = x[:images], y[:images]
    model = TextNet()
    train(model, torch.optim.AdamW(model.parameters(), 3e-3), x, y, epochs)
    found = {"float": accuracy(model, test_x, test_y)}

    quantized = adq_train.quantize(model, [(x[:256], y[:256])], average_bits=2.5)
    found["calibrated"] = accuracy(quantized.eval(), test_x, test_y)

    optimizer = torch.optim.AdamW(adq_train.parameter_groups(quantized, 1e-3, weight_decay=0.01))
    adq_train.follow(quantized, optimizer)
    train(quantized, optimizer, x, y, epochs)
    found["qat"] = accuracy(quantized, test_x, test_y)
    return found


if __name__ == "__main__":
    print(main(seed=int(sys.argv[1]) if sys.argv[1:] else 0))
