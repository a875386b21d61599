"""What to do about what the system refuses."""

import errno

_OTHER_FOLDER = "choose another folder with disk_dir (or HF_TIERED_CACHE_DIR)"
_FULL = f"free space there, or {_OTHER_FOLDER}"
_FILES = "too many files are open: raise `ulimit -n`, or close some"
_MEMORY = (
    "no memory is left for it: raise `ulimit -v` (or the container's limit), lower the budgets, or"
    " end what else takes memory"
)
_GONE = f"the folder is gone or no longer yours to write to: {_OTHER_FOLDER}"

_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "files may not grow that large: raise `ulimit -f` or lower disk_bytes",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EROFS: f"the file system can only be read: {_OTHER_FOLDER}",
    errno.ENOENT: _GONE,
    errno.EACCES: _GONE,
    errno.EPERM: _GONE,
}


def remedy(code: int | None) -> str:
    """What to do about an errno."""
    other = f"check the disk (the kernel's log says more), or {_OTHER_FOLDER}"
    return _REMEDIES.get(code or errno.EIO, other)
