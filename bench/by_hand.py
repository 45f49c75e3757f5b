"""What is otherwise written to curate: pandas, scikit-learn and datasets over the Parquet files of a store.

    python -m bench.by_hand STORE ROUNDS K SCORER…     one JSON line: by stage seconds and peak memory

It stands apart from all that loads FAISS: beside its OpenMP, scikit-learn's search for neighbours falls to one thread.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from bench.peak import Peak

OUT = "theirs.parquet"  # beside the store


def curate(store: Path, rounds: int, k: int, scorers: list[str]) -> dict[str, Any]:
    """The stages of `bench.scale.ours`, all pairs, a round at a time where that takes less memory."""
    datasets.disable_progress_bars()
    tables, watch, kept = store / "tables", Peak(), {}

    def read(table: str, folder: str, columns: list[str]) -> pd.DataFrame:
        files = sorted((tables / table / folder).rglob("*.parquet"))
        return pd.concat([pd.read_parquet(file, columns=columns) for file in files], ignore_index=True)

    def vectors(folder: str) -> tuple[np.ndarray, np.ndarray]:
        found = read("embeddings", folder, ["sample_id", "vector"])
        return found["sample_id"].to_numpy(), np.stack(found["vector"].to_numpy()).astype(np.float32)

    def reference() -> None:
        _, d0 = vectors("round-0")
        kept["index"] = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(d0)
        kept["own"] = kept["index"].kneighbors()[0].mean(axis=1)  # each row left out of its own neighbours

    def distance() -> None:
        for number in range(1, rounds + 1):
            ids, x = vectors(f"round-{number}")
            kept[number] = pd.DataFrame({"sample_id": ids, "distance": kept["index"].kneighbors(x)[0].mean(axis=1)})

    def select() -> None:
        for number in range(1, rounds + 1):
            scores = read("scores", f"round-{number}", ["sample_id", "scorer", "value"])
            wide = scores.pivot(index="sample_id", columns="scorer", values="value").reset_index()
            wide = wide.merge(read("samples", f"round-{number}", ["sample_id", "prompt_id"]), on="sample_id")
            wide["rank"] = wide.groupby("prompt_id")[scorers].rank(pct=True).mean(axis=1)
            best = wide.sort_values(["rank", "sample_id"], ascending=[False, True]).groupby("prompt_id").head(1)
            kept[number] = best.merge(kept[number], on="sample_id")

    def weigh() -> None:
        beta, tail = np.quantile(kept["own"], [0.9, 0.99])
        for number in range(1, rounds + 1):
            far = kept[number]["distance"]
            kept[number]["weight"] = np.where(far <= beta, 1.0, np.exp(-(far - beta) / (tail - beta)))

    def export() -> None:
        chosen = pd.concat([kept[number] for number in range(1, rounds + 1)])
        files = [str(file) for number in range(1, rounds + 1)
                 for file in (tables / "samples" / f"round-{number}").rglob("*.parquet")]  # fmt: skip
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(store.parent / "cache"))
        place = pd.Series(np.arange(len(rows)), index=np.array(rows["sample_id"]))
        some = rows.select(place[chosen["sample_id"]].to_numpy())
        for name in ("weight", *scorers):
            some = some.add_column(name, chosen[name].to_numpy())
        some.to_parquet(str(store.parent / OUT))

    for stage in (reference, distance, select, weigh, export):
        watch("D_0" if stage is reference else stage.__name__, stage)
    return watch.found


if __name__ == "__main__":
    home, count, nearest, *names = sys.argv[1:]
    print(json.dumps(curate(Path(home), int(count), int(nearest), names)))
