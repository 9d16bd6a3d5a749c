"""What a run costs before it runs: memory, floating-point operations, communication, time; and the best layout.

Arithmetic over sizes: no GPU, no weights, no process groups. Read ``jobs`` (what a stage of the recipe asks for), then
``parameters``, ``activations`` and ``memory`` (whether it fits), ``batches``, ``flops``, ``communication`` and
``timing`` (how long it takes), ``search`` (which layout is best), and ``scaling`` and ``report`` (what is printed).
"""
