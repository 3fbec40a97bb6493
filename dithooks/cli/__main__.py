"""``python -m dithooks.cli``: the ``dithooks`` command."""

import sys

from .main import main

sys.exit(main())
