"""PEFT's checkpoints, both ways, without PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from surgery.peft_format.reading import import_peft
from surgery.peft_format.writing import export_peft

__all__ = ["export_peft", "import_peft"]
