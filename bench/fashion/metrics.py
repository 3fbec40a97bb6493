"""Scores of drawn clothes in the small classifier's eyes: distance of features, spread of classes, what was asked for.

They are no figures to set beside those that others publish: the Fréchet distance is FID's, and the score the Inception
score's, but of this classifier's features and classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .classifier import Classifier, look


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (n, dimensions), n > 1."""
        features = features.double()
        centred = features - features.mean(0)
        return cls(features.mean(0), centred.T @ centred / (len(features) - 1))


@dataclass(frozen=True)
class Scores:
    """Of so many pictures.

    Args:
        frechet: squared Fréchet distance of their features to those of the test pictures; less is better.
        inception: exp of the mean divergence of a picture's class probabilities from those of all; from 1 to 10.
        asked: the share that the classifier takes for the class that was asked for.
        samples: how many.
    """

    frechet: float
    inception: float
    asked: float
    samples: int


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared distance of two Gaussians: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½).

    The product under the root is symmetric, and so is each step to it: its eigenvalues are real and, but for rounding,
    none is negative. Σ₁Σ₂, whose root has the same trace, is not symmetric, and its root may come out complex where
    features depend on each other.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ other.covariance @ root
    both = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = (one.mean - other.mean).square().sum()
    return (apart + one.covariance.trace() + other.covariance.trace() - 2 * both).item()


def inception_score(probabilities: Tensor) -> float:
    """exp(mean KL(p(class | picture) ‖ p(class))) of probabilities (n, classes)."""
    mean = probabilities.mean(0, keepdim=True)
    divergence = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, mean)
    return divergence.sum(1).mean().exp().item()


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in 0…1 as they would be saved: real ones are bytes, too."""
    return (pictures.clamp(0, 1) * 255).round().byte()


def scores_of(pictures: Tensor, labels: Tensor, classifier: Classifier, real: Moments) -> Scores:
    """Of pictures (n, 1, 28, 28) in bytes, the labels (n,) that were asked for, and what is to be met."""
    features, probabilities = look(classifier, pictures)
    asked = (probabilities.argmax(-1) == labels).double().mean().item()
    distance = frechet_distance(Moments.of(features), real)
    return Scores(distance, inception_score(probabilities), asked, len(pictures))
