"""What sentence-transformers asks of optimum-onnx for `backend="onnx"`, over onnxruntime.

optimum-onnx 0.1.0 needs transformers before 4.58, which this project does not run with. The stand-in has its interface,
finds the file where it does, and insists on the inputs and the output that it insists on. The real one is run by
test_sentence.py where OPTIMUM_PYTHON names an interpreter that has it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnxruntime
import torch


class ORTModelForFeatureExtraction:
    """An ONNX file that gives `last_hidden_state`."""

    def __init__(self, path: Path, config) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [each.name for each in self.session.get_inputs()]
        self.config, self.device = config, torch.device("cpu")
        self._save_pretrained = None

    @classmethod
    def from_pretrained(cls, name, *, config, export, file_name="model.onnx", subfolder="", **_):
        assert not export, "the library did not find the file, and would export the model itself"
        return cls(Path(name) / subfolder / file_name, config)

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, *, return_dict=True
    ) -> SimpleNamespace | dict:
        if token_type_ids is None and "token_type_ids" in self.names:
            token_type_ids = torch.zeros_like(input_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        outputs = [each.name for each in self.session.get_outputs()]
        values = self.session.run(None, {name: given[name].numpy() for name in self.names})
        return {
            "last_hidden_state": torch.from_numpy(
                dict(zip(outputs, values, strict=True))["last_hidden_state"]
            )
        }

    __call__ = forward

    def to(self, *_: object, **__: object) -> ORTModelForFeatureExtraction:
        return self


def install(monkeypatch) -> None:
    """Let `optimum.onnxruntime` be the stand-in."""
    made = ModuleType("optimum.onnxruntime")
    for task in ("CausalLM", "FeatureExtraction", "MaskedLM", "SequenceClassification"):
        setattr(made, f"ORTModelFor{task}", ORTModelForFeatureExtraction)
    made.ONNX_WEIGHTS_NAME = "model.onnx"
    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", made)
