"""Exports: what other readers find in them, the same bytes always, and little memory."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ForkServer, files, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

import storage.commit
from bench.selection import part, random_file, selection
from jobs import recipe as recipes
from jobs import shards
from jobs.export import export, shards_of
from jobs.run import Run
from schemas.errors import WinnowError
from storage.snapshot import seal
from storage.verify import verify

BOTH = {"formats": ["parquet", "webdataset"], "rows": 20}
LINEAGE = ("prompt_id", "round", "arm", "model", "seed")


def picture(number: int, format: str = "png") -> bytes:
    """An image of one colour that tells its number."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(out, format)
    return out.getvalue()


def kept(numbers: np.ndarray) -> np.ndarray:
    return numbers % 3 > 0


def later(run: Run, numbers: np.ndarray) -> None:
    """Scores of another scorer for these samples."""
    columns = {"sample_id": numbers, "scorer": "late", "revision": "1", "value": 0.5, "truncated": False, "round": 1}
    seal(run.store, "made up", [part(run.store, "scores", {"scorer": "late"}, columns)], {})


def of_format(run: Run, format: str) -> list[Path]:
    found = rows(run.store, f"SELECT path FROM shards WHERE format = '{format}' ORDER BY path")
    return [run.store / row["path"] for row in found]


def exported(run: Run) -> dict[str, str]:
    """SHA-256 of every exported file, by its path."""
    return {
        path.relative_to(run.store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run.store / "shards").rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """70 samples in parts of 16, 47 of them kept, and 5 of 30 samples of D_0; both formats, 20 rows a file."""
    home = tmp_path_factory.mktemp("done")
    run = selection(home, 70, picture, export=BOTH | {"reference_share": 0.1}, keep=kept, d0=30, unit=16)
    export(run)
    return run


def test_rows_come_in_stored_order_and_those_of_d0_last(done: Run) -> None:
    numbers = [n for path in of_format(done, "parquet") for n in pq.read_table(path)["sample_id"].to_pylist()]
    chosen = [n for n in range(1, 71) if n % 3]
    assert numbers[:47] == chosen
    assert len(numbers) == 52 and numbers[47:] == sorted(set(numbers[47:])) and min(numbers[47:]) > 70
    assert [pq.read_metadata(path).num_rows for path in of_format(done, "parquet")] == [20, 20, 12]


def test_parquet_loads_as_images_texts_and_lineage(done: Run, tmp_path: Path) -> None:
    folder = of_format(done, "parquet")[0].parent
    # By folder alone, as diffusers' training scripts do with --dataset_name; they take the first two columns.
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))["train"]
    assert found.column_names[:3] == ["image", "text", "weight"]
    assert found.features["image"] == datasets.Image()
    assert {found.features[name].dtype for name in ("weight", "score:one", "score:two")} == {"float64"}
    assert len(found) == 52
    stored = {row["sample_id"]: row for row in rows(done.store, "SELECT * FROM samples")}
    for row in found:
        number = row["sample_id"]
        assert row["image"].getpixel((3, 0)) == (number % 256, 0, 7)
        own = number <= 70
        assert row["weight"] == (1 / (1 + number % 4) if own else 1.0)
        assert row["score:one"] == (number / 3 + 3 if own else None)
        assert row["score:two"] == (number / 3 + 3 if own and number % 5 else None)
        same = stored[number]
        assert row["text"] == same["prompt"] == f"a scene, number {number} — « ünïcode »"
        assert row["parent_id"] == (number - 1 if number % 3 == 0 else None)
        assert {name: row[name] for name in LINEAGE} == {name: same[name] for name in LINEAGE}
        assert row["key"] == str(number)


def test_images_are_the_stored_bytes(done: Run) -> None:
    for path in of_format(done, "parquet"):
        for row in pq.read_table(path, columns=["sample_id", "image"]).to_pylist():
            assert row["image"] == {"bytes": picture(row["sample_id"]), "path": f"{row['sample_id']}.png"}


def tar_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """What the webdataset package reads. It leaves files open, which Python warns of when they are collected."""
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
        gc.collect()
    return found


