"""The contract of every row of the modality table, and how names are resolved."""

from __future__ import annotations

import pytest

from umbrella_data.modality import MODALITIES, ModalitySpec, find_modality


@pytest.mark.parametrize("spec", MODALITIES.values(), ids=lambda spec: spec.name)
def test_every_row_keeps_the_contract_when_read(spec: ModalitySpec) -> None:
    assert MODALITIES[spec.name] is spec
    assert spec.channels
    assert spec.bids_suffixes
    assert spec.bids_datatype
    assert spec.description.startswith(("a ", "an "))
    assert spec.spatial_rank == (4 if spec.is_series else 3)
    for alias in (spec.name, *spec.aliases):
        assert find_modality(alias) is spec
        assert find_modality(f" {alias.upper()} ") is spec


def test_names_and_aliases_are_unique_when_case_is_ignored() -> None:
    names = [alias.lower() for spec in MODALITIES.values() for alias in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))


def test_table_holds_the_three_modalities_when_listed() -> None:
    assert list(MODALITIES) == ["T1", "rsfMRI", "dMRI"]
    assert MODALITIES["dMRI"].channels == ("FA", "MD")


def test_find_modality_suggests_the_nearest_when_unknown() -> None:
    with pytest.raises(ValueError, match=r"unknown modality 'bolt'.*T1, rsfMRI, dMRI.*did you mean 'rsfMRI'\?"):
        find_modality("bolt")
