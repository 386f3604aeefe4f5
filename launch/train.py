"""`jaxalign train` for people who work from a clone: python launch/train.py --config=FILE [--config.field=value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxalign.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    sys.exit(main())
