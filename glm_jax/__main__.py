"""`python -m glm_jax` is the command line, also from a checkout with PYTHONPATH=. and nothing installed."""

import sys

from glm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
