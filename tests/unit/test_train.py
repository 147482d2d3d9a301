"""The training loop on a toy task: it learns at every width, resumes to the same bits, and stops loudly."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scala_model import ScalaConfig, ScalaViT
from scala_model.preprocess import Preprocessing
from scala_model.train import loop
from scala_model.train.data import ImageSet
from scala_model.train.evaluation import evaluate
from scala_model.train.loop import Teacher, Trainer, TrainingError
from scala_model.train.parallel import Processes
from scala_model.train.recipe import Recipe, separate, us_net, with_epochs, without
from scala_model.width import Width

TOY = Recipe(
    config=ScalaConfig(
        image_size=12,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=10,
        smallest=0.25,
        largest=1.0,
        granularity=0.375,
    ),
    epochs=12,
    largest_only_epochs=2,
    batch_size=50,
    learning_rate=1e-2,
    warmup_epochs=1,
    label_smoothing=0.05,
    clip_grad_norm=5.0,
    resident_size=16,
    autocast="float32",
)


def drawings(count: int, size: int, seed: int) -> ImageSet:
    """Ten classes: a square or a horizontal bar, in five colours, somewhere on grey noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = torch.randint(90, 160, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    colours = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20], [20, 250, 250]])
    for picture, label in zip(pixels, labels.tolist(), strict=True):
        tall, wide = (size // 2, size // 2) if label < 5 else (size // 8, size)
        top = int(torch.randint(size - tall + 1, (), generator=generator))
        left = int(torch.randint(size - wide + 1, (), generator=generator))
        picture[top : top + tall, left : left + wide] = colours[label % 5]
    return ImageSet(pixels, labels)


def trainer(folder: Path, recipe: Recipe = TOY, *, seed: int = 0, count: int = 250, **options: Any) -> Trainer:
    return Trainer(recipe, drawings(count, recipe.resident_size, 0), folder, seed=seed, **options)


def quiet(step: int, text: str) -> None:
    pass


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def assert_same(run: Trainer, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_every_width_learns(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(TOY, epochs=20), count=500)
    seen: list[int] = []
    run.run(log_every=100, progress=lambda step, text: seen.append(step))
    assert run.step == run.num_steps == 200
    assert seen == [100, 200]

    run.model.card = {"preprocessing": {"image_size": 12}}
    result = evaluate(run.model.eval(), drawings(300, 12, 1))
    accuracies = {str(width): result.accuracy(width) for width in run.recipe.config.widths}
    assert accuracies.keys() == {"0.25", "0.625", "1"}
    assert min(accuracies.values()) > 0.5, accuracies  # chance is 0.1


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_is_not_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    monkeypatch.setattr(loop, "has_bfloat16", lambda device: able)
    run = trainer(tmp_path, replace(TOY, autocast="bfloat16"))
    (logits,) = run._heads(torch.zeros(2, 3, 12, 12), Width(1.0))
    assert logits.dtype is (torch.bfloat16 if able else torch.float32)
    assert not trainer(tmp_path).in_bfloat16, "nobody asked for it"


# -- going on after a stop

SHORT = replace(  # 20 steps, 10 of them of the largest alone, everything random switched on
    TOY, epochs=4, mixup=0.4, cutmix=0.5, drop_path=0.2, rand_augment=5, erasing=0.3, ema_decay=0.9
)


class Killed(BaseException):
    pass


class SavesEveryFour(Trainer):
    def save(self) -> None:
        if self.step % 4 == 0 or self.step == self.num_steps:
            super().save()


def kill_at(step: int) -> Callable[[int, str], None]:
    def progress(done: int, text: str) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("killed_at", [3, 8, 14])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    """Saved every 4 steps: killed after 8, nothing is repeated; after 14, two steps; after 3, nothing was saved."""
    whole = trainer(tmp_path / "whole", SHORT)
    whole.run(progress=quiet)

    first = SavesEveryFour(SHORT, drawings(250, SHORT.resident_size, 0), tmp_path / "killed")
    with pytest.raises(Killed):
        first.run(log_every=1, saving_share=math.inf, progress=kill_at(killed_at))
    torch.manual_seed(99)  # whatever the new process's generator holds
    second = trainer(tmp_path / "killed", SHORT)
    assert second.resume() is (killed_at >= 4)
    assert second.step == killed_at // 4 * 4
    second.run(log_every=1, progress=quiet)
    assert_same(second, weights(whole))
    lines = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))  # each step once
    assert all(torch.equal(average, whole.ema[name]) for name, average in second.ema.items())


