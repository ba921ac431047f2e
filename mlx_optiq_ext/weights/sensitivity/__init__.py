"""How sensitive the whole model's output is to the quantization of each tensor.

`registry` has the methods by name, `method` says what one is. `taylor` expands the KL divergence to
second order: `fisher` runs the backward passes layer by layer (`backward`, `draws`, and `relay` for
several processes), `moments` keeps what they gather, and `curvature` predicts from that the KL of
an error. `kl` measures tensors one by one. `interaction` measures once more around a plan.
"""
