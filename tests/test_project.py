"""What pyproject.toml promises and deploy/locks pins must be one thing."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str, **environment: str) -> dict[str, Version]:
    """Return the versions that a lock pins, on this kind of machine or as `environment` says."""
    versions: dict[str, Version] = {}
    for line in (ROOT / f"deploy/locks/{name}.txt").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(
            default_environment() | environment
        ):
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            assert requirement.name not in versions, f"{requirement.name} is pinned twice"
            versions[requirement.name] = Version(pin.version)
    return versions


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.14"])
@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_lock_pins_what_pyproject_asks_for(build: str, python: str, machine: str) -> None:
    environment = {
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    versions = locked(build, **environment)
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"][build]:
        wanted = Requirement(line)
        assert versions[wanted.name] in wanted.specifier


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_tools_stand_beside_both_builds(build: str) -> None:
    tools, versions = locked("dev"), locked(build)
    for line in PROJECT["optional-dependencies"]["dev"]:
        assert Requirement(line).name in tools
    assert {name: versions[name] for name in tools.keys() & versions.keys()} == {
        name: tools[name] for name in tools.keys() & versions.keys()
    }


def test_cpu_build_has_no_cuda_builds_of_torch_packages() -> None:
    versions = locked("cpu")
    assert versions["torch"].local == "cpu"
    assert not {"torchaudio", "torchcodec", "torchvision"} & versions.keys()


def test_installed_command_and_plugin_are_there() -> None:
    (command,) = entry_points(group="console_scripts", name="trimtab")
    (plugin,) = entry_points(group="vllm.endpoint_plugins", name="trimtab")
    assert callable(command.load())
    assert callable(plugin.load())
