"""Writing files whole: under a temporary name first, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydraspec.errors import HydraspecError


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, and rename it once it is complete and on the disk.

    Raises:
        HydraspecError: the disk is full; what was there before is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        if is_disk_full(error):
            raise HydraspecError(f"no space is left on the disk for {file}: free some and run this again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_disk_full(error: Exception) -> bool:
    """Whether an error of a writing library means that the disk, or a quota on it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full)


def hash_file(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
