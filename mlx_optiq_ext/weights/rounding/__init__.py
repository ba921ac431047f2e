"""Refinement (GPTQ-style rounding), and distillation after it.

A plan decides each tensor's bits and group size; refinement decides the codes, scales and biases:

1. `refinement` goes through the model in the order in which it runs: embeddings, decoder layers,
   head. Layers before a tensor are quantized already, so their error can be compensated.
2. `inputs` gathers the second moments of each layer's inputs, in the original model and after the
   quantized layers; for stacked experts, over the tokens that are routed to each.
3. `refinement.compensated` moves the target so that the quantized layers' inputs lead nearer to the
   original's outputs.
4. `feedback` rounds the target (GPTQ-style rounding): it orders the columns, rounds them one by one
   while each hands its error on, polishes by coordinate descent, and does the same across rows
   where the moments of the output gradients are known.
5. `grid` has the inner steps in numpy: the search for scales and biases, one pass of error feedback
   and one of coordinate descent. `codes` lays the codes out in MLX's packed words.
6. `distillation` moves codes, scales, biases and norm weights until the logits agree best.
"""
