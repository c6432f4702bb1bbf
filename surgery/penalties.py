"""Alias of `surgery.train.penalties`, the documented name of the loss terms for a training loop of your own."""

from surgery.train import penalties as _penalties
from surgery.train.penalties import *  # noqa: F403

__all__ = [name for name in vars(_penalties) if not name.startswith("_")]
