"""``python -m adq_train`` does what ``adq-train`` does."""

from adq_train.program import train

if __name__ == "__main__":
    train()
