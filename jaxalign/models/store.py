"""Models in object stores: downloaded to a local cache; a partial upload is never taken for a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxalign.disk import writing
from jaxalign.errors import InputError

CONFIG, ADAPTER_CONFIG = DESCRIPTIONS = ("config.json", "adapter_config.json")  # of a model, of PEFT's adapters
_FIX = "--config.model.path=DIR, or a URL of such a directory"
# What file systems tell about one version of a file; the rest (storage class, listing marks) may change without it.
_VERSION = (
    "size", "ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime",
    "created", "blob_id",
)  # fmt: skip


def list_files(url: str) -> dict[str, dict[str, Any]]:
    """What is directly under a URL: name -> what the store tells of it; nothing where there is nothing.

    Raises:
      InputError: a store that cannot be reached, or whose package is not installed.
    """
    with _reporting(url):
        fs, root = _open(url)
        fs.invalidate_cache()  # another process may have written meanwhile
        try:
            found = fs.ls(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    inside = (info for info in found if info["name"].strip("/") != root.strip("/"))  # a mark of the directory itself
    return {info["name"].rstrip("/").rpartition("/")[2]: info for info in inside}


def open_file(url: str, name: str) -> Any:
    """Opens a file under a URL, to read bytes from."""
    with _reporting(url):
        fs, root = _open(url)
        return fs.open(f"{root}/{name}", "rb")


def fetch(url: str, wanted: Callable[[str], bool]) -> Path:
    """A local copy of a model's files, made once for each version of them.

    It is in `~/.cache/jaxalign/models`, named by a hash of the URL and of what the store tells about each file.

    Args:
      url: of a directory.
      wanted: whether a file of this name is fetched.

    Returns:
      The local directory.

    Raises:
      InputError: nothing there, a model that is not whole, or one that changes while it is read.
    """
    files = list_files(url)
    names = sorted(name for name, info in files.items() if info.get("type") != "directory" and wanted(name))
    if not names:
        raise InputError(f"no model at {url}", "a directory in Hugging Face form", _FIX)
    if not any(name in names for name in DESCRIPTIONS) and any(name.endswith(".safetensors") for name in files):
        raise InputError(f"weights but no {CONFIG} at {url}", "a whole model: its upload may not have ended", _FIX)
    directory = _cached(url, names, files)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_suffix(".lock")):
        if directory.is_dir():
            return directory
        part = directory.with_suffix(f".{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            with _reporting(url), writing(directory.parent):
                fs, root = _open(url)
                fs.get([f"{root}/{name}" for name in names], [str(part / name) for name in names])
            after = list_files(url)
            if not after.keys() >= set(names) or _cached(url, names, after) != directory:
                raise InputError(f"{url} changed while it was read", "a model that nobody is writing", "run again")
            with contextlib.suppress(OSError):  # another process was first, where locks do not work
                part.rename(directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return directory


def upload(directory: Path, url: str) -> None:
    """Copies a directory's files to a URL, in place of what is there.

    What describes it goes first and comes last, so that no reader takes old and new files, or some of them, for a
    model; weights come next and stay longest, so that what an interrupted upload leaves is known for an export.

    Raises:
      InputError: a store that cannot be written.
    """
    new = sorted(file.name for file in directory.iterdir())
    new.sort(key=lambda name: (name in DESCRIPTIONS, not name.endswith(".safetensors")))
    old = list_files(url)
    with _reporting(url):
        fs, root = _open(url)
        fs.makedirs(root, exist_ok=True)
        for name in old.keys() & set(DESCRIPTIONS):
            fs.rm_file(f"{root}/{name}")
        for name in new:
            if name in DESCRIPTIONS:
                for stale in old.keys() - {*new, *DESCRIPTIONS}:
                    fs.rm_file(f"{root}/{stale}")
            fs.put_file(str(directory / name), f"{root}/{name}")
        fs.invalidate_cache()


def _open(url: str) -> tuple[Any, str]:
    """The file system, and the path in it."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url.rstrip("/"))
    return fs, root.rstrip("/")


@contextlib.contextmanager
def _reporting(url: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # stores raise their own client library's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{url}: {reason}",
            "a URL that fsspec can open, and credentials for it",
            "pip install gcsfs for gs://, s3fs for s3://; gcloud auth application-default login, AWS_PROFILE=...",
        ) from error


def _cached(url: str, names: list[str], files: dict[str, dict[str, Any]]) -> Path:
    """Where a copy of this version of the files is kept."""
    versions = [(name, {k: str(files[name][k]) for k in _VERSION if k in files[name]}) for name in names]
    digest = hashlib.sha256(json.dumps([url.rstrip("/"), versions], sort_keys=True).encode()).hexdigest()[:32]
    last = re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(url.rstrip("/").split("/")[-2:]))  # for people who look there
    return Path("~/.cache/jaxalign/models").expanduser() / f"{last}-{digest}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this host at a time, where the file system can lock; else several fetch the same."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            lock = stack.enter_context(open(path, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
