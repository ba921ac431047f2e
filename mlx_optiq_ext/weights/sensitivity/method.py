"""The interface of a sensitivity method, built in or from a plugin."""

from enum import Enum
from typing import Protocol

from .problem import Problem, Sensitivity


class Need(Enum):
    """A requirement of a method."""

    CALIBRATION = "calibration sequences"
    GRADIENTS = "gradients of the model"


class Method(Protocol):
    """A way to measure how sensitive a model is to the quantization of each tensor.

    The docstring of an implementation states the method's time and memory; its first line is shown
    in the command's help.
    """

    @property
    def name(self) -> str:
        """The method's name in ``--optiq-sensitivity``."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """The method's requirements."""
        ...

    @property
    def version(self) -> int:
        """Version of the method's stored measurements; raised when they must be measured again."""
        ...

    def measure(self, problem: Problem) -> Sensitivity:
        """Measure every candidate precision of every tensor.

        Args:
            problem: The model with its tensors and calibration sequences. It must not be
                changed. ``problem.journal`` keeps measurements between runs.

        Returns:
            For every tensor of the problem the expected KL in nats per token at each of its
            precisions, finite and not negative.
        """
        ...
