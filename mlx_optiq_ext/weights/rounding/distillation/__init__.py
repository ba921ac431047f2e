"""Distillation of a refined model: what is stored moves to where the logits agree best.

1. `settings` says what may move, how far and for how long.
2. `sequences` draws batches of calibration sequences, and keeps some to judge on.
3. `grids` holds a quantized tensor while its codes, scales and biases move, and the unquantized
   parameters that move with it; `adam` says how far.
4. `divergence` compares logits in chunks of tokens, with gradients; `planning.parts` makes them.
5. `student` is one step, `training` the loop around it.

End-to-end tuning of step sizes is the second phase of EfficientQAT (Chen et al., arXiv 2407.11062);
the loss is KL(reference || model), as in mlx-lm's DWQ. Codes move by straight-through estimation
(Bengio et al., arXiv 1308.3432).
"""

from .settings import Settings
from .student import placed
from .training import Distilled, distill

__all__ = ["Distilled", "Settings", "distill", "placed"]
