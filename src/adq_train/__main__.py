"""``python -m adq_train`` does what ``adq-train`` does."""

from adq_train.cli.program import train

if __name__ == "__main__":
    train()