def test_a_run_asked_to_stop_saves_and_goes_on_later(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", SHORT)
    whole.run(progress=quiet)

    first = trainer(tmp_path / "stopped", SHORT)
    first.run(log_every=5, progress=lambda step, text: first.stop())
    assert first.step == 6  # asked after step 5, it ends with the step in hand
    second = trainer(tmp_path / "stopped", SHORT)
    assert second.resume()
    assert second.step == 6
    second.run(progress=quiet)
    assert_same(second, weights(whole))


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    run = trainer(tmp_path, SHORT)
    run.run(progress=quiet)
    again = trainer(tmp_path, SHORT)
    assert again.resume()
    again.run(progress=kill_at(again.num_steps))
    assert_same(again, weights(run))


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    runs: list[Trainer] = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(runs))
        runs.append(trainer(tmp_path / folder, SHORT, seed=seed))
        for _ in range(12):
            next(runs[-1].steps())
    assert_same(runs[1], weights(runs[0]))
    with pytest.raises(AssertionError):
        assert_same(runs[2], weights(runs[0]))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume() is False


@pytest.mark.parametrize("other", ["recipe", "seed", "data set", "weights to start from"])
def test_the_state_of_another_run_is_refused(tmp_path: Path, other: str) -> None:
    run = trainer(tmp_path)
    next(run.steps())
    run.save()
    different = {
        "recipe": lambda: trainer(tmp_path, replace(TOY, learning_rate=1e-3)),
        "seed": lambda: trainer(tmp_path, seed=1),
        "data set": lambda: trainer(tmp_path, count=251),
        "weights to start from": lambda: trainer(tmp_path, init="aa"),
    }[other]()
    with pytest.raises(TrainingError, match=rf"state\.pt belongs to a run with another {other}: use another folder"):
        different.resume()
    assert different.step == 0


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"state\.pt is damaged: delete it to start again"):
        trainer(tmp_path).resume()


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="is damaged"):
        trainer(tmp_path).resume()


def test_a_killed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    next(run.steps())
    run.save()
    next(run.steps())

    def cut_off(state: object, path: Path) -> None:
        path.write_bytes(b"half a sta")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", cut_off)
        with pytest.raises(Killed):
            run.save()
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 1


# -- what must not go on


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    for _ in range(2):
        next(run.steps())
    run.save()
    state = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        run.model.head.bias[0] = math.inf
    with pytest.raises(
        TrainingError,
        match=r"step 2 gave a loss \(width 1: nan\) .* not finite: start again in another folder with a lower",
    ):
        run.run(progress=quiet)
    assert (tmp_path / "state.pt").read_bytes() == state
    assert trainer(tmp_path).resume()


@pytest.mark.parametrize("clip", [None, 5.0])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path, clip: float | None) -> None:
    run = trainer(tmp_path, replace(TOY, clip_grad_norm=clip))
    before = weights(run)
    run.model.cls_token.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match=r"gradient \(norm (inf|nan)\) that is not finite"):
        next(run.steps())
    assert run.step == 0
    assert_same(run, before)


def test_data_that_does_not_fit_the_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="49 images do not fill one batch of 50"):
        trainer(tmp_path, count=49)
    data = drawings(100, 16, 0)
    with pytest.raises(TrainingError, match="label 10 is outside the recipe's 10 classes"):
        Trainer(TOY, ImageSet(data.pixels, data.labels + 1), tmp_path)
    with pytest.raises(TrainingError, match=r"0.01 epochs of 5 steps are no step: give more epochs"):
        trainer(tmp_path, with_epochs(TOY, 0.01))


