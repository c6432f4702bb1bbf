"""Reads and writes PEFT checkpoints (`adapter_config.json`, `adapter_model.safetensors`).

LoRA, IA³, prefixes and prompts need no PEFT. Checkpoints of other types are read through the weights that PEFT merges,
and what is written is checked by PEFT where it is installed (`library.py`, `loads.py`).
"""

from surgery.store.peft.reading import import_peft
from surgery.store.peft.writing import export_peft

__all__ = ["export_peft", "import_peft"]
