"""python -m expertstream"""

import sys

from .cli import main

sys.exit(main())
