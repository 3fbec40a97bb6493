"""Other libraries' private names, and nothing else's; ``dispatch`` is what the engine is given of them."""
