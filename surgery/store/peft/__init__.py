"""PEFT's checkpoints, both ways, without PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from surgery.store.peft.reading import import_peft
from surgery.store.peft.writing import export_peft

__all__ = ["export_peft", "import_peft"]
