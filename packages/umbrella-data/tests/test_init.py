"""The face of the package: every name is there, and nothing heavy is imported for a help text."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import umbrella_data
from umbrella_data import errors
from umbrella_data.cli import COMMANDS

pytestmark = pytest.mark.isolated


@pytest.mark.parametrize("name", umbrella_data.__all__)
def test_name_of_the_face_is_importable(name):
    value = getattr(umbrella_data, name)
    assert name == "MODALITIES" or value.__name__ == name


def test_names_are_listed():
    assert {"load_volume", "ConversationDataset", "ScanError"} <= set(umbrella_data.__all__)
    assert set(umbrella_data.__all__) <= set(dir(umbrella_data))


def test_every_error_that_a_caller_may_catch_is_in_the_face():
    own = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    public = {name for name, value in own.items() if value.__module__ == errors.__name__}
    assert {"CacheError", "ManifestError", "ScanError", "ScanReason", "UmbrellaDataError"} == public
    assert public <= set(umbrella_data.__all__)


def test_name_when_unknown_is_an_attribute_error():
    with pytest.raises(AttributeError, match="load_volumes"):
        umbrella_data.load_volumes  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_of_the_command_imports_no_torch(arguments):
    code = (
        "import sys\nfrom umbrella_data.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'scipy', 'nibabel', 'monai', 'tqdm'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: umbrella-data" in done.stdout
    assert ("--quiet" in done.stdout) == (len(arguments) == 2)


def test_commands_import_only_what_they_need():
    code = (
        "import sys\n"
        "import umbrella_data.bids.manifests\n"
        "assert 'torch' not in sys.modules\n"
        "import umbrella_data.jobs.check, umbrella_data.jobs.warm_cache, umbrella_data.preview.page\n"
        "found = {'matplotlib', 'monai', 'scipy.ndimage', 'scipy.stats', 'dipy', 'transformers', 'datasets'}\n"
        "assert not found & sys.modules.keys(), found & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_extras():
    names = [module.name for module in pkgutil.walk_packages(umbrella_data.__path__, "umbrella_data.")]
    assert len(names) > 50
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
