"""Reads and writes PEFT checkpoints (`adapter_config.json`, `adapter_model.safetensors`) without the PEFT library."""

from surgery.store.peft.reading import import_peft
from surgery.store.peft.writing import export_peft

__all__ = ["export_peft", "import_peft"]
