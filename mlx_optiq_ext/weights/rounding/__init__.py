"""Refinement: rounding that makes up for its own error, and distillation after it.

A plan decides each tensor's bits and group size; refinement decides the codes, scales and biases:

1. `refinement` goes through the model in the order in which it runs: embeddings, decoder layers,
   head. What is behind a tensor is quantized already, so its error can be made up for.
2. `inputs` gathers the second moments of what each layer is fed, by the original and behind the
   quantized layers; of stacked experts, for each expert the tokens that are routed to it.
3. `elimination` finds the order in which columns are rounded and how much of its error each hands
   on. `metric` keeps that for all tensors with the same inputs, and moves the target so that these
   inputs lead nearer to the original's outputs.
4. `feedback` rounds the target (GPTQ-style rounding): column by column, then by coordinate descent,
   and in blocks of rows where the moments of the output gradients are known.
5. `steps` is what `feedback` needs of the machine: `host` has it in numpy, `device` on a GPU with
   kernels of its own, and `selection` takes the GPU if it rounds a small weight as numpy does.
6. `grid` says how codes and scales are stored; `codes` lays codes out in MLX's packed words.
7. `distillation` moves what is stored to where the logits agree best.
"""
