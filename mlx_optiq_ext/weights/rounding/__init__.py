"""Refinement (GPTQ-style rounding), and distillation after it.

A plan decides each tensor's bits and group size; refinement decides the codes, scales and biases:

1. `refinement` goes through the model in the order in which it runs: embeddings, decoder layers,
   head. Layers before a tensor are quantized already, so their error can be compensated.
2. `inputs` gathers the second moments of each layer's inputs, in the original model and after the
   quantized layers; for stacked experts, over the tokens that are routed to each.
3. `elimination` finds the order in which columns are rounded, and how much of its error each column
   passes on. `metric` keeps this for all tensors with the same inputs. It also moves the target, so
   that the quantized layers' inputs lead nearer to the original's outputs.
4. `feedback` rounds the target: column by column, then by coordinate descent. Where the moments of
   the output gradients are known, it works in blocks of rows.
   `stage` shares the tensors with the same inputs out to the processes of ``mlx.launch``, and
   `threads` what numpy computes to threads.
5. `steps` lists what `feedback` needs of the machine. `host` does it in numpy, `device` on a GPU
   with our own kernels; `selection` takes the GPU if it rounds a small weight as well as numpy.
6. `grid` describes how codes and scales are stored; `codes` lays codes out in MLX's packed words.
7. `distillation` moves codes, scales, biases and norm weights until the logits agree best.
"""
