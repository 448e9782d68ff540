"""Regression: from ten measurements to the progress of diabetes (scikit-learn, 442 rows)."""

import sys

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

import adq_train


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised measurements and progress, to train and to test."""
    raw = load_diabetes()
    x, y = (torch.tensor(part, dtype=torch.float32) for part in (raw.data, raw.target))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = ((part - part.mean(0)) / part.std(0) for part in (x[order], y[order, None]))
    return x[:342], y[:342], x[342:], y[342:]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int):
    """Minimises the squared error."""
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(38):
            loss = F.mse_loss(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def explained(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of the variance that the network explains, R²."""
    return 1 - float((model(x) - y).square().mean() / y.var(unbiased=False))


def main(epochs: int = 30, seed: int = 0) -> dict[str, float]:
    """R² of the float network, after calibration and after QAT."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data()
    model = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    train(model, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1), x, y, epochs)
    found = {"float": explained(model, test_x, test_y)}

    # One output for each input, so Ω is the squared distance of the outputs.
    quantized = adq_train.quantize(model.eval(), [x], average_bits=3)
    found["calibrated"] = explained(quantized.eval(), test_x, test_y)

    groups = adq_train.parameter_groups(quantized, lr=3e-4, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    adq_train.follow(quantized, optimizer)
    train(quantized, optimizer, x, y, epochs)
    found["qat"] = explained(quantized, test_x, test_y)
    return found


if __name__ == "__main__":
    print(main(seed=int(sys.argv[1]) if sys.argv[1:] else 0))
