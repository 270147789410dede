"""Scalar measures of how far a quantized model is from its float original."""

import torch


def sqnr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Return 10 log10 of signal power over error power, in dB, summed over all elements.

    Equal tensors give inf.
    """
    reference, error = reference.double(), actual.double() - reference.double()
    return float(10 * torch.log10(reference.square().sum() / error.square().sum()))


def psnr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the mean over images of 10 log10(peak^2 / MSE), in dB.

    Images are (N, C, H, W) in [-1, 1], so the peak is 2.
    """
    mse = (actual.double() - reference.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / mse.clamp(min=1e-20))).mean())
