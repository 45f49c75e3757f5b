"""Being written."""
from pathlib import Path
def report(store: Path) -> Path:
    return store / "report.html"
