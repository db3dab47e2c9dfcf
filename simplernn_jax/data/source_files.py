"""Files of a corpus: found by path, folder or glob, and read one at a time.

They are plain, ``.gz`` or ``.zst``, in UTF-8 or UTF-16. Only regular files are found and opened.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import io
import os
import re
import subprocess
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from absl import logging

from simplernn_jax.errors import UserError, counted, one_line
from simplernn_jax.files import open_file

COMPRESSED_SUFFIXES = (".gz", ".zst")
_STDLIB_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
_BINARY_PROBE = 8192
"""Leading bytes in which a NUL marks a file as binary, as in git."""
_GENERATED = re.compile(
    r".*(\.lock|-lock\.(json|yaml)|\.min\.(js|css)|\.map|_pb2(_grpc)?\.py|\.pb\.go)|go\.sum"
)
"""Names of lock, minified and generated files."""
_RECORDS = re.compile(r".*\.(jsonl|ndjson|json|csv|tsv|parquet|gz|zst)")
"""Names of files whose text may say anything."""
_GIT = ("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false")
"""Does not run programs that the settings of an untrusted repository name."""
_BLOCK_SIZE = 1 << 18
"""Bytes that are read at a time."""
_ZSTD_BLOCK = 1 << 8
"""Compressed bytes per read. They become at most 32,768 times as many, 8 MiB."""
_ZSTD_WINDOW = 1 << 31
"""Bytes that a frame may refer back to: all that ``zstd --long=31`` writes, which needs as much
memory."""


class SourceFile(NamedTuple):
    """A file of a corpus."""

    name: str
    """Path below the folder or glob it was found by; part of the fingerprint."""
    path: str


def find_files(source: str, exclude: frozenset[str], all_files: bool) -> list[SourceFile]:
    """Find the files of a path or glob, sorted by name.

    Args:
      source: a regular file, a folder (searched without hidden and binary files and without
        workdirs of runs and token stores; links to folders are not followed), or a glob, whose
        ``**`` does not follow them either.
      exclude: real paths of folders that are left out below a folder or a glob's folder.
      all_files: whether a folder's generated files count, and in a git work tree those that git
        does not track.

    Raises:
      UserError: nothing there, or `source` is an excluded folder.
      OSError: a folder in it cannot be read.
    """
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return [SourceFile(os.path.basename(path), path)]
    if not os.path.lexists(path):
        return _glob_files(source, path, exclude)
    if not os.path.isdir(path):
        raise UserError(f"{source}: not a regular file; write the text to a file first")
    if os.path.realpath(path) in exclude:
        raise UserError(
            f"{source}: the run itself writes into this folder; write into another one, or specify "
            "the text with a glob such as '*.txt'"
        )
    files = _folder_files(path, exclude, all_files)
    if not files:
        advice = "put some there" + ("" if all_files else ", or set config.data.all_files=True")
        raise UserError(f"{source}: no text file in this folder; {advice}")
    return files


def stdlib_files() -> list[SourceFile]:
    """Find the running Python's own modules, without tests and packages."""
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                files.append(SourceFile(os.path.relpath(path, root), path))
    return sorted(files)


def _glob_files(source: str, pattern: str, exclude: frozenset[str]) -> list[SourceFile]:
    top = glob_folder(pattern)
    found = [] if top is None else sorted(map(str, _matching_files(Path(top), pattern, exclude)))
    if not found:
        what = "no such file or folder" if top is None else "no file matches this glob"
        advice = ""
        if "://" in source or re.fullmatch(r"[\w-]+/[\w.-]+", source):
            advice = (
                "; nothing is downloaded: fetch a file yourself, or a dataset of the Hugging Face "
                "hub with hf download --repo-type dataset USER/NAME --local-dir FOLDER"
            )
        raise UserError(f"{source}: {what} (looked from {os.getcwd()}){advice}")
    root = os.path.commonpath(found) if len(found) > 1 else os.path.dirname(found[0])
    return [SourceFile(os.path.relpath(match, root or "."), match) for match in found]


def glob_folder(pattern: str) -> str | None:
    """Folder that a glob searches: all before its first magic component; None if it has none."""
    parts = Path(pattern).parts
    magic = [number for number, part in enumerate(parts) if glob.has_magic(part)]
    return str(Path(*parts[: magic[0]])) if magic else None


def _matching_files(top: Path, pattern: str, exclude: frozenset[str]) -> Iterator[Path]:
    """Yield the regular files of a glob below `top`.

    `pathlib` does not follow links in ``**``; unlike `glob`, it finds hidden files.
    """
    parts = Path(pattern).parts[len(top.parts) :]
    parts += ("*",) if parts[-1] == "**" else ()
    with_hidden = any(part.startswith(".") for part in parts)
    inner = [Path(folder) for folder in exclude if top.resolve() in Path(folder).parents]
    try:
        for path in top.glob("/".join(parts)):
            is_hidden = any(part.startswith(".") for part in path.parts[len(top.parts) :])
            if path.is_file() and (with_hidden or not is_hidden):
                parents = path.resolve().parents
                if not any(folder in parents for folder in inner):
                    yield path
    except ValueError:  # not a pattern, or no file has such a name
        return


