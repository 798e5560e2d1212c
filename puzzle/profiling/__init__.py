"""What an architecture costs: bytes computed from shapes, milliseconds measured on a grid and interpolated.

``memory``, ``grid`` and ``table`` are pure and serve the search; ``timer``, ``kv_cache`` and ``measure`` need torch and
serve the profile stage alone. ``vllm`` measures whole models in an engine of its own environment, and ``regression``
makes times of single shapes of them; both are pure. Nothing is imported here, so that the search never pays for torch.
"""
