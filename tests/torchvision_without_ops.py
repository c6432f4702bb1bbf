"""Lets torchvision be imported with a CPU build of torch, for which it has no compiled operators.

timm imports torchvision, whose wheel is built for another torch: registering fake kernels for missing operators fails
at import. This script writes a .pth file into the environment that replaces the registration by an empty module. It is
for development only; surgery itself never does this.
"""

import sysconfig
from pathlib import Path

LINE = (
    "import sys, types; "
    "sys.modules.setdefault('torchvision._meta_registrations', types.ModuleType('torchvision._meta_registrations'))\n"
)

if __name__ == "__main__":
    Path(sysconfig.get_paths()["purelib"], "surgery_dev_torchvision.pth").write_text(LINE)
