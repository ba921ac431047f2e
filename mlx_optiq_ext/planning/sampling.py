"""How many calibration sequences there are, how long they are and where they come from."""

from dataclasses import dataclass

import mlx.core as mx

from .kinds import KINDS, Kind


@dataclass(frozen=True)
class Sampling:
    """How calibration sequences are cut from a text.

    Attributes:
        length: Tokens of a sequence; of a short text they are shorter, so that one is held out.
        count: Sequences to plan with, spread evenly over the text.
        held_out_every: One in this many sequences is held out to judge finished plans.
        refining: Most sequences for GPTQ-style rounding and distillation, including those measured
            on and those held out; None for what the device runs in a few minutes.
        kinds: Kinds of text that the model is asked to write where there is no other text.
        beside: How many of ``refining`` are sampled from the model where there is a text, which is
            of one kind while a model is used for many; None for what the device draws in seconds.
        further: Sequences that are sampled from the model to distill on, beside all others; None
            for what the device draws in seconds.
    """

    length: int = 256
    count: int = 16
    held_out_every: int = 4
    refining: int | None = None
    kinds: tuple[Kind, ...] = KINDS
    beside: int | None = None
    further: int | None = None

    @property
    def most(self) -> int:
        """Most sequences to refine on."""
        return self.refining or (CPU_MOST if on_cpu() else GPU_MOST)

    @property
    def drawn(self) -> int:
        """Sequences to sample from the model beside a text."""
        wanted = self.beside
        if wanted is None:
            wanted = int((CPU_BESIDE if on_cpu() else GPU_BESIDE) * self.most)
        return max(0, min(wanted, self.most - self.count))

    @property
    def distilled(self) -> int:
        """Sequences to sample from the model for distillation only."""
        return self.further if self.further is not None else 0 if on_cpu() else GPU_FURTHER


#: Most sequences to refine on, if nothing else is asked for.
CPU_MOST, GPU_MOST = 64, 256
#: Share of them that is sampled from the model; a CPU draws slowly.
CPU_BESIDE, GPU_BESIDE = 0.25, 0.5
#: Sequences that are sampled for distillation, which sees each many times.
GPU_FURTHER = 768


def on_cpu() -> bool:
    """Whether MLX computes on a CPU unless told otherwise."""
    return mx.default_device() == mx.Device(mx.cpu)


DEFAULT = Sampling()
