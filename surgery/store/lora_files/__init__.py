"""Reads and writes LoRA files of image models: the key formats of diffusers, PEFT and kohya's scripts.

One file holds the factors of several models of a pipeline, and a program is one of them. `names.py` and `flux.py` have
the names of modules in kohya's format, `keys.py` the forms of keys.
"""

from surgery.store.lora_files.reading import import_lora, parts_in
from surgery.store.lora_files.writing import FORMATS, export_lora

__all__ = ["FORMATS", "export_lora", "import_lora", "parts_in"]
