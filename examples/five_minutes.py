"""Five minutes: a network of one's own to 2.5 bits, with pictures of why, and a file to take away.

    python examples/five_minutes.py             # writes to five_minutes/ in the current folder

Replace data() and network() by your own; the rest stays.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import adq_train
from adq_train.cli.pareto import ParetoSettings
from adq_train.cli.pareto import run as draw_trade_off
from adq_train.reporting import plots


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits, 8 × 8, to train and to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def network() -> nn.Module:
    """Four convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int):
    """A training loop like any other; it knows nothing of quantization."""
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(x)).split(100):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in %."""
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def main(folder: str = "five_minutes", epochs: int = 15, seed: int = 0) -> dict[str, float]:
    """Top-1 of the float network, after calibration, after QAT, and of the exported file."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = data()
    out = Path(folder)
    out.mkdir(exist_ok=True)

    # 1. Your trained network.
    model = network()
    train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), x, y, epochs)
    found = {"float": accuracy(model, test_x, test_y)}

    # 2. Measure each layer at 2, 3 and 4 bits; choose at most 2.5 on average; calibrate.
    quantized = adq_train.quantize(model, [x[:200]], average_bits=2.5)
    found["calibrated"] = accuracy(quantized, test_x, test_y)
    for layer in quantized.adq.allocation.layers:
        print(f"layer {layer.name}: {layer.weight_bits} bits")

    # 3. Look: which layers suffer, and what other budgets would cost.
    table = quantized.adq.table
    plots.sensitivity(table).savefig(out / "sensitivity.png", dpi=110)
    (out / "sensitivity.json").write_text(table.to_json(), encoding="utf-8")
    draw_trade_off(ParetoSettings(str(out / "sensitivity.json"), points=20))

    # 4. Train on, at a fifth of the float rate; the levels follow the weights.
    groups = adq_train.parameter_groups(quantized, lr=0.02, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    adq_train.follow(quantized, optimizer)
    train(quantized, optimizer, x, y, epochs)
    found["qat"] = accuracy(quantized, test_x, test_y)

    # 5. Take it away: a small file that gives the same logits, bit for bit.
    file = str(out / "model.safetensors")
    adq_train.export(quantized, file, test_x[:16])
    packed = adq_train.load_packed(file, network=network())
    found["packed"] = accuracy(packed, test_x, test_y)
    found["packed_bytes"] = Path(file).stat().st_size
    found["float_bytes"] = 4 * sum(p.numel() for p in model.parameters())
    return found


if __name__ == "__main__":
    for what, figure in main(*sys.argv[1:2]).items():
        print(f"{what}: {figure:,.0f}" if "bytes" in what else f"{what}: {figure:.1f} %")
