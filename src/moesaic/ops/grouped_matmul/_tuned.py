"""Where the fastest way to make a product was measured more than 2% ahead of what `_configs.py` expects.

In a burst, or in the mean of a burst and settled clocks where the record has both.

`(experts, width, depth)` of the weights -> rows an expert, to the nearest power of two -> tile, with "sorted" before it
where gathered rows are copied into their order first. NVIDIA H200, 2026-11-23; every tile had passed the oracle.
Made by `python benchmarks/tiles.py --write` of

benchmarks/results/h200/2026-11-23-tiles-cases.json
"""

Table = dict[tuple[int, int, int], dict[int, str]]

UP: Table = {
    # mixtral-8x7b
    (8, 28672, 4096): {2048: "sorted tall", 4096: "sorted tall", 8192: "sorted tall"},
    # llama4-scout
    (16, 16384, 5120): {
        4: "low",
        16: "low",
        64: "sorted large",
        128: "sorted large",
        512: "sorted large",
        1024: "sorted large",
        2048: "sorted large",
        4096: "sorted large",
        8192: "sorted large",
    },
    # granite-3-3b
    (40, 1024, 1536): {128: "low", 512: "large"},
    # qwen2-moe-a2.7b
    (60, 2816, 2048): {512: "tall8", 1024: "tall8"},
    # sonic-7b
    (128, 512, 1536): {128: "large"},
    # gemma4-26b
    (128, 1408, 2304): {16: "low", 512: "tall", 1024: "large", 2048: "large", 4096: "large", 8192: "large"},
    # glm-4.5
    (160, 3072, 5120): {256: "sorted wide", 1024: "large"},
    # deepseek-v3
    (256, 4096, 7168): {32: "tall"},
    # kimi-k2
    (384, 4096, 7168): {256: "sorted tall"},
    # qwen3-next-80b
    (512, 1024, 2048): {256: "tall"},
    # nemotron-h
    (512, 2688, 4096): {
        32: "tall",
        128: "sorted wide",
        512: "sorted tall",
        1024: "sorted tall",
        2048: "sorted tall",
        4096: "sorted tall",
        8192: "sorted tall",
    },
}

DOWN: Table = {
    # mixtral-8x7b
    (8, 4096, 14336): {128: "tall", 2048: "large", 4096: "large", 8192: "large"},
    # phi-3.5-moe
    (16, 4096, 6400): {1024: "large", 2048: "large", 4096: "large", 8192: "large"},
    # llama4-scout
    (16, 5120, 8192): {16: "tall", 128: "low"},
    # granite-3-3b
    (40, 1536, 512): {16: "low", 64: "low", 128: "low", 512: "tall"},
    # qwen2-moe-a2.7b
    (60, 2048, 1408): {64: "low", 512: "tall8", 1024: "tall8", 2048: "tall8", 4096: "tall8", 8192: "tall8"},
    # olmoe
    (64, 2048, 1024): {64: "low"},
    # ernie-4.5-21b
    (64, 2560, 1536): {512: "tall"},
    # sonic-7b
    (128, 1536, 256): {
        16: "low",
        32: "low",
        64: "low",
        256: "tall",
        512: "tall",
        1024: "tall",
        2048: "tall",
        4096: "tall",
        8192: "tall",
    },
    # gemma4-26b
    (128, 2304, 704): {2048: "tall", 4096: "tall", 8192: "tall"},
    # kimi-k2
    (384, 7168, 2048): {256: "tall"},
    # qwen3-next-80b
    (512, 2048, 512): {256: "tall"},
}
