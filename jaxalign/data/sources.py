"""Reads a source: a file, a glob, a directory, a saved `datasets` directory, a URL, or a hub id."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jaxalign.data.files import SUFFIXES, OnBad, Raw, is_url, read_file, stop, supported
from jaxalign.data.source import Source, config_line, is_hub_id
from jaxalign.errors import InputError

# Hub sets whose subsets are folders, not named configurations.
_SUBSET_IS_FOLDER = ("anthropic/hh-rlhf",)

# Metadata files beside the data.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

# (split, words in a path that name it)
_SPLITS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("train", ("train", "training")),
    ("validation", ("validation", "valid", "val", "dev", "eval")),
    ("test", ("test", "testing")),
)


def read(source: Source, on_bad: OnBad = stop) -> Iterator[Raw]:
    """Yields the rows of a source, in order.

    Args:
      source: what is read.
      on_bad: called with each bad row, as in `read_file`.

    Raises:
      InputError: where nothing is at the path, a split is missing, or a row cannot be read.
    """
    path = source.path
    if not is_url(path) and os.path.isdir(path) and _needs_datasets(source):
        _refuse(
            source,
            ("name", "revision", "streaming") if _is_saved(path) else ("revision",),
            "a directory on this machine",
        )
        yield from _read_datasets(source)
        return
    files = _files(source)
    if files is None:
        if not is_hub_id(path):
            raise _not_found(source)
        yield from _read_datasets(source)
        return
    _refuse(source, ("name", "revision", "streaming"), "local files")
    for file in files:
        yield from read_file(file, on_bad)


def _refuse(source: Source, options: tuple[str, ...], kind: str) -> None:
    """Refuses options that only hub sets have."""
    for option in options:
        if getattr(source, option):
            raise InputError(
                f"{source.path}: {option} {getattr(source, option)!r} of {kind}",
                f"{option} for a hub id only",
                config_line(source, **{option: Source._field_defaults[option]}),
            )


def _needs_datasets(source: Source) -> bool:
    """Whether a directory needs `datasets`: saved by it, or a hub set's repository with subsets."""
    names = set(os.listdir(source.path))
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
        return True
    if source.name:
        return True
    if "README.md" in names:
        with open(os.path.join(source.path, "README.md"), encoding="utf-8", errors="replace") as readme:
            head = readme.read(20_000)
        return head.startswith("---") and "\nconfigs:" in head.split("\n---", 1)[0]
    return False


def _is_saved(path: str) -> bool:
    """Whether `datasets` saved a directory."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _files(source: Source) -> list[str] | None:
    """The data files of a source in order; None if the path does not exist."""
    path = source.path
    root, is_directory, found = _url_files(path) if is_url(path) else _local_files(path)
    if found is None:
        return None
    if not is_directory:
        if source.split:
            raise InputError(
                f"{path}: split {source.split!r} of files named one by one",
                "split for directories and hub ids only",
                config_line(source, split=None),
            )
        return found
    found = sorted(f for f in found if supported(f) and os.path.basename(f) not in _METADATA)
    if not found:
        raise InputError(
            f"{path}: no data files in it", f"files that end in {', '.join(SUFFIXES)}", config_line(source, path="FILE")
        )
    splits: dict[str | None, list[str]] = {}
    for file in found:
        splits.setdefault(_split_of(os.path.relpath(file, root) if not is_url(path) else file[len(root) :]), []).append(
            file
        )
    chosen = choose_split(source, [name for name in splits if name])
    if chosen is None:
        return found
    if None in splits and source.split is None and chosen != "train":
        raise InputError(
            f"{path}: {os.path.relpath(splits[chosen][0], path)} beside {os.path.relpath(splits[None][0], path)}",
            "files of one split, or a choice",
            config_line(source, split=chosen),
        )
    return splits[chosen]


def _local_files(path: str) -> tuple[str, bool, list[str] | None]:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found, seen = [], set()
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above or beside it
                folders.clear()
                continue
            seen.add(real)
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        return path, True, found
    if os.path.exists(path):
        return path, False, [path]
    return path, False, sorted(glob.glob(path, recursive=True)) or None


def _url_files(path: str) -> tuple[str, bool, list[str] | None]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isdir(root):
            return fs.unstrip_protocol(root), True, [fs.unstrip_protocol(f) for f in fs.find(root)]
        if fs.exists(root):
            return path, False, [path]
        found = sorted(fs.glob(root)) if glob.has_magic(root) else []
        return path, False, [fs.unstrip_protocol(f) for f in found] or None
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"{path}: {error}", "a URL that fsspec can open", "data.sources=(...)") from error


def _split_of(relative: str) -> str | None:
    """The split that a file's path names.

    >>> _split_of("data/train-00000-of-00002.parquet"), _split_of("test_socratic.jsonl"), _split_of("contest.csv")
    ('train', 'test', None)
    """
    words = re.split(r"[^a-z]+", relative.lower())
    for split, names in _SPLITS:
        if any(word in names for word in words):
            return split
    return None


def choose_split(source: Source, splits: list[str]) -> str | None:
    """The split to read: the requested one, else train, else the only one.

    Args:
      source: its `split` is the requested one.
      splits: the existing names.

    Returns:
      One of `splits`, or None where there are none and none is requested.
    """
    wanted = source.split
    if wanted is not None:
        canonical = next((split for split, names in _SPLITS if wanted in names), wanted)
        for name in (wanted, canonical):
            if name in splits:
                return name
        near = difflib.get_close_matches(wanted, splits, n=1, cutoff=0.0)
        raise InputError(
            f"{source.path}: no split {wanted!r}",
            f"one of {', '.join(splits)}" if splits else "no split: its files do not name any",
            config_line(source, split=near[0] if near else None),
        )
    if not splits or "train" in splits:
        return "train" if splits else None
    if len(splits) > 1:
        raise InputError(
            f"{source.path}: splits {', '.join(splits)}, none of them train",
            "a choice of one",
            config_line(source, split=splits[0]),
        )
    return splits[0]


def _not_found(source: Source) -> InputError:
    """The error for a path that does not exist, with the nearest name in its nearest existing folder."""
    folder, name = os.path.split(source.path)
    if is_url(source.path):
        return InputError(f"{source.path}: nothing there", "a file, a folder or a glob", config_line(source))
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    inside = _data_inside(folder or ".")
    near = _nearest_name(name, inside)
    shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    found = f"{source.path}: no such file" + (" (the glob matches nothing)" if glob.has_magic(source.path) else "")
    expected = f"a file, a folder, a glob or a hub id; data in {folder or 'the working directory'}: {shown or 'none'}"
    return InputError(found, expected, config_line(source, path=os.path.join(folder, near or "FILE")))


def _data_inside(folder: str) -> list[str]:
    """Data files of a folder, and the folders in it, which end in a slash."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    return sorted(name + "/" * is_dir for name, is_dir in found if is_dir or supported(name))


