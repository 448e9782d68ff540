"""``python -m adq_train`` does what ``adq-train`` does."""

from adq_train.cli import main

if __name__ == "__main__":
    main()
