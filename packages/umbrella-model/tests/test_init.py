"""The package imports with its own dependencies alone."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import umbrella_model

pytestmark = pytest.mark.isolated


@pytest.mark.parametrize("name", umbrella_model.__all__)
def test_public_name_is_importable(name):
    assert getattr(umbrella_model, name).__name__ == name


def test_every_module_imports_without_extras():
    names = [module.name for module in pkgutil.walk_packages(umbrella_model.__path__, "umbrella_model.")]
    assert len(names) > 15
    for name in names:
        importlib.import_module(name)
