"""The commands umbrella-train, -eval, -predict, -app and -report. None of them imports torch to parse its arguments."""

from umbrella_train.cli.app import app_command
from umbrella_train.cli.evaluate import eval_command
from umbrella_train.cli.predict import predict_command
from umbrella_train.cli.report import report_command
from umbrella_train.cli.train import train_command

__all__ = ["app_command", "eval_command", "predict_command", "report_command", "train_command"]
