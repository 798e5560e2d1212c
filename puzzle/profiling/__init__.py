"""What an architecture costs: bytes from shapes, milliseconds measured on a grid, or estimated, and interpolated.

``memory``, ``grid``, ``table`` and the roofline (``hardware``, ``kernels``, ``roofline``, ``roofline_fit``) are pure
and serve the search; ``timer``, ``kv_cache`` and ``measure`` need torch and serve the profile stage alone. Nothing is
imported here, so that the search never pays for torch.
"""
