"""How sensitive the whole model's output is to the quantization of each tensor.

`registry` has the methods by name, `method` defines their interface. `taylor` expands the KL
divergence to second order: `fisher` runs the backward passes layer by layer (`backward`, `draws`,
and `relay` for several processes), `moments` stores their sums, and `curvature` predicts the KL of
an error from these. `kl` measures tensors one by one. `interaction` re-measures sensitivities
around a plan.
"""