def test_the_state_is_saved_at_once_at_the_end_and_at_little_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that takes 1 s may come every 50 s; a step takes 7 s here."""
    now, saved = 0.0, []
    run = trainer(tmp_path, SHORT)
    update = run._update

    def slow_step(*arguments: Any) -> Any:
        nonlocal now
        now += 7
        return update(*arguments)

    def slow_save() -> None:
        nonlocal now
        now += 1
        saved.append(run.step)

    monkeypatch.setattr(run, "_update", slow_step)
    monkeypatch.setattr(run, "save", slow_save)
    monkeypatch.setattr("scala_model.train.loop.time.monotonic", lambda: now)
    run.run(progress=quiet)
    assert saved == [1, 9, 17, 20]


# -- the schedule


def test_the_rate_warms_up_and_then_falls_along_a_cosine(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(TOY, epochs=11))  # 5 steps an epoch: 5 of warm-up, 50 of cosine
    rates = []
    for run.step in (0, 1, 4, 5, 30, 54, 55):
        rates.append(run.learning_rate())
    expected = [0.002, 0.004, 0.01, 0.01, 0.005, 0.01 * (1 + math.cos(math.pi * 0.98)) / 2, 0.0]
    assert rates == pytest.approx(expected)


def test_the_first_epochs_train_the_largest_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    widths = [[width for width, _ in next(run.steps())["loss"]] for _ in range(14)]
    assert widths == [["1"]] * 10 + [["1", "0.625", "0.25"]] * 4


def test_every_image_is_seen_once_an_epoch_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run._labels = torch.arange(250)
    seen: list[int] = []

    def note(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
        seen.extend(labels.tolist())
        return torch.zeros(len(labels), num_classes)

    monkeypatch.setattr("scala_model.train.loop.soft_labels", note)
    assert sum(1 for _ in run._batches()) == 60
    first, second = seen[:250], seen[250:500]
    assert sorted(first) == sorted(second) == list(range(250))
    assert first != second


def test_only_matrices_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in run.optimizer.param_groups)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.05, 0.0]
    assert plain >= {"cls_token", "pos_embed", "head.bias", "norm.weight", "blocks.0.norm1.weight"}
    assert decayed >= {"patch_embed.proj.weight", "head.weight", "blocks.1.attn.qkv.weight"}
    assert decayed | plain == set(names.values())


def test_the_log_tells_each_networks_loss(tmp_path: Path) -> None:
    texts: list[str] = []
    trainer(tmp_path, SHORT).run(log_every=10, progress=lambda step, text: texts.append(text))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert [[width for width, _ in line["loss"]] for line in lines] == [["1"], ["1", "0.625", "0.25"]]
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert lines[1]["epoch"] == 4.0
    assert "images/s" in texts[0]


# -- the moving average


def test_the_average_follows_the_weights_and_forgets_the_start(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(TOY, ema_decay=0.5))
    average = weights(run)
    for step in range(1, 6):
        next(run.steps())
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in weights(run).items()}
    assert average.keys() == run.ema.keys()
    for name, tensor in run.ema.items():
        torch.testing.assert_close(tensor, average[name])


# -- the baselines run in the same loop


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        (us_net(TOY), None),  # any two trained widths between the ends of the list
        (without(TOY, "stable-sampling"), ["1", "0.625", "0.625", "0.25"]),
        (without(TOY, "isolated-activation"), ["1", "0.625", "0.25"]),
        (separate(TOY, 0.25), ["1"]),
    ],
)
def test_every_baseline_trains(tmp_path: Path, recipe: Recipe, trained: list[str] | None) -> None:
    run = trainer(tmp_path, replace(recipe, largest_only_epochs=0))
    widths = [width for width, _ in next(run.steps())["loss"]]
    assert widths == trained if trained else (len(widths), widths[0], widths[-1]) == (4, "1", "0.25")


# -- an external teacher

DISTILLED = replace(TOY, config=replace(TOY.config, distilled=True))


def teacher(mean: float = 0.5, **changes: Any) -> Teacher:
    torch.manual_seed(7)
    network = ScalaViT(replace(TOY.config, smallest=1.0, **changes)).subnet(1.0)
    size = network.config.image_size
    return Teacher("t", network, Preprocessing(size, mean=(mean,) * 3, std=(0.25,) * 3))


def test_a_distilled_network_learns_from_labels_and_teacher(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(DISTILLED, largest_only_epochs=0), teacher=teacher())
    before = weights(run)
    next(run.steps())
    for name in ("head.weight", "head_dist.weight", "dist_token"):
        assert not torch.equal(run.model.state_dict()[name], before[name])


def test_the_teacher_sees_what_the_network_sees_in_its_own_normalisation(tmp_path: Path) -> None:
    run, asked = trainer(tmp_path, DISTILLED, teacher=teacher(mean=0.5)), []
    assert run.teacher is not None
    run.teacher.network.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))
    images, targets = next(run._batches())
    run._backward(images, targets)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(asked[0], (images * std + mean - 0.5) / 0.25, atol=1e-5, rtol=0)


def test_the_state_knows_its_teacher(tmp_path: Path) -> None:
    trainer(tmp_path, DISTILLED, teacher=teacher()).save()
    other = teacher()
    other.name = "u"
    with pytest.raises(TrainingError, match="another teacher"):
        trainer(tmp_path, DISTILLED, teacher=other).resume()
    assert trainer(tmp_path, DISTILLED, teacher=teacher()).resume()


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"a distilled network needs an external teacher: .* --teacher DIR"):
        trainer(tmp_path, DISTILLED)
    with pytest.raises(TrainingError, match="only a distilled network has a head for an external teacher"):
        trainer(tmp_path, TOY, teacher=teacher())
    with pytest.raises(TrainingError, match="the teacher takes images of 16 px, the recipe makes 12 px"):
        trainer(tmp_path, DISTILLED, teacher=teacher(image_size=16))


# -- several processes


def test_processes_that_start_from_different_states_are_refused(tmp_path: Path) -> None:
    half = Half(1, 2)
    run = trainer(tmp_path, processes=half)
    sums = torch.stack([parameter.detach().double().sum() for parameter in run.model.parameters()])
    for step, offset, alike in ((0.0, 0.0, True), (1.0, 0.0, False), (0.0, 1e-3, False)):
        object.__setattr__(half, "mean", [torch.cat([torch.tensor([step / 2]).double(), sums + offset])])
        if alike:
            run._check_alike()
        else:
            with pytest.raises(TrainingError, match="the processes start from different states: all must see the same"):
                run._check_alike()


def test_a_batch_is_shared_out_and_nothing_is_seen_twice(tmp_path: Path) -> None:
    alone = trainer(tmp_path)
    shares = [trainer(tmp_path, processes=Processes(rank, 2)) for rank in (0, 1)]
    for step in (0, 4, 5):
        parts = [share._chosen(step).tolist() for share in shares]
        assert [len(part) for part in parts] == [25, 25]
        assert sorted(parts[0] + parts[1]) == sorted(alone._chosen(step).tolist())
    with pytest.raises(TrainingError, match="3 processes cannot share a batch of 50 evenly"):
        trainer(tmp_path, processes=Processes(0, 3))


# Everything random but dropped paths, which the two parts below would draw from one generator.
SHARED = replace(SHORT, drop_path=0.0, epochs=3)


class Half(Processes):
    """One of two processes played in this one: what the exchange gives is put into its hands."""

    mean: list[torch.Tensor]

    def average(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.mean]


def played(folder: Path) -> Trainer:
    """Two processes' run, computed step by step by this one."""
    halves = [Half(rank, 2) for rank in (0, 1)]
    runs = [trainer(folder, SHARED, processes=half) for half in halves]
    for batches in zip(*(run._batches() for run in runs), strict=True):
        done = [run._backward(*batch) for run, batch in zip(runs, batches, strict=True)]
        sent = [
            [*(p.grad for p in run.model.parameters() if p.grad is not None), losses, torch.zeros(1)]
            for run, (_, losses) in zip(runs, done, strict=True)
        ]
        mean = [(a + b) / 2 for a, b in zip(*sent, strict=True)]
        for run, half, (chosen, losses) in zip(runs, halves, done, strict=True):
            object.__setattr__(half, "mean", mean)
            run._update(chosen, losses)
    return runs[0]


