"""A feature's shards: each job writes one, can be killed at any moment, and all are joined under one index.

While job J works on feature ``audio`` of ``dump/train``, there are ``ark/audio.J.ark.partial`` and
``ark/audio.J.journal``; when it has finished, ``ark/audio.J.ark`` and its manifest ``ark/audio.J.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sdumc.data.dump import all_finite, matrix_bytes
from sdumc.data.tables import check_id, write_table
from sdumc.errors import UserError
from sdumc.files import disk_full, read_json, settings_hash, write_json, write_text
from sdumc.machine import all_versions, different_major

log = logging.getLogger(__name__)


@dataclass
class _Entry:
    """An utterance of a shard: a matrix at ``offset``, or the reason for its absence, or notes alone."""

    utt: str
    offset: int | None = None
    frames: int = 0
    absent: str | None = None
    notes: dict[str, str] = field(default_factory=dict)


class ShardWriter:
    """One job's part of a feature. A job that was killed continues where it last committed.

    Usage::

        with ShardWriter(Path("dump/train"), "audio", job, settings, utterances) as writer:
            for utt in utterances:
                if utt not in writer.done:
                    writer.write(utt, features)     # (T, D)
                    writer.commit()
        # leaving the block without an exception finishes the shard

    The final files do not depend on whether and when the job was killed. A shard that has been finished with the same
    settings is left alone: everything is in ``done`` and nothing is written.

    Args:
        directory: ``dump/<set>``.
        name: the feature's name.
        job: number of the job, from 1.
        settings: whatever the values depend on; work left by a run with other settings is not continued but redone. Its
            ``compression``, if there is one, is a key of :data:`sdumc.data.dump.COMPRESSION`.
        utterances: what this job is to write. When given, work left by a run with another split is redone too.
        versions: those of the packages that make the values. They are kept in the manifest. A shard that has been
            finished stays as it is whatever made it; what a killed job left is not continued with another major
            version of a package but redone.

    Raises:
        UserError: another process writes the same shard.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        name: str,
        job: int,
        settings: Mapping[str, Any],
        utterances: Sequence[str] | None = None,
        versions: Mapping[str, str] | None = None,
    ):
        self.versions = dict(versions or {})
        self.directory, self.name, self.job = Path(directory), name, job
        base = self.directory / "ark" / f"{name}.{job}"
        self.ark = base.with_name(base.name + ".ark")
        self.partial = base.with_name(base.name + ".ark.partial")
        self.journal = base.with_name(base.name + ".journal")
        self.manifest = base.with_name(base.name + ".json")
        self.settings = json.loads(json.dumps(settings, default=str))
        self._key = settings_hash({"settings": self.settings, "utterances": utterances and list(utterances)})
        self._entries: list[_Entry] = []
        self._pending: list[_Entry] = []
        self._ark_file: Any = None
        self._journal_file: Any = None
        self._lock_file: Any = None
        self.done: set[str] = set()
        self.dim: int | None = None
        self._end = 0
        self._finished = False
        self.ark.parent.mkdir(parents=True, exist_ok=True)
        self._lock(base.with_name(f".{base.name}.lock"))
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # -- starting

    def _lock(self, path: Path) -> None:
        self._lock_file = open(path, "a")  # noqa: SIM115 - held as long as the writer lives
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise UserError(
                f"{self.partial}: another process is writing job {self.job} of {self.name}; wait for it or stop it"
            ) from None
        except OSError:
            log.debug("%s: file locks do not work here; two runs of the same job would not notice each other", path)

    def _start(self) -> None:
        manifest = _read_manifest(self.manifest)
        if manifest and manifest.get("key") == self._key and not self.journal.exists() and self._whole(manifest):
            self._entries = _entries_of(manifest)
            self.dim, self._end, self._finished = manifest["dim"], manifest["size"], True
            self.versions = manifest.get("versions", {})
            self.done = {e.utt for e in self._entries}
            return
        committed = self._read_journal()
        if committed is None:
            self.journal.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
            self._ark_file = open(self.partial, "wb")  # noqa: SIM115
            self._journal_file = open(self.journal, "wb")  # noqa: SIM115
            self._journal_line({"key": self._key, "versions": self.versions})
            self._sync_journal()
            return
        end, journal_end = committed
        if not self.partial.exists():
            # Killed between the renaming of the archive and the writing of its manifest, or nothing was in it.
            if self.ark.exists() and end:
                os.replace(self.ark, self.partial)
            else:
                self.partial.touch()
        self._ark_file = open(self.partial, "r+b")  # noqa: SIM115
        self._ark_file.truncate(end)
        self._ark_file.seek(end)
        self._journal_file = open(self.journal, "r+b")  # noqa: SIM115
        self._journal_file.truncate(journal_end)
        self._journal_file.seek(journal_end)
        self._end = end
        self._journal_line({"versions": self.versions})
        self.done = {e.utt for e in self._entries}
        log.info("%s: continuing after %d utterances", self.partial, len(self.done))

    def _whole(self, manifest: Mapping[str, Any]) -> bool:
        if manifest["size"] == 0:
            return True
        return self.ark.exists() and self.ark.stat().st_size == manifest["size"]

    def _read_journal(self) -> tuple[int, int] | None:
        """Load the entries of the last commit that is whole; its end in the archive and in the journal.

        None when there is nothing to continue.
        """
        try:
            raw = self.journal.read_bytes()
        except FileNotFoundError:
            return None
        source = self.partial if self.partial.exists() else self.ark
        size = source.stat().st_size if source.exists() else 0
        result: tuple[int, int] | None = None
        entries: list[_Entry] = []
        dim = None
        earlier: dict[str, str] = {}
        position = 0
        for line in raw.split(b"\n")[:-1]:  # what follows the last line end is incomplete
            position += len(line) + 1
            try:
                record = json.loads(line)
            except ValueError:
                break
            if "key" in record:
                if record["key"] != self._key:
                    log.info("%s: made with other settings; starting anew", self.journal)
                    return None
                result = (0, position)
            if "versions" in record:
                if changed := different_major(record["versions"], self.versions):
                    log.info("%s: begun with other versions (%s); starting anew", self.journal, changed)
                    self._entries, self.dim = [], None
                    return None
                earlier = all_versions(earlier, record["versions"])
            elif "commit" in record:
                if record["commit"] > size:
                    break  # the archive lost what was committed; an earlier commit may still be whole
                self._entries, self.dim = list(entries), dim
                result = (record["commit"], position)
            elif "utt" in record:
                dim = record.pop("dim", dim)
                entries.append(_Entry(**record))
        self.versions = all_versions(earlier, self.versions)
        return result

    # -- adding

    def write(self, utt: str, array: np.ndarray, **notes: str) -> None:
        """Add the matrix (T, D) of an utterance, with notes to keep beside it (such as ``hyp="words"``).

        Raises:
            UserError: it is not two-dimensional, has no frames, another dimension than the first one, NaN or infinite
                values, or the utterance has been added before.
        """
        where = f"{self.partial}: utterance {utt!r}"
        array = np.asarray(array)
        if array.ndim != 2:
            raise UserError(f"{where}: expected a matrix (frames, dimension), found shape {array.shape}")
        if array.shape[0] == 0 or array.shape[1] == 0:
            raise UserError(f"{where}: no frames (shape {array.shape}); mark the modality as absent instead")
        if self.dim is not None and array.shape[1] != self.dim:
            raise UserError(
                f"{where}: dimension {array.shape[1]}, but {self.dim} in the utterances before it; one feature must "
                "come from one model and setting"
            )
        with np.errstate(over="ignore"):  # checked below
            array = np.ascontiguousarray(array, dtype="<f4")
        if not all_finite(array):
            raise UserError(f"{where}: NaN or infinite values in the feature; check its input and the number format")
        header, body = matrix_bytes(array, self.settings.get("compression"), where)
        self._begin(utt)
        name = utt.encode() + b" "
        self._ark_file.write(name + header)
        self._ark_file.write(body)
        self.dim = array.shape[1]
        self._add(_Entry(utt, offset=self._end + len(name), frames=len(array), notes=_strings(notes)))
        self._end += len(name) + len(header) + memoryview(body).nbytes

    def absent(self, utt: str, reason: str, **notes: str) -> None:
        """Note that the modality is known to be absent for an utterance, and why."""
        self._begin(utt)
        self._add(_Entry(utt, absent=" ".join(reason.split()) or "unknown", notes=_strings(notes)))

    def note(self, utt: str, **notes: str) -> None:
        """Add an utterance that has notes only, and no matrix."""
        self._begin(utt)
        self._add(_Entry(utt, notes=_strings(notes)))

    def _begin(self, utt: str) -> None:
        check_id(utt, self.partial)
        if utt in self.done:
            raise UserError(f"{self.partial}: utterance {utt!r}: given twice; ids must be unique")
        if self._finished:
            self._reopen()

    def _add(self, entry: _Entry) -> None:
        self._pending.append(entry)
        self.done.add(entry.utt)

    def _reopen(self) -> None:
        """Go on with a shard that had been finished; its index is void from here on."""
        (self.directory / f"{self.name}.scp").unlink(missing_ok=True)
        if self._end:
            os.replace(self.ark, self.partial)
        else:
            self.partial.touch()
        self._ark_file = open(self.partial, "r+b")  # noqa: SIM115
        self._ark_file.seek(self._end)
        self._journal_file = open(self.journal, "wb")  # noqa: SIM115
        self._journal_line({"key": self._key, "versions": self.versions})
        self._pending, self._entries = self._entries, []
        self._finished = False
        self.commit()
        self.manifest.unlink()

    # -- keeping

    def _journal_line(self, record: Mapping[str, Any]) -> None:
        self._journal_file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def _sync_journal(self) -> None:
        self._journal_file.flush()
        os.fsync(self._journal_file.fileno())

    def commit(self) -> None:
        """Flush to disk: what has been added so far survives a kill. Cheap enough for every batch."""
        if self._finished or not self._pending:
            return
        self._ark_file.flush()
        os.fsync(self._ark_file.fileno())
        for entry in self._pending:
            record = {k: v for k, v in vars(entry).items() if v not in (None, {}, 0) or k == "utt"}
            if entry.offset is not None:
                record["dim"] = self.dim
            self._journal_line(record)
        self._journal_line({"commit": self._end})
        self._sync_journal()
        self._entries += self._pending
        self._pending = []

    def finish(self) -> None:
        """Commit, give the archive its final name and write its manifest. Does nothing the second time."""
        if self._finished:
            return
        self.commit()
        self._ark_file.close()
        self._journal_file.close()
        # An older index and manifest describe another archive than the one that follows.
        (self.directory / f"{self.name}.scp").unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)
        if self._end:
            os.replace(self.partial, self.ark)
        else:
            self.partial.unlink()
            self.ark.unlink(missing_ok=True)
        write_json(
            self.manifest,
            {
                "name": self.name,
                "job": self.job,
                "key": self._key,
                "settings_hash": settings_hash(self.settings),
                "settings": self.settings,
                "versions": self.versions,
                "size": self._end,
                "dim": self.dim,
                "scp": {e.utt: e.offset for e in self._entries if e.offset is not None},
                "frames": {e.utt: e.frames for e in self._entries if e.offset is not None},
                "absent": {e.utt: e.absent for e in self._entries if e.absent is not None},
                "notes": {e.utt: e.notes for e in self._entries if e.notes or (e.offset is None and e.absent is None)},
            },
        )
        self.journal.unlink()
        self._finished = True

    def close(self) -> None:
        """Close the files without finishing; what was committed stays for the next run."""
        for file in (self._ark_file, self._journal_file, self._lock_file):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self.commit()
        except OSError as e:
            raise disk_full(self.partial, e) or e from None
        finally:
            self.close()
        if isinstance(value, OSError) and (told := disk_full(self.partial, value)):
            raise told from None


