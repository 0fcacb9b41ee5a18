"""Which versions of PyTorch run programs."""

from __future__ import annotations

import pytest
import torch

from sd35_trt.errors import Sd35Error
from sd35_trt.programs.torch_version import check_version


@pytest.mark.parametrize("version", ["2.8.1", "2.14.0", "3.0.0+cu140"])
def test_other_versions_of_pytorch(version: str) -> None:
    with pytest.raises(Sd35Error, match=rf"2\.9 and newer below 2\.14, this is {version[:5]}"):
        check_version(version)
    check_version("2.11.0+cu130")
    check_version(torch.__version__)
