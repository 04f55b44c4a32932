"""Where the fastest way to make a product was measured more than 2% ahead of what `_configs.py` expects.

`(experts, width, depth)` of the weights -> rows an expert, to the nearest power of two -> tile, with "sorted" before it
where gathered rows are copied into their order first. NVIDIA H200, 2026-11-23; every tile had passed the oracle.
"""

Table = dict[tuple[int, int, int], dict[int, str]]

UP: Table = {
    # mixtral-8x7b
    (8, 28672, 4096): {2048: "sorted tall", 4096: "sorted tall", 8192: "sorted tall"},
}

DOWN: Table = {
    # mixtral-8x7b
    (8, 4096, 14336): {256: "tall", 512: "wide", 1024: "large", 2048: "large", 4096: "large", 8192: "large"},
}
