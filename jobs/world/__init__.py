"""The embedded world: captioned scenes of real handwritten digits, small enough to improve on a laptop."""

from pathlib import Path

#: What ``make base`` built: pipeline/, clip/, reader.safetensors, judge.safetensors, real.parquet,
#: scenes.parquet, card.json.
WEIGHTS = Path(__file__).parent / "weights"