def test_webdataset_reads_the_tars(done: Run) -> None:
    found = tar_rows(of_format(done, "webdataset"))
    parquet = [row for path in of_format(done, "parquet") for row in pq.read_table(path).to_pylist()]
    assert len(found) == len(parquet) == 52
    for sample, row in zip(found, parquet, strict=True):
        assert sample["__key__"] == row["key"] and "." not in row["key"]
        assert sample["png"] == row["image"]["bytes"] and sample["txt"].decode() == row["text"]
        told = json.loads(sample["json"])
        assert told.pop("scores") == {"one": row["score:one"], "two": row["score:two"]}
        assert told.pop("parent_id") == (row["parent_id"] or 0)
        assert told == {name: row[name] for name in ("weight", "sample_id", *LINEAGE)}


def test_tars_load_as_a_hugging_face_dataset(done: Run, tmp_path: Path) -> None:
    folder = of_format(done, "webdataset")[0].parent
    found = datasets.load_dataset("webdataset", data_dir=str(folder), split="train", cache_dir=str(tmp_path))
    assert len(found) == 52 and found.features["png"] == datasets.Image()
    assert found[9]["txt"] == f"a scene, number {found[9]['json']['sample_id']} — « ünïcode »"


def test_tars_are_plain(done: Run) -> None:
    for path in of_format(done, "webdataset"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert len(members) % 3 == 0 and len({member.name for member in members}) == len(members)
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")
            assert member.isreg() and member.pax_headers == {}
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
        assert listed.stdout.split() == [member.name for member in members] and not listed.stderr


@pytest.mark.parametrize(("format", "suffix"), [("jpeg", "jpg"), ("webp", "webp")])
def test_a_members_name_tells_what_the_file_is(tmp_path: Path, format: str, suffix: str) -> None:
    run = selection(tmp_path, 3, lambda n: picture(n, format), export={"formats": ["webdataset"]})
    export(run)
    found = tar_rows(of_format(run, "webdataset"))
    assert [sample[suffix] for sample in found] == [picture(n, format) for n in (1, 2, 3)]


def test_other_kinds_of_images_are_refused_by_tars_alone(tmp_path: Path) -> None:
    run = selection(tmp_path, 3, lambda n: picture(n, "gif" if n == 2 else "png"), export=BOTH)
    with pytest.raises(WinnowError, match="sample 2: its image file starts with b'GIF8.*set export.encode"):
        export(run)
    assert not list((run.store / "shards").glob("*webdataset*")) and not list((run.store / "staging").iterdir())
    assert [row["image"]["bytes"] for row in pq.read_table(shards_of(run)[0][0]).to_pylist()][1] == picture(2, "gif")


def test_tars_of_several_kinds_of_images_say_who_reads_them(tmp_path: Path, capsys: Any) -> None:
    run = selection(tmp_path, 10, lambda n: picture(n, "webp" if n > 10 else "png"), d0=10,
                    export={"formats": ["webdataset"], "reference_share": 0.5})  # fmt: skip
    export(run)
    assert "its images are png, webp; `webdataset` reads them so, `datasets` one kind alone" in capsys.readouterr().err
    assert [next(k for k in ("png", "webp") if k in row) for row in tar_rows(of_format(run, "webdataset"))] == [
        *["png"] * 10, *["webp"] * 5
    ]  # fmt: skip


def test_tars_load_where_only_later_rows_have_a_score(tmp_path: Path, capsys: Any) -> None:
    run = selection(tmp_path, 20, picture, export=BOTH)
    later(run, np.arange(11, 21))
    export(run)
    assert "without scores of late, which the first row has none of" in capsys.readouterr().err
    found = datasets.load_dataset(
        "webdataset", data_files=[str(path) for path in of_format(run, "webdataset")], split="train",
        cache_dir=str(tmp_path),
    )  # fmt: skip
    assert len(found) == 20 and all(set(row["scores"]) == {"one", "two"} for row in found["json"])
    assert pq.read_table(of_format(run, "parquet")[0])["score:late"].to_pylist() == [None] * 10 + [0.5] * 10


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_images_are_encoded_anew_where_asked(tmp_path: Path, format: str) -> None:
    run = selection(tmp_path, 5, picture, export={"encode": format})
    export(run)
    for row in pq.read_table(shards_of(run)[0][0]).to_pylist():
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (image.format or "").lower() == format and row["image"]["path"] == f"{row['sample_id']}.{format}"
        off = np.abs(np.asarray(image.convert("RGB"), int) - (row["sample_id"], 0, 7)).max()
        assert off <= (3 if format == "jpeg" else 0)


def test_names_of_scorers_stay_apart(tmp_path: Path) -> None:
    names = ("open_clip:local-dir:/a b/c", "hps-v2.1", "HPS-v2.1", "it's \"one\"")
    run = selection(tmp_path, 6, picture, export=BOTH, scorers=names)
    export(run)
    folder = shards_of(run)[0][0].parent
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    for row in found:
        for name in names:
            missing = name == names[-1] and row["sample_id"] % 5 == 0
            assert row[f"score:{name}"] == (None if missing else row["sample_id"] / 3 + len(name))
    told = json.loads(tar_rows(of_format(run, "webdataset"))[0]["json"])
    assert tuple(sorted(told["scores"])) == tuple(sorted(names))


# Trainers that know no weights.


def test_repeats_stand_for_the_weights(tmp_path: Path) -> None:
    change = BOTH | {"unweighted": "repeats", "total": 200, "reference_share": 0.2}
    run = selection(tmp_path, 50, picture, export=change, weight=lambda n: np.where(n % 5, n / 50, 0.0), d0=20, unit=16)
    export(run)
    weighted = [row for path, _ in shards_of(run) for row in pq.read_table(path).to_pylist()]
    assert len(weighted) == 60 and len({row["weight"] for row in weighted}) > 30  # what our own trainer reads
    found = [row for path in of_format(run, "parquet-repeats") for row in pq.read_table(path).to_pylist()]
    assert len(found) == 200 and {row["weight"] for row in found} == {1.0}
    assert len({row["key"] for row in found}) == 200
    counts = Counter(row["sample_id"] for row in found)
    d0 = {n for n in counts if n > 50}
    meant = {n: n / 50 for n in range(1, 51) if n % 5} | dict.fromkeys(d0, 1.0)
    each = 200 / (sum(meant.values()) + 10 - len(d0))  # each of the ten of D_0 comes at least four times
    assert len(d0) == 10 and not any(n % 5 == 0 for n in counts if n <= 50)
    for number, weight in meant.items():
        assert abs(counts[number] - each * weight) < 1, number
    for row in found:
        assert row["image"]["bytes"] == picture(row["sample_id"])
        assert row["key"].partition("-")[0] == str(row["sample_id"])
    tars = tar_rows(of_format(run, "webdataset-repeats"))
    assert [(s["__key__"], s["png"]) for s in tars] == [(r["key"], r["image"]["bytes"]) for r in found]
    assert verify(run.store).ok


def test_no_pattern_takes_repeats_for_the_weighted_rows(tmp_path: Path) -> None:
    run = selection(tmp_path, 20, picture, export={"unweighted": "repeats"})
    export(run)
    weighted = (run.store / "shards").glob(f"{run.arm}-r{run.round}-parquet-*/*.parquet")
    assert sorted(weighted) == sorted(path for path, _ in shards_of(run))


def test_a_second_export_is_refused_before_it_writes(tmp_path: Path) -> None:
    run = selection(tmp_path, 20, picture, export={"unweighted": "repeats"})
    export(run)
    before = files(run.store)
    for change in ({"rows": 3}, {"total": 99}):
        other = recipes.override(run.recipe, [(["export", key], value) for key, value in change.items()])
        with pytest.raises(WinnowError, match="sealed already, made with other settings"):
            export(replace(run, recipe=other))
    assert files(run.store) == before


def test_repeats_keep_the_number_of_rows(tmp_path: Path) -> None:
    run = selection(tmp_path, 50, picture, export={"unweighted": "repeats"})
    export(run)
    assert sum(pq.read_metadata(path).num_rows for path in of_format(run, "parquet-repeats")) == 50


def test_one_row_many_times_is_not_copied_into_one_group(tmp_path: Path) -> None:
    change = {"unweighted": "repeats", "total": 400, "rows": 10_000}
    run = selection(tmp_path, 3, random_file(2**20), export=change, weight=lambda n: np.where(n == 2, 1.0, 1e-9))
    export(run)
    (path,) = of_format(run, "parquet-repeats")
    groups = pq.ParquetFile(path).metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sum(sizes) == 400 and set(sizes[:-1]) == {64}  # 64 images of 1 MiB
    assert pq.read_table(path, columns=["key"])["key"].to_pylist()[:3] == ["2", "2-1", "2-2"]


def test_a_list_is_drawn_by_weight(tmp_path: Path) -> None:
    change = {"unweighted": "sampling", "total": 20_000}
    run = selection(tmp_path, 20, picture, export=change, weight=lambda n: np.where(n % 4, n / 20, 0.0))
    export(run)
    (path,) = of_format(run, "sampling")
    keys = path.read_text().splitlines()
    known = [row for shard, _ in shards_of(run) for row in pq.read_table(shard).to_pylist()]
    assert len(keys) == 20_000 and set(keys) <= {row["key"] for row in known}
    counts = Counter(map(int, keys))
    drawable = [n for n in range(1, 21) if n % 4]
    expected = np.array(drawable) / sum(drawable) * 20_000
    assert not any(counts[n] for n in range(4, 21, 4))
    assert chisquare([counts[n] for n in drawable], expected).pvalue > 1e-3
    assert {row["weight"] for row in known} == {n / 20 if n % 4 else 0.0 for n in range(1, 21)}
    assert rows(run.store, "SELECT rows FROM shards WHERE format = 'sampling'") == [{"rows": 20_000}]


# The same bytes always.


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_groups_hang_on_the_rows_alone(cuts: list[int], shard: int, most: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 30, sum(cuts)).tolist()
    whole = pa.table({"n": range(len(lengths)), "image": [{"bytes": bytes(n), "path": ""} for n in lengths]}
                     if lengths else {"n": pa.array([], pa.int64()), "image": pa.array([], shards.IMAGE)})  # fmt: skip
    ends = list(itertools.accumulate(cuts, initial=0))
    pieces = [whole.slice(a, b - a) for a, b in itertools.pairwise(ends)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGE_ROWS", most)
        patch.setattr(shards, "GROUP_BYTES", 60)
        found = [(number, table["n"].to_pylist()) for number, table in shards.groups(pieces, shard)]
    expected: list[tuple[int, list[int]]] = []
    for n, length in enumerate(lengths):
        number, last = n // shard, expected[-1] if expected else (-1, [])
        size = sum(lengths[i] for i in last[1]) + length
        if number == last[0] and len(last[1]) < most and size <= 60:
            last[1].append(n)
        else:
            expected.append((number, [n]))
    assert found == expected


def another(folder: Path) -> Run:
    return selection(folder, 70, picture, export=BOTH | {"encode": "webp"}, keep=kept, unit=16)


def again(folder: str) -> None:
    """What a killed process runs."""
    store = Path(folder) / "store"
    recipe = recipes.override(recipes.load("refine-only"), [(["export", k], v) for k, v in
                                                            (BOTH | {"encode": "webp"}).items()])  # fmt: skip
    export(Run(store, recipe.for_arm("curated")))


def test_threads_and_time_change_no_byte(tmp_path: Path) -> None:
    found = []
    for threads in (1, 4):
        run = another(tmp_path / str(threads))
        recipe = recipes.override(run.recipe, [(["threads"], threads)])
        before = pa.cpu_count()
        pa.set_cpu_count(threads)
        try:
            export(Run(run.store, recipe))
        finally:
            pa.set_cpu_count(before)
        found.append(exported(run))
    assert found[0] == found[1] and len(found[0]) == 6


def test_how_parts_were_cut_changes_no_byte(tmp_path: Path) -> None:
    found = []
    for unit in (16, 23):
        image = random_file(300_000)  # a few to a page
        run = selection(tmp_path / str(unit), 70, image, export=BOTH | {"rows": 40}, keep=kept, unit=unit)
        export(run)
        found.append({Path(path).name: sha for path, sha in exported(run).items()})
    assert found[0] == found[1] and len(found[0]) == 4


def test_killed_exports_end_with_the_same_bytes(forks: ForkServer, tmp_path: Path) -> None:
    whole = another(tmp_path / "whole")
    export(whole)
    run, killed, inside = another(tmp_path / "killed"), 0, 0
    for events in itertools.count(3, 5):
        forks.start("test_jobs_export:again", str(tmp_path / "killed"), log=tmp_path / "log", events=events)
        status = forks.wait()
        if status == 0:
            break
        assert status == -9, (tmp_path / "log").read_text()
        killed += 1
        inside += any(list(path.glob("train-*")) for path in (run.store / "staging").iterdir())
        assert verify(run.store).ok
        for path, sha in exported(run).items():
            assert exported(whole)[path] == sha
    assert killed > 5 and inside > 1
    assert exported(run) == exported(whole) and verify(run.store).ok
    manifest = "SELECT * FROM shards ORDER BY path"
    assert rows(run.store, manifest) == rows(whole.store, manifest)


def test_a_manifest_that_was_never_sealed_is_made_from_the_files(tmp_path: Path, monkeypatch: Any) -> None:
    change = BOTH | {"unweighted": "sampling", "total": 50}
    run = selection(tmp_path / "a", 70, picture, export=change, keep=kept, unit=16)
    with monkeypatch.context() as patch:
        patch.setattr("jobs.export.complete", lambda *_: True)
        export(run)
    assert not rows(run.store, "SELECT * FROM shards")
    export(run)
    other = selection(tmp_path / "b", 70, picture, export=change, keep=kept, unit=16)
    export(other)
    found = rows(run.store, "SELECT * FROM shards ORDER BY path")
    assert found == rows(other.store, "SELECT * FROM shards ORDER BY path") and len(found) == 7


def test_what_changes_bytes_changes_the_name(tmp_path: Path) -> None:
    def name(**change: Any) -> str:
        names = itertools.count()
        run = selection(tmp_path / str(len(list(tmp_path.iterdir()))) / str(next(names)), 12, picture, **change)
        return export(run)[-1].parent.name

    assert name() == name()
    others = [name(export={"rows": 5}), name(export={"encode": "webp"}), name(weight=lambda n: n / 12),
              name(keep=lambda n: n > 1), name(export={"unweighted": "repeats"})]  # fmt: skip
    assert len({name(), *others}) == 6
    assert name(scorers=("one",)) == name()  # a score that comes later leaves a finished export as it is


def test_every_file_is_flushed_once(tmp_path: Path, monkeypatch: Any) -> None:
    run = selection(tmp_path, 70, picture, export=BOTH)
    real, flushed = os.fsync, Counter()

    def fsync(handle: int) -> None:
        flushed[Path(os.readlink(f"/proc/self/fd/{handle}")).name] += 1
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    export(run)
    names = [path.rpartition("/")[2] for path in exported(run)]
    assert len(names) == 8 and {name: flushed[name] for name in names} == dict.fromkeys(names, 1)
    assert all(flushed[Path(path).parent.name] == 0 for path in exported(run))  # a folder is flushed before its rename
    assert flushed["shards"] >= 2


# What is sealed, and what may go wrong.


def test_the_manifest_lists_every_file(done: Run) -> None:
    listed = {row["path"]: row for row in rows(done.store, "SELECT * FROM shards")}
    found = exported(done)
    assert set(listed) == set(found) and len(found) == 6
    for path, sha in found.items():
        file, row = done.store / path, listed[path]
        if path.endswith(".tar"):
            with tarfile.open(file) as tar:
                count = sum(name.endswith(".txt") for name in tar.getnames())
        else:
            count = pq.read_table(file).num_rows
        assert (row["sha256"], row["bytes"], row["rows"]) == (sha, file.stat().st_size, count)
        assert row["format"] == {"tar": "webdataset", "parquet": "parquet"}[path.rpartition(".")[2]]
        assert (row["selection"], row["round"]) == ("curated", 1)
    assert {path for path, _ in shards_of(done)} == {done.store / path for path in found if path.endswith("parquet")}


def test_a_format_can_be_added_later(tmp_path: Path) -> None:
    run = selection(tmp_path, 30, picture, export={"rows": 20})
    export(run)
    before = exported(run)
    more = Run(run.store, recipes.override(run.recipe, [(["export", "formats"], ["parquet", "webdataset"])]))
    export(more)
    after = exported(run)
    assert {path: after[path] for path in before} == before and len(after) == 4
    assert [sha for _, sha in shards_of(more)] == list(before.values())
    with pytest.raises(WinnowError, match="made with other settings"):
        export(Run(run.store, recipes.override(run.recipe, [(["export", "rows"], 10)])))


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path, format: str, damage: str) -> None:
    run = selection(tmp_path, 50, picture, export=BOTH)
    export(run)
    before = exported(run)
    path = of_format(run, format)[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "changed" else data[:-1])
    (problem,) = verify(run.store).problems
    assert path.relative_to(run.store).as_posix() in problem and "remove its folder" in problem
    if damage != "changed":  # a whole read is verify's and the trainer's part
        with pytest.raises(WinnowError, match=f"{path.name}: .*remove its folder and run 'winnow export' again"):
            export(run)
    shutil.rmtree(path.parent)
    export(run)
    assert exported(run) == before and verify(run.store).ok


def test_shards_that_come_out_otherwise_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    run = selection(tmp_path, 5, picture, export={"formats": ["webdataset"]})
    (path,) = export(run)
    shutil.rmtree(path.parent)
    real = shards._members

    def members(sink: Any, table: pa.Table) -> None:
        texts = pa.array([text.replace("a scene", "b scene") for text in table["text"].to_pylist()])
        real(sink, table.set_column(table.column_names.index("text"), "text", texts))

    monkeypatch.setattr(shards, "_members", members)
    with pytest.raises(WinnowError, match=f"{path.name}: was sealed and is lost, and comes out otherwise"):
        export(run)
    assert not path.parent.exists()


def test_shards_that_are_lost_after_a_scorer_was_added_say_so(tmp_path: Path) -> None:
    run = selection(tmp_path, 20, picture)
    (path,) = export(run)
    later(run, np.arange(1, 21))
    kept_file = path.read_bytes()
    shutil.rmtree(path.parent)
    for _ in range(2):
        with pytest.raises(WinnowError, match="comes out otherwise now .*a scorer that was added since.*from a copy"):
            export(run)
        assert not path.parent.exists()
    path.parent.mkdir()
    path.write_bytes(kept_file)
    assert export(run) == [path] and verify(run.store).ok


def test_an_export_that_was_never_sealed_is_no_part_of_another(tmp_path: Path, monkeypatch: Any) -> None:
    """README's pattern loads all folders of a selection."""
    run = selection(tmp_path, 20, picture)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr("jobs.export.complete", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        export(run)
    (left,) = (run.store / "shards").iterdir()
    assert [note for note in verify(run.store).notes if note.startswith(f"shards/{left.name}: not sealed")]
    other = replace(run, recipe=recipes.override(run.recipe, [(["export", "rows"], 3)]))
    with pytest.raises(WinnowError, match=f"shards/{left.name}: .*never sealed.*remove it, and export again"):
        export(other)
    shutil.rmtree(left)
    export(other)
    assert not verify(run.store).notes
    assert len(list((run.store / "shards").glob("curated-r1-parquet-*"))) == 1


def test_a_selection_without_weights_is_refused(tmp_path: Path) -> None:
    run = selection(tmp_path, 5, picture)
    with pytest.raises(WinnowError, match="round 2 of 'curated' is not selected and weighed; run 'winnow weigh'"):
        export(run.at(2))
    part = next((run.store / "tables" / "weights").rglob("*.parquet"))
    part.unlink()
    with pytest.raises(WinnowError, match="round 1 of 'curated' is not selected and weighed; run 'winnow weigh'"):
        export(run)


@pytest.mark.parametrize(
    ("bad", "said"), [(np.nan, "sample 3: its weight is nan"), (np.inf, "its weight is inf"), (-0.5, "is -0.5"),
                      (0.0, "every weight is 0")],
)  # fmt: skip
def test_weights_that_are_none_are_refused(tmp_path: Path, monkeypatch: Any, bad: float, said: str) -> None:
    monkeypatch.setattr(storage.commit, "conform", lambda name, data: data)
    run = selection(tmp_path, 5, picture, weight=lambda n: np.where((n == 3) | (bad == 0), bad, 1.0))
    with pytest.raises(WinnowError, match=said):
        export(run)
    assert not exported(run)


@pytest.mark.parametrize("file", [None, b""])
def test_a_row_without_an_image_is_refused(tmp_path: Path, monkeypatch: Any, file: bytes | None) -> None:
    monkeypatch.setattr(storage.commit, "conform", lambda name, data: data)
    run = selection(tmp_path, 5, lambda n: file if n == 4 else picture(n))  # type: ignore[arg-type, return-value]
    with pytest.raises(WinnowError, match="sample 4: its row holds no image file"):
        export(run)
    assert not exported(run) and not list((run.store / "staging").iterdir())


def test_an_image_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    run = selection(tmp_path, 5, lambda n: random_file(99)(n) if n == 4 else picture(n), export={"encode": "png"})
    with pytest.raises(WinnowError, match="sample 4: not a readable image"):
        export(run)


@pytest.mark.parametrize("damage", ["missing", "truncated", "exchanged"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    run = selection(tmp_path, 50, picture, unit=20)
    parts = sorted((run.store / "tables" / "samples").rglob("*.parquet"))
    if damage == "missing":
        parts[1].unlink()
    elif damage == "truncated":
        parts[1].write_bytes(parts[1].read_bytes()[:-9])
    else:  # while the export reads
        import jobs.trainset

        real = jobs.trainset.rows_of

        def rows_of(*asked: Any) -> Any:
            found = real(*asked)
            shutil.copy(parts[0], parts[1])
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jobs.trainset, "rows_of", rows_of)
            with pytest.raises(WinnowError, match=f"{parts[1].name}: not readable .it holds other samples"):
                export(run)
        return
    with pytest.raises(WinnowError, match=parts[1].name) as caught:
        export(run)
    assert "\n" not in str(caught.value) and ("restore it" in str(caught.value) or "winnow verify" in str(caught.value))


def limited(folder: str) -> None:
    """An export where no file may grow above 40 kB, as on a full disk."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    recipe = recipes.load("refine-only")
    try:
        export(Run(Path(folder) / "store", recipe.for_arm("curated")))
    except WinnowError as error:
        print(error)


def test_a_full_disk_is_one_line_and_leaves_nothing(forks: ForkServer, tmp_path: Path) -> None:
    run = selection(tmp_path, 50, random_file(3000), unit=5)
    forks.start("test_jobs_export:limited", str(tmp_path), log=tmp_path / "log")
    assert forks.wait() == 0
    said = (tmp_path / "log").read_text()
    assert said.count("\n") == 1 and "free space" in said and "everything committed is safe" in said, said
    assert not exported(run) and not list((run.store / "staging").iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"total": 5}, "export.total is 5, which only export.unweighted uses"),
        ({"formats": ["parquet", "parquet"]}, "name each format once"),
        ({"formats": []}, "export.formats"), ({"formats": ["zip"]}, "export.formats"),
        ({"encode": "gif"}, "export.encode"), ({"unweighted": "drop"}, "export.unweighted"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        recipes.override(recipes.load("refine-only"), [(["export", key], value) for key, value in change.items()])


def test_training_needs_parquet(tmp_path: Path) -> None:
    tars = [(["export", "formats"], ["webdataset"])]
    recipes.override(recipes.load("refine-only"), tars).check_round()
    with pytest.raises(WinnowError, match="training reads Parquet; add parquet"):
        recipes.override(recipes.load("sdxl-lora"), tars).check_round()
    run = selection(tmp_path, 5, picture, export={"formats": ["webdataset"]})
    export(run)
    with pytest.raises(WinnowError, match="not exported as Parquet.*parquet in export.formats"):
        shards_of(run)


# Memory.

PEAK = """
import re, sys
from pathlib import Path
from jobs import recipe as recipes
from jobs.export import export
from jobs.run import Run
change = [(["export", "formats"], ["parquet", "webdataset"]), (["export", "rows"], 10_000)]
recipe = recipes.override(recipes.load("refine-only"), change)
export(Run(Path(sys.argv[1]), recipe.for_arm("curated")))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""  # not ru_maxrss, which a process inherits from the one that starts it


def peak(folder: Path, count: int) -> int:
    """The most memory, in bytes, that the export of ``count`` rows took."""
    run = selection(folder, count, lambda n: b"\x89PNG\r\n\x1a\n" + n.to_bytes(100), unit=10_000)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, run.store], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(done.stdout.splitlines()[-1]) * 1024


def test_memory_hardly_grows_with_the_rows(tmp_path: Path) -> None:
    few, many = 2_000, 50_000
    grown = peak(tmp_path / "many", many) - peak(tmp_path / "few", few)
    # A row is held as its place, id, weight and two scores, 40 bytes, a few times over while they are put together.
    assert grown < 500 * (many - few), f"{grown / (many - few):.0f} bytes a row"
