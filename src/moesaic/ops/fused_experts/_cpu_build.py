"""The native kernels of `cpu/`: built with the system's C compiler when first wanted, kept in a cache folder.

A build is keyed by its sources, the compiler and the features of the CPU; it is made once for a machine, however many
processes want it at the same time. A kept build that is damaged is made again. Where there is no compiler, or a build
fails, `load` says so in one line, and the torch implementation runs. Environment: `CC` names the compiler;
`MOESAIC_CACHE` the folder (default `~/.cache/moesaic`); `MOESAIC_CPU` a lower instruction set, or `off`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ... import hardware

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast",
         "-pthread", "-Wno-unknown-pragmas", "-Wno-psabi")  # fmt: skip
# (name, machine, what /proc/cpuinfo must list, what the compiler is told, what more is told where it is listed too)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
LEVELS = (
    ("avx512", "x86_64", {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}, _AVX512),
    ("avx2", "x86_64", {"avx2", "fma", "f16c"}, _AVX2),
    ("neon", "aarch64", set(), ()),
    ("generic", "", set(), ()),
)
_EXTRAS = (({"avx512_bf16"}, ("-mavx512bf16",)), ({"amx_tile", "amx_bf16"}, ("-mamx-tile", "-mamx-bf16")))
# each takes its arguments as packed bytes, and returns 0 unless there was no memory
ENTRIES = ("moesaic_fused_experts", "moesaic_activation_backward", "moesaic_sum_rows", "moesaic_weight_gradient")
TIMEOUT = 300  # seconds; a build takes about 3


@dataclass(frozen=True)
class Native:
    """The loaded kernels, or why there are none.

    Attributes:
        level: the instruction set that they were compiled for.
        amx: may this process use AMX?
        pairs: are products of bf16 pairs (`vdpbf16ps`) built in?
        why_not: in one line, if there are none.
    """

    library: ctypes.CDLL | None
    level: str = ""
    amx: bool = False
    pairs: bool = False
    why_not: str | None = None


class _Failed(RuntimeError):
    """A build that did not succeed, and why in one line."""


def status() -> str:
    """One line for `moesaic env`: what the native kernels were built for, or why the torch implementation runs."""
    native = load()
    if native.why_not:
        return f"not used: {native.why_not}; the torch implementation runs"
    extras = [name for name, there in (("bf16 pairs", native.pairs), ("AMX", native.amx)) if there]
    return f"built for {native.level}" + (f" with {' and '.join(extras)}" if extras else "")


@functools.cache
def load() -> Native:
    """The kernels for this machine, built first where they have to be. The same answer for as long as a process lives.

    Two threads that ask first at the same time both get whole kernels: `build` lets one make them.
    """
    wanted = os.environ.get("MOESAIC_CPU", "")
    if wanted == "off":
        return Native(None, why_not="MOESAIC_CPU=off")
    if os.name != "posix":
        return Native(None, why_not=f"they need POSIX threads, and this is {sys.platform}")
    command = compiler()
    if command is None:
        return Native(None, why_not="there is no C compiler (cc, gcc or clang) on PATH; install one, or set CC")
    tried = []
    for level, flags in candidates(wanted):
        try:
            library = ctypes.CDLL(str(build(command, flags)))
        except (_Failed, OSError) as failure:
            tried.append(str(failure))
            continue
        for entry in ENTRIES:
            getattr(library, entry).argtypes = [ctypes.c_char_p]
        if team := _openmp():
            library.moesaic_team(ctypes.cast(team.GOMP_parallel, ctypes.c_void_p))
        amx = "-mamx-bf16" in flags and bool(library.moesaic_amx())
        return Native(library, level, amx, "-mavx512bf16" in flags)
    return Native(None, why_not=tried[0] if tried else f"MOESAIC_CPU={wanted} is nothing that this CPU can run")


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch runs on, if it can be told (on Linux) and speaks GNU's calls."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/lib" in line and ".so" in line}
    found = sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")))
    if len(found) != 1:  # none, or no saying which is torch's
        return None
    library = ctypes.CDLL(found[0])
    return library if hasattr(library, "GOMP_parallel") else None


def candidates(wanted: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """`(name, flags)` that this CPU can run, the best first; an old compiler may not know the first."""
    machine, have = platform.machine().lower(), hardware.cpu_flags()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    for name, needed_machine, needed, flags in LEVELS:
        if (wanted and name != wanted) or needed_machine not in ("", machine) or not needed <= have:
            continue
        extras = tuple(f for listed, more in _EXTRAS if name == "avx512" and listed <= have for f in more)
        if extras:
            yield name, flags + extras
        yield name, flags


def compiler() -> list[str] | None:
    """The compiler's command: `CC`, else the first of cc, gcc and clang on PATH; None if there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    return None


def build(command: list[str], flags: tuple[str, ...]) -> Path:
    """The shared object of these flags, from the cache or made now.

    Raises:
        _Failed: the compiler did not succeed. OSError: no folder can be written.
    """
    target = cache_folder() / f"fused_experts-{key(command, flags)}.so"
    if _sound(target):
        return target
    with _alone(target.with_suffix(".lock")):
        if not _sound(target):  # nobody made it while we waited
            _compile(command, flags, target)
    return target


def key(command: list[str], flags: tuple[str, ...]) -> str:
    """What a build depends on, in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    tool = os.stat(os.path.realpath(command[0]))
    facts = (command, os.path.realpath(command[0]), tool.st_size, tool.st_mtime_ns, FLAGS, flags, platform.machine())
    digest.update(repr((facts, sorted(hardware.cpu_flags()))).encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """`MOESAIC_CACHE`, else the user's cache folder, else one of the user's own under the temporary folder."""
    if named := os.environ.get("MOESAIC_CACHE"):
        Path(named).mkdir(parents=True, exist_ok=True)
        return Path(named)
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "moesaic"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"moesaic-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise OSError(f"{folder} belongs to somebody else; set MOESAIC_CACHE")
    return folder


def _sound(target: Path) -> bool:
    """Is the build there, whole? A shared object cut short would not fail to load but kill the process."""
    try:
        return target.with_suffix(".sum").read_text() == hashlib.sha256(target.read_bytes()).hexdigest()
    except OSError:
        return False


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when that process ends, however it ends."""
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: then two may build, and each whole
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], flags: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        line = [*command, *FLAGS, *flags, str(SOURCES / "moe.c"), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as late:
            raise _Failed(f"{command[0]} was not done after {TIMEOUT} s") from late
        if done.returncode or not made.exists():
            said = [text for text in done.stderr.splitlines() if "error" in text.lower()] or done.stderr.splitlines()
            raise _Failed(f"{command[0]} failed: {said[0].strip() if said else f'exit status {done.returncode}'}")
        total = Path(folder) / "sum"
        total.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, target)
        os.replace(total, target.with_suffix(".sum"))
