"""The package imports with its own dependencies alone."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import umbrella_train

pytestmark = pytest.mark.isolated


@pytest.mark.parametrize("name", umbrella_train.__all__)
def test_public_name_is_importable(name):
    assert getattr(umbrella_train, name).__name__ == name


def test_every_module_imports_without_extras():
    names = [module.name for module in pkgutil.walk_packages(umbrella_train.__path__, "umbrella_train.")]
    assert len(names) > 50
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
