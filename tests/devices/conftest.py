"""A process of its own for the second device: torch cannot forget a device once it knows it."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch


def _ready() -> None:
    from tests.shared.device import register

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    register()


@pytest.fixture(scope="session")
def apart():
    """Function (function, *arguments) -> its result in a process that has the device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_ready) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
