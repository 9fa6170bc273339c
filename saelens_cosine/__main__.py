"""`python -m saelens_cosine` is `saelens-cosine`."""

import sys

from saelens_cosine.cli import main

sys.exit(main())
