"""`python -m umbrella_train` is `umbrella-train`, for torchrun and accelerate."""

from umbrella_train.cli import train_command

if __name__ == "__main__":
    train_command()
