"""The wheel alone is enough: in an environment of its own it classifies with the checkpoint it carries."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]

CLASSIFY = """
import torch
from PIL import Image

import scala_model
import server
from scala_model import load_checkpoint
from scala_model.checkpoint import default_checkpoint, read_checkpoint
from scala_model.preprocess import to_pixels

folder = default_checkpoint()
model = load_checkpoint(folder)
spec = read_checkpoint(folder).preprocessing
pixels_HWC = torch.from_numpy(to_pixels(Image.linear_gradient("L").convert("RGB"), spec))
images_BCHW = ((pixels_HWC / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(2, 0, 1)[None]
with torch.inference_mode():
    logits = model(images_BCHW, model.config.widths[-1])
assert logits.shape == (1, model.config.num_classes), logits.shape
assert logits.isfinite().all()
print(scala_model.__file__, server.__file__, folder, sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; a failure shows it whole."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command[0]} exited {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds our wheel.

    Its dependencies are borrowed from the running environment: a path in a .pth file makes packages visible, but
    not that environment's own .pth files, so the editable install of this source tree stays out.
    """
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPO_ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    (site_packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "venv"


@pytest.mark.slow
def test_installed_wheel_classifies_with_the_checkpoint_it_carries(environment: Path) -> None:
    output = run(environment / "bin/python", "-I", "-c", CLASSIFY, cwd=environment)
    network, service, checkpoint = map(Path, output.splitlines())
    assert network.is_relative_to(environment)
    assert service.is_relative_to(environment)
    assert checkpoint.is_relative_to(network.parent)


@pytest.mark.slow
def test_installed_server_has_all_of_its_page(environment: Path) -> None:
    folder = "from server.routes.pages import FOLDER; print(FOLDER)"
    installed = Path(run(environment / "bin/python", "-I", "-c", folder, cwd=environment).strip())
    assert installed.is_relative_to(environment)
    ours = {path.name: path.read_bytes() for path in (REPO_ROOT / "server/pages").iterdir()}
    assert {path.name: path.read_bytes() for path in installed.iterdir()} == ours
    assert "playground.html" in ours


@pytest.mark.slow
def test_installed_command_explains_itself(environment: Path) -> None:
    assert "serve" in run(environment / "bin/scala-serve", "--help", cwd=environment)
