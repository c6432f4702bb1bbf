"""`make techniques`. The work is in another module: worker processes cannot import a package's main one."""

import sys

from tests.techniques.table import main

sys.exit(main())