def _folder_files(root: str, exclude: frozenset[str], all_files: bool) -> list[SourceFile]:
    tracked = None if all_files else _tracked_files(root)
    files: list[SourceFile] = []
    left_out: list[str] = []
    skipped: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        is_workdir = "checkpoints" in subfolders and "metrics.jsonl" in names
        if folder != root and (is_workdir or {"meta.json", "train.tokens"} <= {*names}):
            logging.info("%s: left out, %s of a run", folder, "workdir" if is_workdir else "tokens")
            subfolders.clear()
            continue
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and os.path.realpath(os.path.join(folder, name)) not in exclude
        ]
        left_out += filter(os.path.islink, (os.path.join(folder, name) for name in subfolders))
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            name = os.path.relpath(path, root)
            if not os.path.isfile(path):
                continue
            is_tracked = tracked is None or name in tracked
            start = _beginning(path) if is_tracked else b""
            if b"\0" in start and not path.lower().endswith(".parquet"):
                left_out.append(path)
            elif not is_tracked or (not all_files and _is_generated(path, start)):
                skipped.append(path)
            else:
                files.append(SourceFile(name, path))
    if skipped:
        number = counted(len(skipped), "untracked, generated, minified or lock file")
        example = one_line(min(skipped))
        advice = "config.data.all_files=True reads them"
        logging.info("%s: %s left out, such as %s; %s", root, number, example, advice)
    if left_out:
        number = counted(len(left_out), "binary file or linked folder")
        logging.warning("%s: %s left out, such as %s", root, number, one_line(min(left_out)))
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _beginning(path: str) -> bytes:
    with open_source(path) as stream:
        return stream.read(_BINARY_PROBE)


def _is_generated(path: str, start: bytes) -> bool:
    """Whether the name of a file or its beginning is that of a generated one."""
    name = os.path.basename(path).lower()
    if name.endswith((".js", ".mjs", ".cjs", ".css")) and re.search(rb"[^\n]{5001}", start):
        return True  # minified
    is_marked = re.search(rb"@generated|DO NOT EDIT", start[:500]) and not _RECORDS.fullmatch(name)
    return bool(is_marked or _GENERATED.fullmatch(name))


def _tracked_files(root: str) -> frozenset[str] | None:
    """Names below `root` of the files that git tracks; None if it knows of none."""
    real = Path(root).resolve()
    if not any(os.path.exists(folder / ".git") for folder in (real, *real.parents)):
        return None
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
    try:
        found = subprocess.run(
            [*_GIT, "-C", real, "ls-files", "-z"],
            check=False,
            env=environment,
            capture_output=True,
            timeout=60,
        )
        output, problem = found.stdout, found.stderr.decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired) as error:  # such as no git
        output, problem = b"", str(error)
    if output:
        return frozenset(map(os.fsdecode, output.split(b"\0")))
    problem = one_line(problem.strip()) or "it tracks nothing here"
    logging.info("%s: all files are read, though git has a repository here: %s", root, problem)
    return None


@contextlib.contextmanager
def open_source(
    path: str, errors: str = "replace", on_read: Callable[[int, int], None] = lambda *_: None
) -> Iterator[IO[bytes]]:
    """Open a regular file of the user's; the block does nothing with files but read this one.

    Compressed files are decompressed while they are read, a bounded number of bytes at a time.
    UTF-16, recognized by its byte order mark, becomes UTF-8. `on_read` is called with the bytes
    that were read of the file, and with their number after decompression.

    Raises:
      UserError: it cannot be opened or read, is a corrupted or truncated archive, or is invalid
        UTF-16 and `errors` is ``strict``.
    """

    def counted_blocks() -> Iterator[bytes]:
        num_bytes = 0
        for block in _blocks(path, file):
            num_bytes += len(block)
            on_read(file.tell(), num_bytes)
            yield block

    try:
        with open_file(path) as file:
            stream: Any = io.BufferedReader(_BlockReader(counted_blocks()), _BLOCK_SIZE)
            if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                blocks = iter(functools.partial(stream.read, 1 << 16), b"")
                texts = codecs.iterdecode(blocks, "utf-16", errors)
                utf8_blocks = (text.encode("utf-8") for text in texts)
                stream = io.BufferedReader(_BlockReader(utf8_blocks), _BLOCK_SIZE)
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: invalid UTF-16 ({error.reason}); convert the file to UTF-8, or set "
            "config.data.encoding_errors=replace"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: corrupted or truncated ({error}); replace it by an intact copy"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it readable or leave it out") from error


def _blocks(path: str, file: BinaryIO) -> Iterator[bytes]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".zst":
        yield from _zstd_blocks(file)
        return
    stream: Any = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
    while block := stream.read(_BLOCK_SIZE):
        yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Decompress the consecutive frames of a zstd file.

    The library's own stream reader takes a truncated file for a whole one.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame: Any = None
    rest = b""
    while block := rest or file.read(_ZSTD_BLOCK):
        frame = frame or decompressor.decompressobj()
        try:
            yield frame.decompress(block)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        rest = b""
        if frame.eof:
            rest, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends inside a frame")


class _BlockReader(io.RawIOBase):
    """A stream of the bytes of blocks of any size."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._content = memoryview(block)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