def _strings(notes: Mapping[str, Any]) -> dict[str, str]:
    return {k: str(v) for k, v in notes.items()}


def _read_manifest(path: Path) -> dict | None:
    return read_json(path, "remove it and run its job again", absent=None)


def _entries_of(manifest: Mapping[str, Any]) -> list[_Entry]:
    """The entries of a manifest; those with a matrix come in the archive's order."""
    notes = manifest["notes"]
    entries = [
        _Entry(u, offset=o, frames=manifest["frames"][u], notes=notes.get(u, {})) for u, o in manifest["scp"].items()
    ]
    entries += [_Entry(u, absent=r, notes=notes.get(u, {})) for u, r in manifest["absent"].items()]
    known = {e.utt for e in entries}
    return entries + [_Entry(u, notes=n) for u, n in notes.items() if u not in known]


# ---------------------------------------------------------------------------------------------------------- merging


@dataclass
class Merged:
    """What :func:`merge_shards` found: frames, reasons of absence and notes by utterance, sorted by id."""

    dim: int | None
    frames: dict[str, int]
    absent: dict[str, str]
    notes: dict[str, dict[str, str]]


def merge_shards(
    directory: str | os.PathLike,
    name: str,
    num_jobs: int,
    meta: Mapping[str, Any],
    expected: Iterable[str],
    check: Callable[[Merged], None] | None = None,
) -> Merged:
    """Join the finished shards 1 to ``num_jobs`` of a feature under one index.

    Writes, each atomically, ``<name>.frames``, ``<name>.yaml`` (``meta``, versions, dimension, settings hash),
    ``<name>.absent`` (utt and reason, only when there are any), and, last, ``<name>.scp``, which is empty when every
    utterance is absent. Shards that hold notes only get no index. Shards of higher numbers, left by a run with more
    jobs, are removed.

    Args:
        directory: ``dump/<set>``; archive paths in the index begin with it as given here.
        name: the feature's name.
        num_jobs: how many shards there are.
        meta: what to put into the yaml: extractor, model, layers, frame rate in Hz, ...; with ``dim``, also a feature
            that is absent everywhere has a known dimension.
        expected: every utterance of the set.
        check: called with what was found before anything is written; what it raises stops the joining.

    Raises:
        UserError: a shard is not finished, or was made with other settings or another major version of a package; an
            utterance is absent, is there twice, or does not belong to the set; dimensions differ between shards.
    """
    directory = Path(directory)
    manifests: list[dict[str, Any]] = []
    for job in range(1, num_jobs + 1):
        path = directory / "ark" / f"{name}.{job}.json"
        manifest = _read_manifest(path)
        if manifest is None or path.with_suffix(".journal").exists():
            raise UserError(f"{path}: job {job} of {num_jobs} for {name} has not finished; run it (again)")
        ark = path.with_suffix(".ark")
        if manifest["size"] and (not ark.exists() or ark.stat().st_size != manifest["size"]):
            raise UserError(
                f"{ark}: absent or not {manifest['size']} bytes long; remove {path} and run job {job} again"
            )
        if manifest["settings_hash"] != (manifests or [manifest])[0]["settings_hash"]:
            raise UserError(f"{path}: job {job} was run with other settings than job 1; run all jobs again")
        manifests.append(manifest)
    versions = _joint_versions(directory, name, manifests)
    merged, scp = _join(directory, name, manifests)
    _check_expected(directory, name, merged, set(expected))
    if check:
        check(merged)

    paths = {suffix: directory / f"{name}.{suffix}" for suffix in ("scp", "frames", "absent", "yaml")}
    paths["scp"].unlink(missing_ok=True)  # until all is in place, there is no index
    indexed = bool(scp or merged.absent)
    for suffix in ("frames", "absent", "yaml"):
        if not indexed or (suffix == "absent" and not merged.absent):
            paths[suffix].unlink(missing_ok=True)
    if indexed:
        write_table(paths["frames"], merged.frames)
        if merged.absent:
            write_table(paths["absent"], merged.absent)
        dim = {} if merged.dim is None else {"dim": merged.dim}
        made_by = {"versions": versions} if versions else {}
        described = {**meta, **made_by, **dim, "settings_hash": manifests[0]["settings_hash"]}
        described = json.loads(json.dumps(described, default=str))
        write_text(paths["yaml"], yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
        write_table(paths["scp"], scp)
    _remove_leftovers(directory, name, num_jobs)
    return merged


def _joint_versions(directory: Path, name: str, manifests: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The versions that made the shards; a UserError if the major version of a package differs between them."""
    versions: dict[str, str] = {}
    for job, manifest in enumerate(manifests, start=1):
        made_by = manifest.get("versions", {})
        if changed := different_major(versions, made_by):
            raise UserError(
                f"{directory / 'ark' / name}.{job}.json: made with another major version than the jobs before it "
                f"({changed}), which may give other values; run the stage again with --force"
            )
        versions = all_versions(versions, made_by)
    if several := [f"{package} {found}" for package, found in versions.items() if "," in found]:
        log.warning("%s: shards made by several versions: %s", directory / name, "; ".join(several))
    return versions


def _join(directory: Path, name: str, manifests: Sequence[Mapping[str, Any]]) -> tuple[Merged, dict[str, str]]:
    merged = Merged(None, {}, {}, {})
    scp: dict[str, str] = {}
    seen: dict[str, int] = {}
    for job, manifest in enumerate(manifests, start=1):
        path = directory / "ark" / f"{name}.{job}"
        for utt in manifest["scp"].keys() | manifest["absent"].keys() | manifest["notes"].keys():
            if utt in seen:
                raise UserError(
                    f"{path}.json: utterance {utt!r}: also written by job {seen[utt]}; the jobs were run with "
                    "different numbers of jobs: run all of them again"
                )
            seen[utt] = job
        if manifest["dim"] is not None:
            merged.dim = manifest["dim"] if merged.dim is None else merged.dim
            if manifest["dim"] != merged.dim:
                raise UserError(f"{path}.ark: dimension {manifest['dim']}, but {merged.dim} in the jobs before it")
        scp.update({utt: f"{path}.ark:{offset}" for utt, offset in manifest["scp"].items()})
        merged.frames.update(manifest["frames"])
        merged.absent.update(manifest["absent"])
        merged.notes.update(manifest["notes"])
    for table in ("frames", "absent", "notes"):
        setattr(merged, table, dict(sorted(getattr(merged, table).items())))
    return merged, scp


def _check_expected(directory: Path, name: str, merged: Merged, expected: set[str]) -> None:
    found = merged.frames.keys() | merged.absent.keys() | merged.notes.keys()
    if absent := sorted(expected - found):
        raise UserError(
            f"{directory}: {name} of {len(absent)} utterances is missing, the first: {', '.join(absent[:3])}; "
            "run the jobs again"
        )
    if extra := sorted(found - expected):
        raise UserError(
            f"{directory}: {name} has {len(extra)} utterances that are not in the data directory, the first: "
            f"{', '.join(extra[:3])}; remove {directory / 'ark'} and run the jobs again"
        )


def _remove_leftovers(directory: Path, name: str, num_jobs: int) -> None:
    for manifest in (directory / "ark").glob(f"{name}.*.json"):
        job = manifest.name[len(name) + 1 : -len(".json")]
        if job.isdigit() and int(job) > num_jobs:
            log.info("%s: removed, left by a run with more jobs", manifest)
            manifest.unlink()
            manifest.with_suffix(".ark").unlink(missing_ok=True)
