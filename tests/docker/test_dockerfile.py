"""What the Dockerfile copies, installs and leaves alone. The image itself is not here: a stand-in has its versions."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.stubs import ROOT, without_a_job

HOME = "/opt/ctpd_nemo"
# What NVIDIA's image of the Dockerfile's tag reports; its torch is a pre-release with a local version.
IMAGE_TORCH, IMAGE_NUMPY = "2.13.0a0+8145d630e8.nv26.06", "2.3.5"


def installation(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that installs everything, which takes minutes."""
    old = pytest.mark.skipif(sys.version_info < (3, 11), reason="the image's Python reads pyproject.toml by itself")
    return pytest.mark.slow(old(test))


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, in order."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copies() -> Iterator[tuple[list[Path], str]]:
    """Sources and destination of each COPY."""
    for name, arguments in instructions():
        if name == "COPY":
            *sources, destination = arguments.split()
            yield [ROOT / source for source in sources], destination


def test_all_that_is_copied_is_there_and_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source.relative_to(ROOT).parts[0] for sources, _ in copies() for source in sources}
    assert all(source.exists() for sources, _ in copies() for source in sources)
    assert copied == allowed


def test_the_source_is_copied_after_the_dependencies_are_installed() -> None:
    order = [f"{name} {arguments}" for name, arguments in instructions()]
    installed = next(i for i, line in enumerate(order) if "requirements.txt" in line and "pip install" in line)
    source = [i for i, line in enumerate(order) if re.match(r"COPY (ctpd_nemo|conf|tools|docker) ", line)]
    assert len(source) == 4
    assert min(source) > installed


def test_the_container_ends_as_no_root_in_the_entry_point() -> None:
    last = dict(instructions())
    assert last["USER"] == "${USER_ID}"
    (entrypoint,) = re.findall(rf'"{HOME}/(.+)"', last["ENTRYPOINT"])
    assert os.access(ROOT / entrypoint, os.X_OK)


def fake_package(folder: Path, name: str, version: str) -> None:
    """As much of an installed package as its version is read from."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def image_packages(command: str, constraints: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script, with the packages of one folder and no others."""
    return subprocess.run(
        [sys.executable, "-S", ROOT / "docker/image_packages.py", command, constraints],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_belongs_to_the_image_is_held_and_a_change_of_it_is_told(tmp_path: Path) -> None:
    folder, constraints = tmp_path / "site", tmp_path / "constraints.txt"
    kept = {"torch": IMAGE_TORCH, "transformer_engine_cu13": "2.16.0", "flash-attn": "2.7.4", "nvidia-nccl": "2.30.1"}
    for name, version in {**kept, "packaging": "24.2", "torchvision": "0.27", "transformers": "5.1.0"}.items():
        fake_package(folder, name, version)
    assert image_packages("freeze", constraints, folder).returncode == 0
    assert constraints.read_text().splitlines() == [
        "flash-attn==2.7.4",
        "nvidia-nccl==2.30.1",
        f"torch=={IMAGE_TORCH}",
        "torchvision==0.27",
        "transformer-engine-cu13==2.16.0",
    ]
    fake_package(folder, "torchmetrics", "1.9.0")
    shutil.rmtree(folder / "packaging-24.2.dist-info")
    assert image_packages("check", constraints, folder).returncode == 0
    shutil.rmtree(folder / f"torch-{IMAGE_TORCH}.dist-info")
    fake_package(folder, "torch", "2.14.0")
    done = image_packages("check", constraints, folder)
    assert done.returncode == 1
    assert done.stderr == f"error: torch: found 2.14.0; expected the image's own {IMAGE_TORCH}\n"
    shutil.rmtree(folder / "torch-2.14.0.dist-info")
    assert image_packages("check", constraints, folder).stderr.startswith("error: torch: found None; expected")
    assert image_packages("freeze", constraints, folder).stderr.startswith("error: image: found no torch; expected")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with torch and NumPy, torch under the version that the image's build has."""
    folder = tmp_path_factory.mktemp("image") / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "-c", ROOT / "constraints-cpu.txt", "torch"], check=True)
    subprocess.run([*pip, f"numpy=={IMAGE_NUMPY}"], check=True)
    (info,) = folder.glob("lib/python*/site-packages/torch-*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    info.rename(info.with_name(f"torch-{IMAGE_TORCH}.dist-info"))
    renamed = re.sub(r"^Version: .*$", f"Version: {IMAGE_TORCH}", metadata, count=1, flags=re.MULTILINE)
    (info.with_name(f"torch-{IMAGE_TORCH}.dist-info") / "METADATA").write_text(renamed, encoding="utf-8")
    return folder


def copy(source: Path, destination: Path, into: bool) -> None:
    """As COPY does: the content of a folder, a file into a folder or under another name."""
    if source.is_dir():
        shutil.copytree(source, destination, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        return
    target = destination / source.name if into else destination
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


@pytest.fixture(scope="module")
def container(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder that the Dockerfile's steps have filled, and their environment; steps that need root are left out."""
    home = tmp_path_factory.mktemp("container")
    environment = without_a_job({"PATH": f"{stand_in / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    environment.pop("PYTHONPATH", None)
    for name, arguments in instructions():
        arguments = arguments.replace(HOME, str(home))
        if name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(arguments))
        elif name == "COPY":
            *sources, destination = arguments.split()
            for source in sources:
                copy(ROOT / source, home / destination, into=destination.endswith("/"))
        elif name == "RUN" and "useradd" not in arguments:
            subprocess.run(["bash", "-o", "pipefail", "-c", arguments], cwd=home, env=environment, check=True)
    return home, environment


def in_container(container: tuple[Path, dict[str, str]], *command: str) -> str:
    home, environment = container
    return subprocess.run(
        command, cwd=home.parent, env=environment, capture_output=True, text=True, check=True, timeout=600
    ).stdout


@installation
def test_the_images_torch_stays_what_it_is(stand_in: Path, container: tuple[Path, dict[str, str]]) -> None:
    assert (container[0] / "constraints.txt").read_text().splitlines() == [
        f"numpy=={IMAGE_NUMPY}",
        f"torch=={IMAGE_TORCH}",
    ]
    (info,) = stand_in.glob("lib/python*/site-packages/torch-*.dist-info")
    assert info.name == f"torch-{IMAGE_TORCH}.dist-info"
    assert "torch" in in_container(container, "python", "-c", "import torch; print(torch.__file__)")
    in_container(container, "python", "-m", "pip", "check")


@installation
def test_what_is_installed_is_in_the_range_that_was_tested(container: tuple[Path, dict[str, str]]) -> None:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
    requirements = [Requirement(line) for line in (container[0] / "requirements.txt").read_text().splitlines()]
    assert {"torch", "megatron-core", "nemo-toolkit"} <= {requirement.name for requirement in requirements}
    versions = in_container(container, "python", "-c", code, *(requirement.name for requirement in requirements))
    for requirement, version in zip(requirements, versions.split(), strict=True):
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


@installation
def test_package_and_tool_start(container: tuple[Path, dict[str, str]]) -> None:
    code = "import ctpd_nemo.pipeline.stages as s; print(s.__file__)"
    assert in_container(container, "python", "-c", code).strip() == str(container[0] / "ctpd_nemo/pipeline/stages.py")
    entrypoint = str(container[0] / "docker/entrypoint.sh")
    said = in_container(container, "env", "NPROC_PER_NODE=1", entrypoint, "train", "--help")
    assert "train is powered by Hydra" in said
