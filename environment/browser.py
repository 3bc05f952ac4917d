"""Unpack Debian's Chromium into the user's cache, for tests of pages on machines without a browser.

    python environment/browser.py

Nothing is installed: apt-get resolves and downloads what the machine lacks (as its dpkg says) into the cache, checks
signatures, and dpkg-deb unpacks it there. So root is not needed, but Debian or a relative with apt-get and dpkg-deb is.
Takes 110 MB of download and 400 MB of disk; more where libraries are missing too. The version is the one that Debian's
mirrors have today: they keep no other. A finished browser is left alone.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("chromium", "fonts-dejavu-core")
NAMES = ("chromium", "chromium-browser", "google-chrome")  # on a machine that has one
BINARY = Path("usr", "lib", "chromium", "chromium")
# Where packages put shared libraries; PulseAudio's is known to its own libraries by an absolute path.
LIBRARIES = ("usr/lib/{triplet}", "lib/{triplet}", "usr/lib/{triplet}/pulseaudio")
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <dir>{root}/usr/share/fonts</dir>
  <cachedir>{root}/fontconfig</cachedir>
  <alias binding="strong"><family>sans-serif</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias binding="strong"><family>system-ui</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias binding="strong"><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""
START = """#!/bin/sh
export LD_LIBRARY_PATH="{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
export FONTCONFIG_FILE="{root}/fonts.conf"
exec "{root}/{binary}" "$@"
"""


def cache_folder() -> Path:
    """Beside llama.cpp."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "gemma4q" / "chromium"


def find_browser() -> Path | None:
    """The machine's own browser, else the one in the cache; None where there is neither."""
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    start = cache_folder() / "start"
    return start if start.is_file() else None


def refuse_other_systems() -> None:
    if sys.platform != "linux" or shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        sys.exit(f"error: got {platform.system()} without apt-get and dpkg-deb, expected Debian or a relative; "
                 f"elsewhere, put one of {', '.join(NAMES)} on the PATH")  # fmt: skip


def download(state: Path) -> list[Path]:
    """Packages that the machine lacks, as files below `state`."""
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True)
    # Folders of our own and no lock: what needs root in apt-get is writing to the machine's.
    options = {
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
        "Debug::NoLocking": "true",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
    }
    apt = ["apt-get", "-qq", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    subprocess.run([*apt, "update"], check=True, stdout=sys.stderr)
    install = ["install", "--download-only", "--yes", "--no-install-recommends", *PACKAGES]
    subprocess.run([*apt, *install], check=True, stdout=sys.stderr)
    return sorted((state / "archives").glob("*.deb"))


def unpack(archives: list[Path], root: Path) -> None:
    """Make `root` a folder that the browser runs from."""
    for archive in archives:
        subprocess.run(["dpkg-deb", "--extract", archive, root], check=True)
    if not (root / BINARY).is_file():
        sys.exit(f"error: {root / BINARY}: missing after unpacking {', '.join(path.name for path in archives)}")


def write_start(root: Path) -> None:
    """The script that starts the browser with its own libraries; written last, it says that all is there."""
    (root / "fonts.conf").write_text(FONTS.format(root=root), encoding="utf-8")
    partial = root / "start.partial"
    triplet = f"{platform.machine()}-linux-gnu"
    libraries = ":".join(str(root / folder.format(triplet=triplet)) for folder in LIBRARIES)
    partial.write_text(START.format(root=root, libraries=libraries, binary=BINARY), encoding="utf-8")
    partial.chmod(0o755)
    partial.rename(root / "start")


def main() -> int:
    if found := find_browser():
        print(found)
        return 0
    refuse_other_systems()
    root = cache_folder()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        unpack(download(Path(scratch, "apt")), Path(scratch, "root"))
        shutil.rmtree(root, ignore_errors=True)
        Path(scratch, "root").rename(root)
    write_start(root)
    print(root / "start")
    return 0


if __name__ == "__main__":
    sys.exit(main())
