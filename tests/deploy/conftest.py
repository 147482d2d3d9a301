"""What the tests of the manifests share: all of them rendered once, and the application to hold them against."""

from __future__ import annotations

import pytest

from scala_model.checkpoint import read_checkpoint
from tests.deploy.manifests import COMPONENTS, KUBERNETES, OVERLAYS, Object, render, render_on_base, why_no_kubectl
from tests.unit.edge.application import Runner
from tests.unit.toy import write_toy


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Objects by ``overlays/NAME``, and ``components/NAME`` for a component on the base."""
    if why_not := why_no_kubectl():
        pytest.skip(f"{why_not}: `apt-get install kubectl` from the Kubernetes project's repository to run this test")
    scratch = tmp_path_factory.mktemp("kustomizations")
    overlays = {f"overlays/{name}": render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
    return overlays | {f"components/{name}": render_on_base(name, scratch / name) for name in COMPONENTS}


@pytest.fixture(params=[*(f"overlays/{name}" for name in OVERLAYS), *(f"components/{name}" for name in COMPONENTS)])
def objects(request: pytest.FixtureRequest, manifests: dict[str, list[Object]]) -> list[Object]:
    """What one of them is made of, in turn."""
    return manifests[request.param]


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs scenarios on the application, in virtual time and with an engine that is none."""
    return Runner(read_checkpoint(write_toy(tmp_path_factory.mktemp("checkpoints") / "toy")))
