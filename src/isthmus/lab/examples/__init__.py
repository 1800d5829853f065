"""Lab files that come with the package; ``demo`` is what ``isthmus lab demo`` and ``isthmus lab up`` bring up."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo" / "lab.yaml"
