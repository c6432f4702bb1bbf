"""Plugins as pip installs them, in a folder for PYTHONPATH: a module and a .dist-info with an entry point."""

from __future__ import annotations

from pathlib import Path

PASS = '''
from surgery.api import RewritePass, hookimpl

class {cls}(RewritePass):
    """Changes nothing."""
    name = "{name}"
    def rewrite(self, site, g):
        return g.call(__import__("torch").ops.aten.add.Tensor, g.output, 0)

@hookimpl
def surgery_passes():
    return [{cls}]
'''

COMMAND = '''
@hookimpl
def surgery_commands(cli):
    import click

    @cli.command()
    def hello():
        """Says hello."""
        click.echo("hello from a plugin")
'''


def install(folder: Path, distribution: str, source: str, version: str = "1.2") -> Path:
    """Write a distribution with one module that its entry point of group `surgery` names."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[surgery]\n{module} = {module}\n")
    return folder
