"""Files that have the name of a scan or a manifest but other content, recognised by their first bytes."""

from __future__ import annotations

import re

START_BYTES = 512
"""First bytes of a file that `describe_look_alike` needs."""

_FETCH = "fetch the file with `datalad get` or `git annex get`"
_UNPACK = "unpack it and use the NIfTI files in it"

# Start of the content, what it is, and what to do. Links of git-annex have a relative path where there are no symlinks.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"[./]*(\.git)?/annex/objects/"), "a git-annex pointer without the content", _FETCH),
    (re.compile(rb"version https://[\w.-]+/spec/v1\s"), "a Git LFS pointer without the content",
     "fetch the file with `git lfs pull`"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|\?xml)", re.IGNORECASE), "a web page or XML",
     "the server sent an error or login page; download the file again"),
    (re.compile(rb".{128}DICM", re.DOTALL), "a DICOM file", "convert it with dcm2niix"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", _UNPACK),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive", _UNPACK),
    (re.compile(rb"\x89HDF\r\n"), "an HDF5 or MINC 2 file", "convert it with mnc2nii"),
    (re.compile(rb"NRRD000"), "an NRRD file", "convert it to NIfTI"),
)  # fmt: skip


def describe_look_alike(start: bytes) -> str | None:
    """What a file is and what to do, for a message: "is ...: ..."; None for unknown content.

    Args:
        start: The first `START_BYTES` bytes of the file, or all of a shorter one.
    """
    if not start:
        return "is empty (0 bytes): copy, download or convert it again"
    return next((f"is {name}: {advice}" for pattern, name, advice in _KINDS if pattern.match(start)), None)
