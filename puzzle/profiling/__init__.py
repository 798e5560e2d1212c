"""What an architecture costs: bytes from shapes, milliseconds measured on a grid, or estimated, and interpolated.

``source`` says where a run's costs come from. Measured here (``stack``, ``probes``,
``measure``: these need torch), in vLLM as whole models (``vllm``, and ``regression`` for the times of single shapes),
estimated (``hardware``, ``kernels``, ``roofline``) or ``imported``, they become one ``table``, which
``correction`` sets right by whole models; ``memory`` counts bytes. Nothing is imported here, so that the search never
pays for torch.
"""
