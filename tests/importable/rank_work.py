"""What the processes of tests do: functions of a module, since they are named to other processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mu import ranks
from mu.config import ConfigError
from mu.devices import resolve_devices
from mu.errors import MuError
from mu.ldm.tensor_file import CheckpointError, write_state_dict


def main(argv: Sequence[str]) -> int:
    """NAME ARGUMENT FILE: call a function of this file; argument and result are JSON."""
    name, argument, path = argv
    Path(path).write_text(json.dumps(globals()[name](json.loads(argument))))
    return 0


def exchanges(_: object) -> dict[str, Any]:
    """One of each exchange, with values that tell the processes apart."""
    mine = ranks.rank() + 1
    tensors = [torch.full((3, 2), float(mine)), torch.arange(4).float()[::2] * mine, torch.full((2,), mine)]
    ranks.sum_(tensors)
    ranks.gathered(None)
    return {
        "sums": [tensor.tolist() for tensor in tensors],
        "gathered": ranks.gathered((ranks.rank(), ranks.local_rank(), ranks.world_size())),
        "from_main": ranks.from_main(mine),
        "on_main": ranks.on_main(os.getpid),
        "pids": ranks.gathered(os.getpid()),
        "shares": ranks.gathered(list(ranks.share(range(5)))),
        "devices": ranks.gathered(resolve_devices("cpu,cpu")),
        "threads": ranks.gathered(torch.get_num_threads()),
    }


def main_fails(_: object) -> None:
    def fail() -> None:
        raise ConfigError(["lr: too large"])

    try:
        ranks.on_main(fail)
    except ConfigError as error:
        # Both have it, and both can still speak.
        raise MuError(f"{ranks.gathered(str(error))}") from None


def one_fails(path: str) -> None:
    with ranks.in_step():
        if ranks.rank() == 1:
            raise MuError("rank 1 cannot read its image")
        Path(path).write_text("done")


def one_fails_alone(_: object) -> None:
    if ranks.rank() == 1:
        raise MuError("only rank 1 knows")
    ranks.gathered(None)


def one_crashes(_: object) -> None:
    if ranks.rank() == 1:
        raise KeyError("surprise")
    ranks.gathered(None)


def one_is_killed(_: object) -> None:
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gathered(None)


def wait_for_signal(path: str) -> None:
    """Until the process is stopped; `<path>-<rank>` says that it is ready, and holds its number."""
    ranks.gathered(None)
    Path(f"{path}-{ranks.rank()}").write_text(str(os.getpid()))
    time.sleep(120)


def prints(_: object) -> None:
    """What a library of C++ may print."""
    os.write(1, b"[Gloo] connected\n")
    ranks.gathered(None)


def starts_two(path: str) -> None:
    """Two processes that wait to be stopped, started by this one."""
    from mu.launch import on_ranks

    on_ranks(wait_for_signal, path, "cpu,cpu")


def both_stages(configs: tuple[Any, Any]) -> dict[str, Any]:
    """A mask and a training run, and what each process has of their results."""
    from mu.algorithms.saliency_unlearning.algorithm import MaskingAlgorithm, SaliencyUnlearningAlgorithm

    mask_config, train_config = configs
    masked = MaskingAlgorithm(mask_config).run()
    trained = SaliencyUnlearningAlgorithm(train_config, mask_path=str(masked["masks"][0.5])).run()
    return {
        "masked": masked,
        "trained": trained,
        "same": len(set(ranks.gathered(str((masked, trained))))) == 1,
    }


def whole_and_stopped_in_one(configs: tuple[Any, Any]) -> None:
    """Two training runs; of the second, process 1 alone is asked to stop, during its second step."""
    from mu.algorithms.saliency_unlearning import trainer
    from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm

    SaliencyUnlearningAlgorithm(configs[0]).run()
    whole, steps = trainer.SalUn.terms, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if ranks.rank() == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    trainer.SalUn.terms = stop
    SaliencyUnlearningAlgorithm(configs[1]).run()


def poisoned_in_one(config: Any) -> None:
    """A training run in which the loss is NaN in process 1 alone, at its second step."""
    from mu.algorithms.saliency_unlearning import trainer
    from mu.algorithms.saliency_unlearning.algorithm import SaliencyUnlearningAlgorithm

    whole, steps = trainer.SalUn.terms, []

    def poison(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        nan = float("nan") if ranks.rank() == 1 and len(steps) == 2 else 1.0
        return {name: nan * term for name, term in whole(*args, **kwargs).items()}

    trainer.SalUn.terms = poison
    SaliencyUnlearningAlgorithm(config).run()


def one_hangs(path: str) -> None:
    """Process 0 waits where no connection is; process 1 fails."""
    if ranks.rank() == 1:
        while not Path(path).exists():
            time.sleep(0.05)
        raise KeyError("surprise")
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)


def again_and_again(task: tuple[str, dict[str, str]]) -> list[list[tuple[int, int]]]:
    """In a process that torchrun or srun has started: many runs, one after the other; who takes part in each."""
    from mu.launch import on_ranks

    devices, environ = task
    os.environ |= environ
    found = [on_ranks(place_in_turn, 10 * turn, devices) for turn in range(10)]
    assert ranks.world_size() == 1
    ranks.leave()
    return found


def meeting_of_a_step(step: dict[str, str]) -> dict[str, list[str]]:
    """Where process 1 of a SLURM step of 2 meets the other, and which of the names that say it stay set."""
    names = ("MASTER_ADDR", "RANK", "MASTER_PORT", *ranks._TORCHRUN)
    for name in (*names, "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ |= step
    with ranks._described(ranks._Place(1, 2, 0, 1)):
        inside = [os.environ[name] for name in names]
    return {"inside": inside, "after": [name for name in names if name in os.environ]}


def place_in_turn(turn: int) -> list[tuple[int, int]]:
    return ranks.gathered((turn + ranks.rank(), ranks.local_rank()))


def in_the_callers_group(place: tuple[int, int]) -> list[int]:
    """In a process that has set up torch.distributed by itself."""
    import torch.distributed as dist

    from mu.launch import on_ranks

    rank, port = place
    # Not by a file: with torch 2.6, who ends the group second may wait for ever for the file that the first removed.
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        return on_ranks(ranks.gathered, rank, "cpu,cpu")
    finally:
        assert dist.is_initialized(), "the caller's group is his to end"
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys(), "the environment is what it was"
        dist.destroy_process_group()


def sample_grid(task: tuple[str, str, str, list[str]]) -> int:
    """In a process of its own: images of styles, sampled where others may do the same; how many it sampled."""
    from mu.datasets.generated_images import GeneratedImages, SampleSettings
    from mu.evaluation.grid import Grid
    from mu.ldm import load_model

    yaml, checkpoint, folder, styles = task
    settings = SampleSettings(2, 3.0, 16)
    images = GeneratedImages(load_model(yaml, checkpoint), folder, settings, subfolder="grids")
    grid = Grid(tuple(styles), ("Cats", "Dogs", "Cars"), (188, 288))
    return images.sample_missing(list(grid.rows(images.path)), batch_size=4)


def sample_and_evaluate(configs: tuple[Any, Any]) -> dict[str, Any]:
    """Both, how many images and classifiers each process has made, and what each has of the results."""
    from mu.commands import sampling
    from mu.datasets import generated_images
    from mu.evaluation import evaluation

    calls = {"sampled": 0, "generated": 0, "classifiers": 0}

    def counted(module: Any, name: str, kind: str) -> Any:
        whole = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[kind] += 1
            return whole(*args, **kwargs)

        return patch.object(module, name, count)

    with (
        counted(sampling, "png", "sampled"),
        counted(generated_images, "png", "generated"),
        counted(evaluation, "load_scorer", "classifiers"),
    ):
        sampled, evaluated = sampling.run(configs[0]), evaluation.run(configs[1])
    return {
        "sampled": sampled,
        "evaluated": evaluated,
        "images": ranks.gathered((calls["sampled"], calls["generated"])),
        "classifiers": ranks.gathered(calls["classifiers"]),
        "same": len(set(ranks.gathered(str((sampled, evaluated))))) == 1,
    }


def prepare(task: tuple[str, str, str]) -> dict[str, Any]:
    """Images of a model are sampled and encoded, their prompts embedded; then with what goes wrong in it."""
    from mu.datasets.generated import plan_rows
    from mu.datasets.generated_images import GeneratedImages, SampleSettings
    from mu.datasets.latents import LatentCache
    from mu.ldm import load_model

    yaml, checkpoint, folder = task
    model = load_model(yaml, checkpoint)
    images = GeneratedImages(model, folder, SampleSettings(steps=2, guidance_scale=3.0, image_size=16))
    grid = {"styles": ("Noto", "Blob"), "objects": ("Cats", "Dogs"), "template": "style"}
    planned = plan_rows(
        images.path, template_name="Noto", images_per_prompt=4, retain_images_per_prompt=1, **grid
    )
    rows = (*planned.forget, *planned.retain)
    encoded: list[int] = []
    whole = model.encode
    model.encode = lambda pixels: (encoded.append(1), whole(pixels))[1]
    found = {
        "sampled": [images.sample_missing(some, batch_size=2) for some in (rows[:3], rows, rows)],
        "moments": LatentCache(model, Path(folder) / "latents", image_size=16).moments(rows),
        "contexts": LatentCache(model, Path(folder) / "latents", image_size=16).contexts(
            ["", *(row.prompt for row in rows)]
        ),
        "encoded": ranks.gathered(len(encoded)),
    }
    again = LatentCache(model, Path(folder) / "latents", image_size=16).moments(rows)
    found["encoded again"] = ranks.gathered(len(encoded))
    found["same"] = len(set(ranks.gathered(_digest(*found["moments"])))) == 1
    found["same contexts"] = len(set(ranks.gathered(_digest(*found["contexts"].values())))) == 1
    found["kept"] = all(torch.equal(one, other) for one, other in zip(found["moments"], again, strict=True))

    bad = [Path(folder) / "bad" / f"{number}.png" for number in range(len(rows))]
    bad_rows = [replace(row, image=path) for row, path in zip(rows, bad, strict=True)]

    def break_some() -> None:
        bad[0].parent.mkdir()
        for number, path in enumerate(bad):
            if number != 2:  # missing
                path.write_bytes(b"no picture" if number in (5, 6) else rows[number].image.read_bytes())

    ranks.on_main(break_some)
    cache = LatentCache(model, Path(folder) / "bad" / "latents", image_size=16)
    found["bad images"] = ranks.gathered(_message(lambda: cache.moments(bad_rows)))

    if ranks.rank() == ranks.world_size() - 1:  # its images alone are none
        with torch.no_grad():
            model.first_stage_model.get_parameter("decoder.conv_in.weight").fill_(torch.nan)
    images.path = Path(folder) / "nan"
    nan_rows = [replace(row, image=images.path / row.relative) for row in rows]
    found["bad model"] = ranks.gathered(_message(lambda: images.sample_missing(nan_rows, batch_size=2)))
    return found


def write_forever(path: str) -> None:
    """A file of 4 MB again and again, for minutes; in each of its versions all values are the same."""
    version, end = 0.0, time.monotonic() + 300
    while time.monotonic() < end:
        version += 1
        write_state_dict({f"t{number}": torch.full((50_000,), version) for number in range(20)}, Path(path))


def save_too_much(path: str) -> None:
    """A file of 4 MB, where it cannot be written."""
    try:
        write_state_dict({f"t{number}": torch.ones(100_000) for number in range(10)}, Path(path))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def save_large_mask(path: str) -> None:
    """A mask of 1 MB, where it cannot be written."""
    from mu.algorithms.saliency_unlearning.mask_file import save_mask

    try:
        save_mask({"w": torch.ones(8_000_000, dtype=torch.bool)}, Path(path), {})
    except MuError as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from error


def _digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def _message(work: Callable[[], object]) -> tuple[str, bool]:
    """That of the error, and whether it is told to be one of all processes."""
    try:
        work()
    except MuError as error:
        return str(error), error.in_all_processes
    return "", False
