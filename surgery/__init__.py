"""surgery: plugin-based model surgery for PyTorch.

>>> import surgery
>>> program = surgery.load("hf:path/to/model").apply(surgery.Lora(target="attn.*", rank=8))
>>> module = program.module()          # train it with any loop
>>> program.merge().export("model.onnx")
"""

from surgery.errors import SurgeryError
from surgery.journal import Entry, Journal
from surgery.loading import capture, load
from surgery.passes import Freeze, Lora
from surgery.program import Program

__version__ = "0.1.0"

__all__ = ["Entry", "Freeze", "Journal", "Lora", "Program", "SurgeryError", "__version__", "capture", "load"]
