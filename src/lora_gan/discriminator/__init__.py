"""Discriminator: architectures, input formats, objectives, negatives, and replay."""

from lora_gan.discriminator.discriminator import Discriminator, DiscriminatorSettings
from lora_gan.discriminator.inputs import (
    CompletionAndTarget,
    CompletionOnly,
    InputFormat,
    PromptAndCompletion,
    WorkOnly,
)
from lora_gan.discriminator.models import (
    AdapterDiscriminator,
    DiscriminatorModel,
    HiddenStatesDiscriminator,
    LikelihoodDiscriminator,
    OwnBaseDiscriminator,
)
from lora_gan.discriminator.negatives import (
    CutShort,
    Echo,
    HardNegatives,
    MadeUp,
    Negatives,
    OtherCompletions,
    Refusal,
    Repetition,
    ShuffledWords,
    Swapped,
)
from lora_gan.discriminator.objectives import (
    Auxiliary,
    BradleyTerry,
    ClosenessBCE,
    ClosenessOrdinal,
    ClosenessRegression,
    Combined,
    DiscriminatorObjective,
    GanBCE,
    ListwiseSoftmax,
    RewardRanking,
    RewardRegression,
)
from lora_gan.discriminator.replay import Replay
from lora_gan.discriminator.straight_through import StraightThrough

__all__ = [
    "AdapterDiscriminator",
    "Auxiliary",
    "BradleyTerry",
    "ClosenessBCE",
    "ClosenessOrdinal",
    "ClosenessRegression",
    "Combined",
    "CompletionAndTarget",
    "CompletionOnly",
    "CutShort",
    "Discriminator",
    "DiscriminatorModel",
    "DiscriminatorObjective",
    "DiscriminatorSettings",
    "Echo",
    "GanBCE",
    "HardNegatives",
    "HiddenStatesDiscriminator",
    "InputFormat",
    "LikelihoodDiscriminator",
    "ListwiseSoftmax",
    "MadeUp",
    "Negatives",
    "OtherCompletions",
    "OwnBaseDiscriminator",
    "PromptAndCompletion",
    "Refusal",
    "Repetition",
    "Replay",
    "RewardRanking",
    "RewardRegression",
    "ShuffledWords",
    "StraightThrough",
    "Swapped",
    "WorkOnly",
]
