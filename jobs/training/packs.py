"""Packs: rows of tensors by key, in files that are written once, checked when they are first read, then memory-mapped.

    ROOT/KIND/<SHA-256 of the file>.safetensors    tensors [n, …] by name, and "keys", uint8 [n, 32]

A pack's name is the hash of its bytes: one that was cut short, changed or renamed is known by that, said on standard
error, and its rows are encoded again. The check reads a pack once a run, at 1 GB/s or the disk's speed. A pack is
written when it holds PACK_BYTES or is PACK_SECONDS old: that much work is what a killed process loses, and a slow
encoder makes no more than one file a minute. Packs may be removed at any time; it costs the time to encode again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from jobs.progress import say
from storage.content import sha256_of
from storage.durable import publish, staged, storage_errors, sync_folders

PACK_BYTES = 64 * 2**20
PACK_SECONDS = 60.0
#: Rows in one call of an encoder.
TOGETHER = 16
KEY = 32  # bytes of a SHA-256
CHANGED = "its content is not what its name says"


class Packs:
    """Rows of one kind. ``root``: of all packs, made where it is missing; ``kind``: a folder in it, named by all that
    decides the values beside what the key hashes; ``encode``: items → tensors [n, …] by name.

    Rows are asked for with ``want`` as they come, and encoded TOGETHER in that order. Every pack holds whole batches,
    so a run that was killed has the same batches when it is repeated, and the same numbers to the bit. Rows that were
    encoded with other batch mates (by a run over other rows) differ by rounding. Processes that encode the same rows at
    once write the same packs, of which the first stays, or packs with some rows in common, of which one is read.
    """

    def __init__(self, root: Path, kind: str, encode: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.root, self.kind, self.encode = root.resolve(), kind, encode
        self.paths: list[Path] = []
        self.tensors: list[dict[str, Tensor] | None] = []  # None: not checked yet
        self.keys, self.places = np.empty(0, f"S{KEY}"), np.empty((0, 2), np.int32)  # sorted; pack and row in it
        self.waiting: dict[bytes, Any] = {}
        self.encoded: dict[bytes, None] = {}
        self.batches: list[dict[str, Tensor]] = []
        self.bytes, self.since = 0, 0.0
        with storage_errors(self.root, self.root / kind):
            self.root.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> None:
        keys, places = [self.keys], [self.places]
        for path in sorted((self.root / self.kind).glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    if (file.metadata() or {}).get("kind") != self.kind:
                        raise ValueError("of another kind")
                    keys.append(_strings(file.get_tensor("keys").numpy().tobytes()))
            except FileNotFoundError:  # another process has found it damaged
                continue
            except (SafetensorError, ValueError, TypeError) as error:
                self._remove(path, " ".join(str(error).split())[:120])
                continue
            places.append(_places(len(self.paths), len(keys[-1])))
            self._append(path, None)
        self.keys, self.places = np.concatenate(keys), np.concatenate(places)
        order = np.argsort(self.keys, kind="stable")
        self.keys, self.places = self.keys[order], self.places[order]

    def want(self, key: bytes, item: Any) -> None:
        """Encode ``item`` unless a pack has its key."""
        if key in self.waiting or key in self.encoded or self.find(key)[0, 0] >= 0:
            return
        self.waiting[key] = item
        if len(self.waiting) == TOGETHER:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Encode what waits."""
        if not self.waiting:
            return
        made = self.encode(list(self.waiting.values()))
        self.since = self.since if self.batches else time.monotonic()
        self.batches.append({name: value.cpu() for name, value in made.items()})
        self.bytes += sum(value.nbytes for value in self.batches[-1].values())
        self.encoded |= dict.fromkeys(self.waiting)
        self.waiting.clear()
        self.keep()

    def keep(self) -> None:
        """Write the pack if it is full or old."""
        if self.bytes >= PACK_BYTES or (self.batches and time.monotonic() - self.since > PACK_SECONDS):
            self.write()

    def write(self) -> None:
        """Write what is encoded as a pack."""
        if not self.batches:
            return
        raw = b"".join(self.encoded)
        # An autoencoder may answer with its channels last.
        tensors = {name: torch.cat([some[name] for some in self.batches]).contiguous() for name in self.batches[0]}
        tensors["keys"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, KEY)
        data = save(tensors, {"kind": self.kind})
        name = hashlib.sha256(data).hexdigest()
        relative = f"{self.kind}/{name}.safetensors"
        path = self.root / relative
        with storage_errors(self.root, path), staged(self.root, relative) as draft:
            draft.write_bytes(data)
            if not publish(self.root, draft, relative) and sha256_of(path) != name:
                _say_damaged(path, CHANGED)
                os.replace(draft, path)
                sync_folders(self.root, path)
        self._append(path, _mapped(path))
        keys = _strings(raw)
        order = np.argsort(keys)
        at = np.searchsorted(self.keys, keys[order])
        self.keys = np.insert(self.keys, at, keys[order])
        self.places = np.insert(self.places, at, _places(len(self.paths) - 1, len(keys))[order], axis=0)
        self.encoded, self.batches, self.bytes = {}, [], 0

    def find(self, keys: bytes) -> np.ndarray:
        """Pack and row of keys that lie one behind the other, int32 [n, 2], or -1 where no pack has one. A pack that is
        found for the first time is checked; where it is damaged it is removed, and its keys are not found."""
        wanted = _strings(keys)
        while True:
            if not len(self.keys):
                return np.full((len(wanted), 2), -1, np.int32)
            at = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
            places = np.where((self.keys[at] == wanted)[:, None], self.places[at], np.int32(-1))
            bad = [number for number in np.unique(places[:, 0]).tolist() if number >= 0 and not self._sound(number)]
            if not bad:
                return places
            left = ~np.isin(self.places[:, 0], bad)
            self.keys, self.places = self.keys[left], self.places[left]

    def take(self, places: np.ndarray) -> dict[str, Tensor]:
        """The rows at ``places`` as ``find`` gave them: tensors [n, …] on the CPU."""
        first = self._of(places[0, 0])
        made = {name: torch.empty((len(places), *value.shape[1:]), dtype=value.dtype) for name, value in first.items()}
        for at, (pack, row) in enumerate(places.tolist()):
            for name, value in self._of(pack).items():
                made[name][at] = value[row]
        return made

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row's tensor, once a pack was found or written."""
        return tuple(next(tensors[name].shape[1:] for tensors in self.tensors if tensors is not None))

    def _of(self, number: int) -> dict[str, Tensor]:
        tensors = self.tensors[number]
        assert tensors is not None, self.paths[number]
        return tensors

    def _append(self, path: Path, tensors: dict[str, Tensor] | None) -> None:
        self.paths.append(path)
        self.tensors.append(tensors)

    def _sound(self, number: int) -> bool:
        if self.tensors[number] is not None:
            return True
        path = self.paths[number]
        with storage_errors(self.root, path):
            try:
                if sha256_of(path) == path.stem:
                    self.tensors[number] = _mapped(path)
                    return True
            except FileNotFoundError:  # another process has found it damaged
                return False
        self._remove(path, CHANGED)
        return False

    def _remove(self, path: Path, reason: str) -> None:
        _say_damaged(path, reason)
        with storage_errors(self.root, path):
            path.unlink(missing_ok=True)


def _say_damaged(path: Path, reason: str) -> None:
    say(f"{path}: damaged ({reason}); its rows are encoded again")


def _strings(keys: bytes) -> np.ndarray:
    """Keys one behind the other as an array [n] that NumPy can sort."""
    return np.frombuffer(keys, f"S{KEY}")


def _places(number: int, n: int) -> np.ndarray:
    return np.stack([np.full(n, number, np.int32), np.arange(n, dtype=np.int32)], axis=1)


def _mapped(path: Path) -> dict[str, Tensor]:
    """A pack's tensors; memory is taken only by what is read of them, and given back when it runs short."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name != "keys"}  # noqa: SIM118
