"""What a conversion aims at in place of a budget: a speed, or a distance from the original."""

from .certificate import Certificate, certified, check_sequences, sampled_beside
from .quality import CERTIFIED, search_quality
from .speed import Target, search_speed, target

__all__ = [
    "CERTIFIED",
    "Certificate",
    "Target",
    "certified",
    "check_sequences",
    "sampled_beside",
    "search_quality",
    "search_speed",
    "target",
]
