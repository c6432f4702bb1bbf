"""`python -m surgery.testing.loader`: loads a saved directory in a separate process, for the reload check."""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file

from surgery.store.load import load
from surgery.testing.case import tensors_of


def main() -> None:
    """Load a saved directory, run it on stored inputs, and write its state and outputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("inputs")
    parser.add_argument("result")
    parser.add_argument("--base")
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--load-threads", type=int, required=True)
    parser.add_argument("--run-threads", type=int, required=True)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    torch.set_num_threads(asked.load_threads)
    program = load(asked.directory, base=asked.base, trust=asked.trust)
    found = {f"state/{name}": tensor for name, tensor in program.state().items()}
    # Only loading must be independent of the number of threads. The run uses the same number as the first process,
    # since another order of summation changes the last bits.
    torch.set_num_threads(asked.run_threads)
    args, kwargs = torch.load(asked.inputs, weights_only=True)
    outputs = tensors_of(program.run(*args, **kwargs))
    found.update({f"output/{index}": tensor for index, tensor in enumerate(outputs)})
    save_file({name: t.detach().clone().contiguous() for name, t in found.items()}, asked.result)


if __name__ == "__main__":
    main()
