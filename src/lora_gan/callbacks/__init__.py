"""Callbacks: they turn the module's knobs and watch the round; the module does not know them."""

from lora_gan.callbacks.adapters import AdapterCheckpoints
from lora_gan.callbacks.baseline import MovingAverageBaseline
from lora_gan.callbacks.choices import ChoiceAccuracy
from lora_gan.callbacks.coefficients import AdaptiveEntropy, AdaptiveKL, KLSchedule
from lora_gan.callbacks.collapse import CollapseMonitor
from lora_gan.callbacks.control import AdaptiveAdversarialWeight, ConfidenceGate, DiscriminatorControl
from lora_gan.callbacks.curriculum import Curriculum, EasyFirst, Phase
from lora_gan.callbacks.evolution import FitnessPlot, FittestMembers
from lora_gan.callbacks.last import LastCheckpoint
from lora_gan.callbacks.predictions import PredictionWriter
from lora_gan.callbacks.progress import RoundProgressBar
from lora_gan.callbacks.snapshot import Snapshot
from lora_gan.callbacks.text import TextMetrics
from lora_gan.callbacks.throughput import Throughput

__all__ = [
    "AdapterCheckpoints",
    "AdaptiveAdversarialWeight",
    "AdaptiveEntropy",
    "AdaptiveKL",
    "ChoiceAccuracy",
    "CollapseMonitor",
    "ConfidenceGate",
    "Curriculum",
    "DiscriminatorControl",
    "EasyFirst",
    "FitnessPlot",
    "FittestMembers",
    "KLSchedule",
    "LastCheckpoint",
    "MovingAverageBaseline",
    "Phase",
    "PredictionWriter",
    "RoundProgressBar",
    "Snapshot",
    "TextMetrics",
    "Throughput",
]
