"""Let torchvision import beside a CPU build of torch, for which it has no compiled operators.

timm imports torchvision, whose wheel is built for another torch: registering fake kernels for operators that
do not exist fails at import. This writes a .pth file into the environment that puts an empty module in the
place of that registration. It is for development only; the product never does it.
"""

import sysconfig
from pathlib import Path

LINE = (
    "import sys, types; "
    "sys.modules.setdefault('torchvision._meta_registrations', types.ModuleType('torchvision._meta_registrations'))\n"
)

if __name__ == "__main__":
    Path(sysconfig.get_paths()["purelib"], "surgery_dev_torchvision.pth").write_text(LINE)
