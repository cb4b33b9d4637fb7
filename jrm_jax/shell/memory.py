"""What becomes of memory that a program frees."""

import ctypes

# of glibc: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_KEEP = ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**26))


def keep_freed() -> None:
    """Let glibc keep it for the next who asks, in one place; early: threads keep what they have.

    Given back to the system, each page costs a fault when it is asked for anew. Arenas of threads
    are limited in size and map what is larger whatever M_MMAP_MAX says, so there must be one only.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    for option, value in _KEEP:
        mallopt(option, value)
