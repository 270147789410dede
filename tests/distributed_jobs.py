"""What the processes of `test_distributed.py` run under torchrun: `distributed_jobs.py JOB FOLDER ARGUMENTS...`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from tqdit import workflow
from tqdit.calibration import store
from tqdit.cli.main import main
from tqdit.imaging import generate
from tqdit.quality import comparison
from tqdit.sampling.guidance import Sampling
from tqdit.system import distributed
from tqdit.system.world import World

SAMPLING = Sampling("ddpm", 4, 1.5)


def exchange(world: World, folder: Path) -> None:
    """Every helper once; each rank writes what it got."""
    assert distributed.current() is world
    found: dict[str, object] = {"world": [world.rank, world.size, world.device]}
    for count in (1, 2, 5):
        share = list(world.share(range(count)))
        parts = [torch.full((i + 1, 2), i, dtype=torch.float64) for i in share]
        whole = world.gather(parts, count)
        assert all(part.dtype == torch.float64 for part in whole)
        found[f"gathered {count}"] = [part.tolist() for part in whole]
        items = world.gather_named(map(named, share), count, lambda name: int(name) if name.isdigit() else None)
        assert all(item["a"].dtype == torch.bool for item in items)
        found[f"named {count}"] = [{name: tensor.tolist() for name, tensor in item.items()} for item in items]
    with torch.inference_mode():
        states = [torch.ones(2)]
    (sums := world.gather(states, world.size)[1]).requires_grad_()  # calibration differentiates what it is given
    found["trainable"] = sums.requires_grad
    mine = torch.tensor([world.rank, 1])
    found["sum"] = world.add(mine).tolist()
    found["mine"] = mine.tolist()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


def named(i: int) -> dict[str, torch.Tensor]:
    """Of several sizes and dtypes; "0" and "1" are for the rank of that number."""
    of_ranks = {str(rank): torch.tensor([[i + 0.5], [rank]], dtype=torch.float64) for rank in range(2)}
    return {"a": torch.ones(1, i, dtype=torch.bool), **of_ranks, "c": torch.tensor([i])}


def images(world: World, folder: Path, *models: str) -> None:
    """Images and a comparison on every rank; `models`: the float one, then its artifact."""
    torch.save([drawn(model) for model in models], folder / f"{world.rank}.pt")
    result = comparison.compare_samples(models[0], list(models[1:]), 5, SAMPLING, samples=5)
    (folder / f"{world.rank}.json").write_text(result.to_json())


def drawn(model: str) -> torch.Tensor:
    """7 images in batches of 2: four batches, the last one of a single image."""
    return workflow.sample_images(workflow.images_of(model, ["3", "5", "8"], 7, SAMPLING, seed=1, batch=2))


def every_job(folder: Path, *models: str) -> None:
    """Both jobs, each into a folder of its own, and then the command lines of `commands.json`, in the same processes.

    Starting the processes takes longer than all their work. The processes are joined already, but each is alone until
    a command asks to join, and alone again when that command has ended.
    """
    for name in ("exchange", "images"):
        (folder / name).mkdir(exist_ok=True)
    with distributed.joined("cpu") as world:
        exchange(world, folder / "exchange")
        images(world, folder / "images", *models)
        distributed.joined = partial(rejoined, world)
        distributed._current = World()
        for arguments in json.loads((folder / "commands.json").read_text()):
            command_line(arguments)
    assert distributed.current().size == 1


@contextmanager
def rejoined(world: World, _: str) -> Iterator[World]:
    """Stand for `distributed.joined` among processes that are joined."""
    distributed._current = world
    try:
        yield world
    finally:
        distributed._current = World()


def command_line(arguments: list[str]) -> None:
    """Run `tqdit ARGUMENTS`, which ends this process if the command fails."""
    sys.argv = ["tqdit", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def dies(_: Path, *arguments: str) -> None:
    """The command line, whose rank 1 breaks in its second batch."""
    save, count = generate.save_image, 0

    def failing(pixels: torch.Tensor, path: Path) -> None:
        nonlocal count
        count += 1
        if distributed.current().rank == 1 and count == 2:
            raise RuntimeError("a cosmic ray")
        save(pixels, path)

    generate.save_image = failing
    sys.argv = ["tqdit", *arguments]
    main()


def dies_searching(_: Path, *arguments: str) -> None:
    """The command line, whose rank 1 breaks in its second matmul of the search."""
    once = store.WorkFolder.once
    searched = 0

    def failing(self: store.WorkFolder, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> store.Tensors:
        nonlocal searched
        searched += name.startswith("solved")
        if distributed.current().rank == 1 and searched == 2:
            raise RuntimeError("a cosmic ray")
        return once(self, name, make)

    store.WorkFolder.once = failing
    sys.argv = ["tqdit", *arguments]
    main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = {"every_job": every_job, "dies": dies, "dies_searching": dies_searching}
    jobs[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
