"""What a sensitivity method is, for those that come with the package and for a plugin's."""

from enum import Enum
from typing import Protocol

from .problem import Problem, Sensitivity


class Need(Enum):
    """Something that a method cannot do without."""

    CALIBRATION = "calibration sequences"
    GRADIENTS = "gradients of the model"


class Method(Protocol):
    """A way to measure how sensitive a model is to the quantization of each tensor.

    The docstring of a class that implements it says what the method costs in time and memory; its
    first line stands in the command's help.
    """

    @property
    def name(self) -> str:
        """Its name in ``--optiq-sensitivity``."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without."""
        ...

    @property
    def version(self) -> int:
        """Of the measurements that it keeps on disk; counted up when it would measure anew."""
        ...

    def measure(self, problem: Problem) -> Sensitivity:
        """Measure every candidate precision of every tensor.

        Args:
            problem: The model with its tensors and calibration sequences. It must be left as it
                was. ``problem.journal`` keeps measurements between runs.

        Returns:
            For every tensor of the problem the expected KL in nats per token at each of its
            precisions, finite and not negative.
        """
        ...
