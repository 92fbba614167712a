"""A module that is a script."""

import sys

sys.exit("this is no module")
