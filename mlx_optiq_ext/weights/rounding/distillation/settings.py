"""What distillation may move, how far and for how long."""

from dataclasses import dataclass

from ....errors import InputError
from ....planning.sampling import on_cpu


@dataclass(frozen=True)
class Settings:
    """How to distill.

    A rate is the size of a typical move of one update. Rates rise over the first steps and then
    fall to zero along a cosine.

    Attributes:
        steps: Updates to make.
        epochs: Times that a sequence is trained on, at most; fewer updates are made of few.
        seconds: Time that the updates may take; fewer are made if they would take longer. The
            result then depends on the machine's speed.
        batch: Sequences of one update; None for 8 on a CPU and 32 on a GPU, where launching kernels
            takes longer than running them for few.
        rate: Of scales and biases, in scales of their group.
        codes_rate: Of codes, in steps of their grid; 0 leaves the codes as they are.
        parameters_rate: Of norm weights and of biases of linear layers, as a share of each; 0
            leaves them as they are.
        anchor: Where a weight starts in the cell of its code: 0 for the middle, 1 for the place of
            the unquantized weight, or the nearest in the cell.
        judged_every: Updates between two judgements on held-out sequences. The best result is kept.
        held_out: Sequences to judge on, at least; fewer if there are not twice as many.
        seed: Of the order of sequences and of stochastic rounding.
        checkpoint: Whether a layer's activations are computed once more for the gradients instead
            of kept; None decides by the memory that they need.
        compiled: Whether a whole step is compiled, forward and backward passes too; None for on
            Metal only. The update of each parameter is compiled on every GPU.

    Raises:
        InputError: A setting is out of range.
    """

    steps: int = 400
    epochs: int = 32
    seconds: float | None = None
    batch: int | None = None
    rate: float = 4e-3
    codes_rate: float = 4e-3
    parameters_rate: float = 2e-3
    anchor: float = 0.5
    judged_every: int = 50
    held_out: int = 16
    seed: int = 0
    checkpoint: bool | None = None
    compiled: bool | None = None

    @property
    def rows(self) -> int:
        """Sequences of one update."""
        return self.batch or (8 if on_cpu() else 32)

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch", "judged_every", "held_out"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"cannot distill with {name} {value}: give at least 1")
        for name in ("rate", "codes_rate", "parameters_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(
                    f"cannot distill at a {name} of {getattr(self, name):g}: give 0 or more"
                )
        if not 0 <= self.anchor <= 1:
            raise InputError(
                f"cannot distill with an anchor of {self.anchor:g}: give a number from 0 to 1"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(
                f"cannot distill in {self.seconds:g} seconds: give more than 0, or None"
            )
