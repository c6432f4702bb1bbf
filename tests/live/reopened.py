"""Opens pickled live models in a process of its own, as a worker does; see test_pickle.py."""

from __future__ import annotations

import sys

import torch

import surgery


def main(source: str, target: str) -> None:
    """Run every model of a file as it comes out of the pickle, without its last passes, and without any."""
    models, ids = torch.load(source, weights_only=False)
    found = {}
    with torch.no_grad():
        for name, model in models.items():
            out = [model(ids).logits]
            model.train()
            torch.manual_seed(5)  # dropout
            out.append(model(ids).logits)
            model.eval()
            out.append(surgery.program_of(model).run(ids, attention_mask=torch.ones_like(ids))["logits"])
            surgery.remove_(model)
            out.append(model(ids).logits)
            found[name] = out
    torch.save(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
