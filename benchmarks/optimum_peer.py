"""Generation with optimum's ONNX export of a transformers directory, for benchmarks/generation.py.

It runs in a separate Python: `python optimum_peer.py DIR OUT THREADS`. Each line of JSON on standard input is answered
with a line of tokens.
"""

from __future__ import annotations

import json
import sys

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(folder: str, out: str, threads: int) -> None:
    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    ORTModelForCausalLM.from_pretrained(folder, export=True).save_pretrained(out)
    model = ORTModelForCausalLM.from_pretrained(out, session_options=options)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor(asked["ids"])
        given = {"max_new_tokens": asked["tokens"], "min_new_tokens": asked["tokens"], "do_sample": False}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **given)
        print(json.dumps(found[0].tolist()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
