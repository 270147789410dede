"""The verb `evaluate`: images of models, their features, and their scores under one protocol."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tqdit import drawing
from tqdit.errors import InputError
from tqdit.evaluation import measure
from tqdit.evaluation.collect import Collected, collect
from tqdit.evaluation.contenders import BATCH_SUFFIX, Batch, Contender, Model
from tqdit.evaluation.costs import Costs
from tqdit.evaluation.image_sets import ImageSet, write_npz
from tqdit.evaluation.networks import FASHION, Network, load_network
from tqdit.evaluation.reference import FASHION_TEST, Reference, check_name, open_reference
from tqdit.evaluation.results import Evaluation, Protocol, Row, read_evaluation
from tqdit.evaluation.scores import NEIGHBOURS
from tqdit.imaging.images import BATCH
from tqdit.runtime.target import Device, Dtype, Target
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.stages import Report, silent
from tqdit.system.distributed import current
from tqdit.system.environment import environment, peak_memory_bytes
from tqdit.system.isolation import isolated
from tqdit.system.outputs import check_file, check_outside, check_parent
from tqdit.system.validation import check_counts, check_paths, check_report, check_seed

NUM = 10_000
RESULT_SUFFIX = ".json"  # by which the command tells result files from models
PROBES = 2  # images of a first call: programs of torch.export often take no batch of 1


@isolated()
def evaluate(  # noqa: PLR0913 - one for each option of the command
    models: str | Path | Sequence[str | Path],
    reference: str | Path,
    out: str | Path,
    *,
    network: str | Path | None = None,
    num: int = NUM,
    sampling: Sampling = Sampling(),
    classes: Sequence[str | int] = (),
    seed: int = 0,
    batch: int = BATCH,
    conditions: Conditions | str | Path | None = None,
    images: str | Path | None = None,
    npz: str | Path | None = None,
    backend: str = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    report: Report = silent,
) -> Evaluation:
    """Evaluate models by `num` images of each: Fréchet distances, Inception score, precision, recall, kernel distance.

        tqdit.evaluate(["fashion-dit", "w8a8"], "fashion-test", "results.json")
        tqdit.evaluate("dit-w8a8", "VIRTUAL_imagenet256_labeled.npz", "results.json", num=50_000,
                       network="inception-2015-12-05.pt", sampling=tqdit.Sampling("ddpm", 250, 1.5))

    `models`: paths or names, float or quantized; an `.npz` file is a batch of samples that was drawn elsewhere.
    `reference`: as in `reference.open_reference`. `network`: as in `networks.load_network`; by default the bundled
    classifier for "fashion-test". `out`: the result file, which is rewritten after every model. If it is there, its
    protocol must be the same; models that it has are not evaluated again. `images`: the folder where each model's
    images are kept, by default `out` with the suffix `.images`; the same call goes on there after an interruption.
    `npz`: a folder for ADM batches of the images. `classes` to `dtype`: as in `sample`.

    Inside `distributed.joined` the ranks share images and features; they must see the same folders. Each returns the
    whole evaluation, whose scores are the same bits for every number of processes on like devices.

    Raises `InputError`, before any image is drawn, for a file that cannot be used, and for different protocols.
    """
    check_counts(num=num, batch=batch)
    check_seed(seed)
    check_report(report)
    check_paths(reference=reference, out=out, network=network, images=images, npz=npz)
    for name, value in (("reference", reference), ("out", out)):
        if value is None:
            raise InputError(f"{name} must be a path, got None")
    given, out, target = _listed(models), Path(out), Target(backend, device, dtype)
    place = out.with_suffix(".images") if images is None else Path(images)
    batches = None if npz is None else Path(npz)
    if out.suffix != RESULT_SUFFIX:
        raise InputError(f"results are a {RESULT_SUFFIX} file, got '{out}'")
    check_file(out)
    for folder in filter(None, (place, batches)):
        check_outside(folder)
        check_parent(folder / "images")

    def drawn_here(name: str | Path) -> Contender:
        wanted = drawing.images_of(name, classes, num, sampling, seed, batch, conditions)
        return Model(wanted, target, place)

    check_name(reference)
    found = load_network(_network_name(network, reference), target.device)
    real = open_reference(reference, found)
    contenders = _contenders(given, num, drawn_here)
    evaluation = _begun(contenders, found, real, out)
    _check_images(found, real, contenders, batches)
    return _Work(found, real, out, batches, report).run(contenders, evaluation)


def _listed(models: Any) -> Sequence[str | Path]:
    """Return the models that a user gives, one or several, as a list. Raises `InputError` for anything else."""
    several = isinstance(models, Iterable) and not isinstance(models, str | bytes | os.PathLike)
    given = list(models) if several else [models]
    if not all(isinstance(name, str | os.PathLike) for name in given):
        raise InputError(f"models must be a path or a name or a list of them, got {models!r:.80}")
    if not given:
        raise InputError("models must name at least one model, got an empty list")
    return [name if isinstance(name, str) else Path(name) for name in given]


def _contenders(
    given: Sequence[str | Path], num: int, drawn_here: Callable[[str | Path], Contender]
) -> list[Contender]:
    elsewhere = [Path(name).suffix == BATCH_SUFFIX for name in given]
    return [Batch(Path(name), num) if made else drawn_here(name) for name, made in zip(given, elsewhere, strict=True)]


def _network_name(network: str | Path | None, reference: str | Path) -> str | Path:
    if network is not None:
        return network
    if str(reference) == FASHION_TEST:
        return FASHION
    raise InputError(
        f"give the feature network: inception-2015-12-05.pt for FID, a TorchScript file, a .pt2, or '{FASHION}'"
    )


def _begun(contenders: Sequence[Contender], network: Network, reference: Reference, out: Path) -> Evaluation:
    """Return the evaluation that the result file has begun, or an empty one.

    Raises `InputError` where protocols differ.
    """
    about = {"name": network.name, "sha256": network.sha256, "inception": network.inception}
    real = {"name": reference.name, **reference.figures()}
    protocols = [Protocol(contender.drawn, about, real, measure.settings()) for contender in contenders]
    for contender, protocol in zip(contenders[1:], protocols[1:], strict=True):
        protocols[0].check_same(protocol, f"'{contenders[0].name}'", f"'{contender.name}'")
    if not out.exists():
        return Evaluation(protocols[0])
    before = read_evaluation(out)
    before.protocol.check_same(protocols[0], f"'{out}'", "this evaluation")
    return before


def _check_images(
    network: Network, reference: Reference, contenders: Sequence[Contender], batches: Path | None
) -> None:
    """Raise `InputError`, before any image is drawn, for images and statistics that do not suit the network.

    Also for sets that are too small, and for two batches of one name.
    """
    sets = {"models": contenders[0].drawn["num"]}
    if reference.images is not None:
        sets["reference"] = reference.images.count
    for name, count in sets.items():
        if count <= NEIGHBOURS:
            raise InputError(f"an evaluation needs more than {NEIGHBOURS} images, of the {name} there are {count}")
    if reference.images is not None:
        reference.check(network(reference.images.read(range(PROBES))))
    for shape in dict.fromkeys(contender.shape for contender in contenders):
        reference.check(network(torch.zeros(PROBES, *shape, dtype=torch.uint8)))
    names = [_batch_name(contender) for contender in contenders]
    if batches and (double := next((name for name in names if names.count(name) > 1), None)):
        raise InputError(f"two of the models are called '{double}', so their batches would be one file")


def _batch_name(contender: Contender) -> str:
    return f"{Path(contender.name).stem}{BATCH_SUFFIX}"


class _Work:
    """One call of `evaluate`: the features of the reference are computed once, when they are needed."""

    def __init__(self, network: Network, reference: Reference, out: Path, npz: Path | None, report: Report) -> None:
        self.network, self.reference, self.out, self.npz, self.report = network, reference, out, npz, report
        self._real: Collected | None = None

    def run(self, contenders: Sequence[Contender], evaluation: Evaluation) -> Evaluation:
        """Evaluate what the evaluation lacks, and write it after each."""
        for contender in contenders:
            if evaluation.row_of(contender.run) is None:
                evaluation = evaluation.with_row(self._row(contender))
                if current().first:
                    evaluation.write(self.out)
            elif self.npz:
                self._write_npz(contender, contender.images(self.report))
        current().wait()
        return evaluation

    def _row(self, contender: Contender) -> Row:
        name, costs = contender.name, Costs(self.network.device)
        with costs.of("images"):
            images = contender.images(self.report)
        self._write_npz(contender, images)
        with costs.of("features"):
            drawn = collect(images, self.network, lambda f: self.report(f"features of {name}", f))
        real = self._real_features()
        self.report(f"scores of {name}", 0.0)
        with costs.of("scores"):
            found = measure.measure(real, drawn, self.network)
        about = environment(str(self.network.device))
        return Row(
            name, contender.run, found.scores, found.details, found.absent,
            costs.seconds, peak_memory_bytes(), costs.device_bytes, about,
        )  # fmt: skip

    def _real_features(self) -> Collected:
        if self._real is None:
            self._real = self.reference.collected(self.network, lambda f: self.report("features of the reference", f))
        return self._real

    def _write_npz(self, contender: Contender, images: ImageSet) -> None:
        if self.npz is not None and current().first:
            write_npz(self.npz / _batch_name(contender), images, contender.labels)
