"""How much worse the model gets when one item replaces what it covers."""
