"""A tiny model, exported once."""

from pathlib import Path

import pytest

from flawsift.datasets import Dataset
from flawsift.deploy.export import export_model
from flawsift.features.backbones import Backbone
from tests.deploy.test_graph import fitted


@pytest.fixture(scope="session")
def exported(easy: Dataset, tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx of a small Quorum."""
    return export_model(fitted("quorum", easy, tiny), tmp_path_factory.mktemp("exported") / "model")
