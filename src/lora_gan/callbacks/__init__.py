"""Callbacks: set the module's coefficients and monitor its steps; the module does not depend on them."""

from lora_gan.baseline import MovingAverageBaseline
from lora_gan.callbacks.adapters import AdapterCheckpoints
from lora_gan.callbacks.best_checkpoint import BestCheckpoint
from lora_gan.callbacks.coefficients import AdaptiveEntropy, AdaptiveKL, KLSchedule
from lora_gan.callbacks.collapse import CollapseMonitor
from lora_gan.callbacks.control import AdaptiveAdversarialWeight, ConfidenceGate, DiscriminatorControl
from lora_gan.callbacks.curriculum import Curriculum, EasyFirst, Phase
from lora_gan.callbacks.evolution import FitnessPlot, FittestMembers
from lora_gan.callbacks.last_checkpoint import LastCheckpoint
from lora_gan.callbacks.multiple_choice import ChoiceAccuracy
from lora_gan.callbacks.predictions import PredictionWriter
from lora_gan.callbacks.preferences import PreferenceAccuracy
from lora_gan.callbacks.progress import StepProgressBar
from lora_gan.callbacks.snapshot import Snapshot
from lora_gan.callbacks.text_metrics import TextMetrics
from lora_gan.callbacks.throughput import Throughput

__all__ = [
    "AdapterCheckpoints",
    "AdaptiveAdversarialWeight",
    "AdaptiveEntropy",
    "AdaptiveKL",
    "BestCheckpoint",
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
    "PreferenceAccuracy",
    "Snapshot",
    "StepProgressBar",
    "TextMetrics",
    "Throughput",
]