def together(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """Train in two real processes; what each has in the end."""
    folder.mkdir(exist_ok=True)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*program, "-m", "tests.unit.share_of_training", folder, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_train_one_network_with_one_exchange_a_step(tmp_path: Path) -> None:
    first, second = together(tmp_path / "whole")
    assert first["step"] == second["step"] == 15
    assert first["exchanges"] == 15 + 1  # and one before the first, to see that all start alike
    for name, expected in weights(played(tmp_path / "played")).items():
        assert torch.equal(first["model"][name], second["model"][name])
        torch.testing.assert_close(first["model"][name], expected, atol=1e-5, rtol=1e-4)

    stopped = together(tmp_path / "stopped", 6)
    assert [state["step"] for state in stopped] == [7, 7]  # asked of one, both stop
    resumed = together(tmp_path / "stopped")
    assert [state["exchanges"] for state in resumed] == [8 + 1, 8 + 1]
    assert all(torch.equal(tensor, first["model"][name]) for name, tensor in resumed[1]["model"].items())


# -- compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_a_block_is_compiled_once_a_width_and_computes_the_same(tmp_path: Path) -> None:
    """Three widths of three blocks: three graphs, not nine, so a run starts in a minute rather than in ten."""
    eager = trainer(tmp_path, replace(TOY, config=replace(TOY.config, depth=3), drop_path=0.1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = trainer(tmp_path, eager.recipe)
    torch._dynamo.reset()
    compiled._compile(backend=counter)
    images, _ = next(eager._batches())
    for width in TOY.config.widths:
        torch.manual_seed(0)
        expected = eager.model(images, width)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled.model(images, width), expected)
        compiled.model(images, width).sum().backward()
    assert counter.frame_count == len(TOY.config.widths) == 3
