"""Binary classification with one logit: tumours, malign or benign (scikit-learn, 569 rows)."""

import sys

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

import adq_train


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised measurements and 0 or 1, to train and to test."""
    raw = load_breast_cancer()
    x, y = (torch.tensor(part, dtype=torch.float32) for part in (raw.data, raw.target))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x[order] - x.mean(0)) / x.std(0), y[order, None]
    return x[:369], y[:369], x[369:], y[369:]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int):
    """Minimises the binary cross-entropy."""
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(41):
            loss = F.binary_cross_entropy_with_logits(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right answers in per cent."""
    return 100 * float(((model(x) > 0) == (y > 0.5)).float().mean())


def main(epochs: int = 20, seed: int = 0) -> dict[str, float]:
    """Accuracy of the float network, after calibration and after QAT."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data()
    model = nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    train(model, torch.optim.AdamW(model.parameters(), 1e-3), x, y, epochs)
    found = {"float": accuracy(model, test_x, test_y)}

    # Pairs of inputs and targets; Ω is by how much the loss rises.
    quantized = adq_train.quantize(
        model, [(x, y)], average_bits=2.5, loss=F.binary_cross_entropy_with_logits
    )
    found["calibrated"] = accuracy(quantized.eval(), test_x, test_y)

    optimizer = torch.optim.AdamW(adq_train.parameter_groups(quantized, 3e-4, weight_decay=0.01))
    adq_train.follow(quantized, optimizer)
    train(quantized, optimizer, x, y, epochs)
    found["qat"] = accuracy(quantized, test_x, test_y)
    return found


if __name__ == "__main__":
    print(main(seed=int(sys.argv[1]) if sys.argv[1:] else 0))