def _nearest_name(name: str, names: list[str]) -> str | None:
    """The name most like a misspelt one; endings such as `.jsonl` do not count.

    >>> _nearest_name("pair.json", ["pairs.jsonl", "rest.json"]), _nearest_name("none.jsonl", ["pairs.jsonl"])
    ('pairs.jsonl', None)
    """
    stems = {re.split(r"[./]", known, maxsplit=1)[0].lower(): known for known in reversed(names)}
    near = difflib.get_close_matches(re.split(r"[./]", name, maxsplit=1)[0].lower(), stems, n=1, cutoff=0.6)
    return stems[near[0]] if near else None


def _read_datasets(source: Source) -> Iterator[Raw]:
    """Rows through the `datasets` library: a hub id, a saved set, or a set's repository on disk."""
    import datasets

    path = source.path
    local = os.path.isdir(path)
    saved = local and _is_saved(path)
    part = _part(source) if source.streaming and source.split else None
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
            for each in loaded.values() if hasattr(loaded, "keys") else (loaded,):
                each.data.table.validate(full=True)  # reading a damaged table is a segmentation fault
        else:
            folder = path.lower() in _SUBSET_IS_FOLDER
            subset = {"data_dir" if folder else "name": source.name} if source.name else {}
            options: dict[str, Any] = {"streaming": True} if source.streaming else {}
            if part is None and source.split and "[" in source.split:
                options["split"] = source.split
            loaded = datasets.load_dataset(path, revision=source.revision, **subset, **options)
    except Exception as error:  # `datasets` raises what its YAML, JSON and Arrow readers raise
        raise _not_loaded(source, error) from error
    if hasattr(loaded, "keys"):  # a dict of splits
        split = choose_split(source if part is None else source._replace(split=part[0]), list(loaded.keys()))
        if split is None:
            raise InputError(f"{path}: a set without a split", "records", f"ls {path}")
        rows, label = loaded[split], f"{path}[{split if part is None else source.split}]"
    else:
        rows, label = loaded, path if saved else f"{path}[{source.split or 'train'}]"
    found, number = iter(islice(rows, *(part or ("", 0, None))[1:])), 0
    while True:
        try:
            row = next(found)
        except StopIteration:
            return
        except Exception as error:  # what decodes a row raises, or a connection that breaks while streaming
            raise InputError(
                f"{label}:{number + 1}: {_reason(error)}",
                "a record that `datasets` can read",
                "the same command again" if source.streaming else "repair or delete that record",
            ) from error
        number += 1
        yield Raw(label, number, row)


def _part(source: Source) -> tuple[str, int, int | None] | None:
    """Name, begin and end of a streamed split such as `train[:1000]`: `datasets` does not slice streams.

    >>> _part(Source("owner/set", "train[:1000]", streaming=True))
    ('train', 0, 1000)
    """
    name, bracket, numbers = (source.split or "").partition("[")
    found = re.fullmatch(r"(\d*):(\d*)\]", numbers)
    if not bracket:
        return None
    if found is None:
        right = config_line(source, split=f"{name}[:1000]")
        raise InputError(f"{source.path}: split {source.split!r} of a streamed set", "numbers of records", right)
    return name, int(found[1] or 0), int(found[2]) if found[2] else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _not_loaded(source: Source, error: Exception) -> InputError:
    reason = _reason(error)
    if os.path.isdir(source.path):
        return InputError(
            f"{source.path}: {reason}", "a directory that `datasets` loads", config_line(source, name=None, split=None)
        )
    near = _nearest_name(os.path.basename(source.path), _data_inside("."))
    return InputError(
        f"{source.path}: no such file or folder, and as a hub id it did not load ({reason})",
        "a file, a folder, a glob, or a hub id that can be reached (HF_HUB_OFFLINE unset, HF_TOKEN for gated sets)",
        config_line(source, path=near or "FILE", name=None, revision=None, split=None, streaming=False),
    )
