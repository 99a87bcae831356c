"""`python -m yopo.cli`, where `yopo` is not on the path."""

import sys

from yopo.cli import main

sys.exit(main())
