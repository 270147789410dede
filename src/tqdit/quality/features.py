"""Measure sample quality on Fashion-MNIST: a small classifier, its features and a Fréchet distance over them.

Images are float tensors of shape [N, 1, 32, 32] in [-1, 1]: Fashion-MNIST's 28 x 28 pixels, padded with -1.
FD-fashion compares features of our own classifier, so its values say nothing about any Inception-based score.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES = 128
DATA = Path(__file__).parents[1] / "data" / "fashion-classifier"
CLASSIFIER_FILE = DATA / "classifier.safetensors"
STATISTICS_FILE = DATA / "test-statistics.safetensors"


class ResidualBlock(nn.Module):
    """A block of two 3 x 3 convolutions beside a shortcut; `stride` 2 halves height and width."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class FashionClassifier(nn.Module):
    """A classifier of images [N, channels, 32, 32] in [-1, 1]; by default into Fashion-MNIST's ten classes."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(32, 32, 1), ResidualBlock(32, 64, 2), ResidualBlock(64, FEATURES, 2))
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features [N, 128]: the last block's channels averaged over the image."""
        return self.blocks(self.stem(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, classes]."""
        return self.head(self.features(x))


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises `ValueError` naming the file when it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; examples/train_fashion_dit.py writes it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_fashion_classifier(device: torch.device | str = "cpu", path: Path = CLASSIFIER_FILE) -> FashionClassifier:
    """Return the shipped classifier, or that of `path`, in float32 and evaluation mode.

    The file's tensors say how many channels and classes there are. Raises `ValueError` when the file does not hold one.
    """
    tensors = _read(path)
    shapes = tensors.get("stem.0.weight", torch.empty(32, 1)).shape, tensors.get("head.bias", torch.empty(10)).shape
    sizes = {"channels": shapes[0][1], "classes": shapes[1][0]} if len(shapes[0]) == 4 and len(shapes[1]) == 1 else {}
    model = FashionClassifier(**sizes)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold a fashion classifier: {error}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"{path} is damaged: it holds values that are not finite")
    return model.eval().requires_grad_(False).to(device)


def load_real_statistics(path: Path = STATISTICS_FILE) -> tuple[Tensor, Tensor]:
    """Return the float64 mean [128] and covariance [128, 128] of the features of the 10,000 real test images."""
    tensors = _read(path)
    shapes = {"mean": (FEATURES,), "covariance": (FEATURES, FEATURES)}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape or not tensors[name].isfinite().all():
            raise ValueError(f"{path} is damaged: it must hold a finite {name!r} of shape {shape}")
    return tensors["mean"].double(), tensors["covariance"].double()


def _classify(images: Tensor, classifier: FashionClassifier, batch: int) -> tuple[Tensor, Tensor]:
    """Return features [N, 128] and logits [N, classes]."""
    if images.ndim != 4 or images.shape[1:] != (classifier.channels, 32, 32):
        raise ValueError(f"images must have shape [N, {classifier.channels}, 32, 32], not {list(images.shape)}")
    device = classifier.head.weight.device
    with torch.inference_mode():
        features = torch.cat([classifier.features(part.to(device).float()) for part in images.split(batch)])
        return features, classifier.head(features)


def image_features(images: Tensor, classifier: FashionClassifier, batch: int = 500) -> Tensor:
    """Return the classifier's features [N, 128] of images [N, 1, 32, 32], on the classifier's device."""
    return _classify(images, classifier, batch)[0]


def feature_statistics(images: Tensor, classifier: FashionClassifier, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Return the float64 mean [128] and unbiased covariance [128, 128] of the images' features, on the CPU."""
    if len(images) < 2:
        raise ValueError("a covariance needs at least two images")
    features = _classify(images, classifier, batch)[0].double().cpu()
    return features.mean(dim=0), torch.cov(features.T)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians, in squared feature units."""
    # tr sqrt(C1 C2) equals tr sqrt(R C2 R) with R = sqrt(C1). The second matrix is symmetric, so eigh takes
    # its root stably even where a covariance is singular (a dead feature, fewer images than features).
    values, vectors = torch.linalg.eigh(cov1.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov2.double() @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    # Rounding can leave a tiny negative value where both Gaussians agree.
    return max(0.0, float(shift + cov1.trace() + cov2.trace() - 2 * cross))


def fd_fashion(images: Tensor) -> float:
    """Return FD-fashion of the images against the real test set.

    0 is best, and the value falls as N grows.
    """
    classifier = load_fashion_classifier(images.device)
    return frechet_distance(*feature_statistics(images, classifier), *load_real_statistics())


def class_agreement(images: Tensor, labels: Tensor, classifier: FashionClassifier | None = None) -> float:
    """Return the fraction of images that the classifier assigns to `labels` [N].

    The default is the shipped classifier.
    """
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(f"{len(images)} images need as many labels, not {len(labels)}")
    logits = _classify(images, classifier or load_fashion_classifier(images.device), batch=500)[1]
    return float((logits.argmax(dim=1).cpu() == labels.cpu()).double().mean())
