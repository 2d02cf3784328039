"""python -m communicators.cli"""

import sys

from . import main

sys.exit(main())
