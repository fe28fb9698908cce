import sys

from opsd.cli import main

sys.exit(main())
