"""`jaxalign train` for people who work from a clone: python launch/train.py --config=FILE [--config.field=value ...]"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("absl", "ml_collections", "jax", "flax", "optax")  # what a run imports first


def main():
    """Runs the command, or says which Python can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or sys.version_info < (3, 11):
        found = "{}, Python {}.{}".format(sys.executable, *sys.version_info[:2])
        python = os.path.join(os.environ.get("JAXALIGN_VENV", os.path.relpath(str(ROOT / ".venv"))), "bin", "python")
        setup, script = (os.path.relpath(str(ROOT / "launch" / name)) for name in ("setup.sh", "train.py"))
        print("found:    " + found + (", without " + ", ".join(missing) if missing else ""), file=sys.stderr)
        print("expected: the Python of the environment that set-up makes", file=sys.stderr)
        print(f"fix:      bash {setup}, then {python} {script} --config=FILE", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from jaxalign.cli import main as run

    return run(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
