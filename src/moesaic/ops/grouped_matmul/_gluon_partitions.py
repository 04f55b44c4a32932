"""The partitions of `_gluon`'s kernel: what loads, and what multiplies and stores.

Legend: a *stage* of the ring holds 64 columns of a tile's main rows, of its tail and of either consumer's weights;
*ring* is the buffers of all stages with their barriers, *cue* what tells the consumers which tile comes next. `SHAPE`
and `EPILOGUE` are a consumer's compile-time constants: (which of the two, its rows of weights, steps of the
contraction, TRANSPOSED, GATHERED) and (ACTIVATION, GATED, INTERLEAVED, ALPHA, LIMIT, HAS_BIAS, PAIRS).
"""

from __future__ import annotations

from ...hardware import gl, gluon
from ._tiles import decode

hopper = gl.nvidia.hopper
tma, mbarrier, async_copy = hopper.tma, hopper.mbarrier, hopper.async_copy
fence_async_shared = hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
TAIL, BOX = gl.constexpr(32), gl.constexpr(32)  # tokens at the most, of a load
BLOCK_K, STAGES = gl.constexpr(64), gl.constexpr(4)
END = gl.constexpr(-1)  # no entry of the tile table
EDGE = gl.constexpr(1 << 30)  # see `_put`


@gluon.jit
def _next(stage, phase):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


# ---------------------------------------------------------------- which tile comes next
@gluon.jit
def _publish(entry, cue, turn, L: gl.constexpr):
    """Tell the consumers which tile comes next."""
    board, posted, taken = cue
    mbarrier.wait(taken.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    board.index(turn & 1).store(gl.full([1], entry, gl.int64, L))
    mbarrier.arrive(posted.index(turn & 1), count=1)


@gluon.jit
def _next_tile(cue, turn):
    """The tile that comes next, END behind the last."""
    board, posted, taken = cue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(posted.index(turn & 1), (turn >> 1) & 1)
    entry = gl.max(board.index(turn & 1).load(layout), 0)
    mbarrier.arrive(taken.index(turn & 1), count=1)
    return entry


@gluon.jit
def _claim(taken_tiles, used_ptr, used, PROGRAMS: gl.constexpr):
    """The tile after all that were taken; whoever takes the very last zeroes the count for the next launch."""
    if taken_tiles == used - 1:
        gl.store(used_ptr + 1, 0)
    return taken_tiles + PROGRAMS


# ---------------------------------------------------------------- loads
@gluon.jit
def _load_weights(w_desc, w_bufs, full, stage, expert, tile_n, k, ROWS: gl.constexpr, TRANSPOSED: gl.constexpr,
                  GATED: gl.constexpr):  # fmt: skip
    """A box of an expert's weights for either consumer; of gated ones eight gates and eight ups take turns."""
    for who in gl.static_range(2):
        if GATED and not TRANSPOSED:
            at = [expert, (2 * tile_n + who) * (ROWS // 16), 0, 0, k]
        elif TRANSPOSED:
            at = [expert, k, (2 * tile_n + who) * ROWS]
        else:
            at = [expert, (2 * tile_n + who) * ROWS, k]
        tma.async_copy_global_to_shared(w_desc, at, full.index(stage), w_bufs.index(2 * stage + who))


@gluon.jit
def _load(stage, phase, ring, x_desc, w_desc, tile, k, ROWS: gl.constexpr, TRANSPOSED: gl.constexpr,
          GATED: gl.constexpr):  # fmt: skip
    """A stage of rows that lie one after the other, no more than the tile's height asks for, and of weights.

    Rows behind the tile's last are zeros, which cost neither traffic nor much power; see `_triton_tma.load_rows`.
    """
    x_bufs, tails, w_bufs, empty, full = ring
    row, expert, height, tile_n = tile
    WEIGHTS: gl.constexpr = 2 * w_desc.block_type.nbytes
    BYTES: gl.constexpr = x_desc.block_type.nbytes
    MAIN: gl.constexpr = x_bufs.shape[1]
    mbarrier.wait(empty.index(stage), phase)
    barrier = full.index(stage)
    pairs = (height + 63) // 64  # of boxes
    for i in gl.static_range(1, MAIN // 64 + 1):
        mbarrier.expect(barrier, WEIGHTS + 2 * i * BYTES, pred=pairs == i)
    mbarrier.expect(barrier, WEIGHTS + (MAIN // BOX + 1) * BYTES, pred=pairs > MAIN // 64)
    _load_weights(w_desc, w_bufs, full, stage, expert, tile_n, k, ROWS, TRANSPOSED, GATED)
    end = row + height
    BOXES: gl.constexpr = MAIN // BOX
    boxes = x_bufs._reinterpret(x_bufs.dtype, [STAGES * BOXES, 1, 1, BOX, BLOCK_K], x_desc.layout)
    tail_boxes = tails._reinterpret(x_bufs.dtype, [STAGES, 1, 1, BOX, BLOCK_K], x_desc.layout)
    for i in gl.static_range(BOXES + 1):
        rows = boxes.index(stage * BOXES + i) if i < BOXES else tail_boxes.index(stage)
        at = [EDGE, end, EDGE - height + i * BOX, k]
        tma.async_copy_global_to_shared(x_desc, at, barrier, rows, pred=pairs > i // 2)
    return _next(stage, phase)


@gluon.jit
def produce(x_desc, w_desc, tiles_ptr, used_ptr, ring, cue, K: gl.constexpr, ROWS: gl.constexpr,
             TRANSPOSED: gl.constexpr, GATED: gl.constexpr, PROGRAMS: gl.constexpr):  # fmt: skip
    """Rows that lie one after the other."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    HALFWAY: gl.constexpr = (K // 2 + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    stage, phase = 0, 1
    turn = 0 * gl.program_id(0)
    used = gl.load(used_ptr)
    t = gl.program_id(0)
    entry = gl.load(tiles_ptr + t)
    while t < used:
        _publish(entry, cue, turn, layout)
        turn += 1
        tile = decode(entry)
        taken_tiles = gl.atomic_add(used_ptr + 1, 1)
        for k in range(0, HALFWAY, BLOCK_K):
            stage, phase = _load(stage, phase, ring, x_desc, w_desc, tile, k, ROWS, TRANSPOSED, GATED)
        t = _claim(taken_tiles, used_ptr, used, PROGRAMS)
        entry = gl.load(tiles_ptr + t)
        for k in range(HALFWAY, K, BLOCK_K):
            stage, phase = _load(stage, phase, ring, x_desc, w_desc, tile, k, ROWS, TRANSPOSED, GATED)
    _publish(END, cue, turn, layout)


@gluon.jit
def _sources(gather_ptr, entry, offs_m, offs_t, TOP_K: gl.constexpr):
    """Rows of x that a tile reads in its main part and its tail, 0 behind the last."""
    row, _, height, _ = decode(entry)
    main = gl.load(gather_ptr + row + offs_m, mask=offs_m < height, other=0)
    tail = gl.load(gather_ptr + row + offs_t, mask=offs_t < height, other=0)
    return main // TOP_K, tail // TOP_K


@gluon.jit
def _gather(stage, phase, ring, w_desc, sources, tile, k, ROWS: gl.constexpr, TRANSPOSED: gl.constexpr,
            GATED: gl.constexpr):  # fmt: skip
    """A stage of rows from anywhere and of weights. Masked rows are filled with zeros."""
    x_bufs, tails, w_bufs, empty, full = ring
    x_ptrs, tail_ptrs, live, tail_live = sources
    expert, height, tile_n = tile
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), 2 * w_desc.block_type.nbytes)
    _load_weights(w_desc, w_bufs, full, stage, expert, tile_n, k, ROWS, TRANSPOSED, GATED)
    async_copy.async_copy_global_to_shared(x_bufs.index(stage), x_ptrs + k, mask=live)
    if height > x_bufs.shape[1]:
        async_copy.async_copy_global_to_shared(tails.index(stage), tail_ptrs + k, mask=tail_live)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    return _next(stage, phase)


@gluon.jit
def produce_gathered(x_ptr, stride_x, gather_ptr, w_desc, tiles_ptr, used_ptr, ring, cue, K: gl.constexpr,
                      TOP_K: gl.constexpr, ROWS: gl.constexpr, TRANSPOSED: gl.constexpr, GATED: gl.constexpr,
                      PROGRAMS: gl.constexpr):  # fmt: skip
    """Rows from anywhere, by 16-byte copies of four warps. What the next tile needs is asked for on the way."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    THIRD: gl.constexpr = (K // 3 + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    TWO_THIRDS: gl.constexpr = 2 * THIRD if 2 * THIRD < K else K
    MAIN: gl.constexpr = ring[0].shape[1]
    offs_m = gl.arange(0, MAIN, gl.SliceLayout(1, layout))
    offs_t = MAIN + gl.arange(0, TAIL, gl.SliceLayout(1, layout))
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    stage, phase = 0, 1
    turn = 0 * gl.program_id(0)
    used = gl.load(used_ptr)
    t = gl.program_id(0)
    entry = gl.load(tiles_ptr + t)
    main, tail = _sources(gather_ptr, entry, offs_m, offs_t, TOP_K)
    while t < used:
        _publish(entry, cue, turn, line)
        turn += 1
        _, expert, height, tile_n = decode(entry)
        tile = (expert, height, tile_n)
        sources = (
            x_ptr + main.to(gl.int64)[:, None] * stride_x + offs_k[None, :],
            x_ptr + tail.to(gl.int64)[:, None] * stride_x + offs_k[None, :],
            (offs_m < height)[:, None], (offs_t < height)[:, None],
        )  # fmt: skip
        taken_tiles = gl.atomic_add(used_ptr + 1, 1)
        for k in range(0, THIRD, BLOCK_K):
            stage, phase = _gather(stage, phase, ring, w_desc, sources, tile, k, ROWS, TRANSPOSED, GATED)
        t = _claim(taken_tiles, used_ptr, used, PROGRAMS)
        entry = gl.load(tiles_ptr + t)
        for k in range(THIRD, TWO_THIRDS, BLOCK_K):
            stage, phase = _gather(stage, phase, ring, w_desc, sources, tile, k, ROWS, TRANSPOSED, GATED)
        main, tail = _sources(gather_ptr, entry, offs_m, offs_t, TOP_K)
        for k in range(TWO_THIRDS, K, BLOCK_K):
            stage, phase = _gather(stage, phase, ring, w_desc, sources, tile, k, ROWS, TRANSPOSED, GATED)
    _publish(END, cue, turn, line)


# ---------------------------------------------------------------- products
@gluon.jit
def _weights(w_bufs, stage, WHO: gl.constexpr, ROWS: gl.constexpr, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        return w_bufs.index(2 * stage + WHO).reshape([BLOCK_K, ROWS]).permute((1, 0))
    else:
        return w_bufs.index(2 * stage + WHO).reshape([ROWS, BLOCK_K])


@gluon.jit
def _tokens(ring, stage, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Some of a stage's tokens as the N side of a product."""
    if FIRST == ring[0].shape[1]:
        return ring[1].index(stage).slice(0, COUNT).permute((1, 0))
    else:
        return ring[0].index(stage).slice(FIRST, COUNT).permute((1, 0))


@gluon.jit
def _wait_full(full, stage, phase, GATHERED: gl.constexpr):
    mbarrier.wait(full.index(stage), phase)
    if GATHERED:  # ordinary copies become visible to the tensor cores
        fence_async_shared()


@gluon.jit
def _multiply(stage, phase, ring, M: gl.constexpr, T: gl.constexpr, SHAPE: gl.constexpr):
    """A tile's products for M tokens and T more, a step in flight behind the next.

    A stage is given back when its products are done. The first step is peeled: a variable that is assigned another
    carried one both before a loop and in it is taken for constant (Triton 3.6 to 3.9).
    """
    _, _, w_bufs, empty, full = ring
    WHO: gl.constexpr = SHAPE[0]
    ROWS: gl.constexpr = SHAPE[1]
    STEPS: gl.constexpr = SHAPE[2]
    TRANSPOSED: gl.constexpr = SHAPE[3]
    GATHERED: gl.constexpr = SHAPE[4]
    P: gl.constexpr = T if T > 0 else 16
    acc = gl.zeros((ROWS, M), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16]))
    tail = gl.zeros((ROWS, P), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16]))
    _wait_full(full, stage, phase, GATHERED)
    w = _weights(w_bufs, stage, WHO, ROWS, TRANSPOSED)
    acc = warpgroup_mma(w, _tokens(ring, stage, 0, M), acc, use_acc=False, is_async=True)
    if T > 0:
        tail = warpgroup_mma(w, _tokens(ring, stage, M, T), tail, use_acc=False, is_async=True)
        acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))  # waits for nothing, but makes tensors of the tokens
    else:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    before = stage
    stage, phase = _next(stage, phase)
    for _ in range(1, STEPS):
        _wait_full(full, stage, phase, GATHERED)
        w = _weights(w_bufs, stage, WHO, ROWS, TRANSPOSED)
        acc = warpgroup_mma(w, _tokens(ring, stage, 0, M), acc, is_async=True)
        if T > 0:
            tail = warpgroup_mma(w, _tokens(ring, stage, M, T), tail, is_async=True)
            acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
        before = stage
        stage, phase = _next(stage, phase)
    if T > 0:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    return acc, tail, stage, phase


# ---------------------------------------------------------------- epilogue
@gluon.constexpr_function
def _pairs(ROWS, TOKENS):
    """A product's layout but for two bits: a thread holds rows 2i and 2i + 1, which were four lanes apart."""
    registers = [[0, 1], [1, 0]] + [[0, 8 << i] for i in range((TOKENS // 8).bit_length() - 1)]
    registers += [[64 << i, 0] for i in range((ROWS // 64).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        registers, [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]], [[16, 0], [32, 0]], [], [ROWS, TOKENS]
    )


@gluon.jit
def _gate_up(acc, PAIRS: gl.constexpr):
    """Eight rows of gates and eight of ups take turns, and a thread holds one of either; or, in PAIRS, one and one."""
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    if PAIRS:
        acc = gl.convert_layout(acc, _pairs(ROWS, TOKENS))
        gate, up = acc.reshape((ROWS // 2, 2, TOKENS)).permute((0, 2, 1)).split()
    else:
        gate, up = acc.reshape((ROWS // 16, 2, 8, TOKENS)).permute((0, 2, 3, 1)).split()
    return gate.reshape((ROWS // 2, TOKENS)), up.reshape((ROWS // 2, TOKENS))


@gluon.jit
def _bias(bias_ptr, expert, column, rows: gl.constexpr, N: gl.constexpr, EPILOGUE: gl.constexpr, L: gl.constexpr):
    """The biases of an accumulator's rows, in the order of `_gate_up`."""
    GATED: gl.constexpr = EPILOGUE[1]
    INTERLEAVED: gl.constexpr = EPILOGUE[2]
    PAIRS: gl.constexpr = EPILOGUE[6]
    j = gl.arange(0, rows, gl.SliceLayout(1, L))
    if PAIRS:
        at = 2 * column + j
        inside = at < 2 * N
    elif GATED:
        at = column + j // 16 * 8 + j % 8
        inside = at < N
        half = j // 8 % 2
        at = 2 * at + half if INTERLEAVED else at + half * N
    else:
        at = column + j
        inside = at < N
    bias_ptr += expert * (2 * N if GATED else N)
    return gl.load(bias_ptr + at, mask=inside, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def _put(values, desc, buffers, row, end, column, n: gl.constexpr):
    """Store the rows before `end` (see `_triton_tma.store_rows`) of a box of columns by tokens.

    The n-th box of the tile: two buffers take turns, and the one before the last must have left. The store turns
    columns by tokens about. A box that is larger than the tokens that are left reaches past `end`.
    """
    if n > 0:
        tma.store_wait(1)
    else:
        tma.store_wait(0)
    buffer = buffers.index(n % 2)
    out = buffer.reshape([desc.block_shape[2], desc.block_shape[3]]).slice(0, values.shape[1])
    out.permute((1, 0)).store(values.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [EDGE, end, EDGE + row - end, column], buffer)
    return n + 1


@gluon.jit
def _finish(acc, outputs, buffers, row, end, expert, column, N: gl.constexpr, EPILOGUE: gl.constexpr, n: gl.constexpr):
    """Bias, activation and result, a box at a time: a whole tile's would not fit the registers."""
    out_desc, bias_ptr = outputs
    ACTIVATION: gl.constexpr = EPILOGUE[0]
    GATED: gl.constexpr = EPILOGUE[1]
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    if TOKENS > out_desc.block_shape[2]:
        left, right = acc.reshape((ROWS, 2, TOKENS // 2)).permute((0, 2, 1)).split()
        n = _finish(left, outputs, buffers, row, end, expert, column, N, EPILOGUE, n)
        return _finish(right, outputs, buffers, row + TOKENS // 2, end, expert, column, N, EPILOGUE, n)
    elif not GATED and ROWS > out_desc.block_shape[3]:
        upper, lower = acc.reshape((2, ROWS // 2, TOKENS)).permute((1, 2, 0)).split()
        n = _finish(upper, outputs, buffers, row, end, expert, column, N, EPILOGUE, n)
        return _finish(lower, outputs, buffers, row, end, expert, column + ROWS // 2, N, EPILOGUE, n)
    else:
        if EPILOGUE[5]:
            layout: gl.constexpr = acc.type.layout
            acc += _bias(bias_ptr, expert, column, ROWS, N, EPILOGUE, layout)
        if GATED:
            gate, up = _gate_up(acc, EPILOGUE[6])
            return _put(ACTIVATION(gate, up, EPILOGUE[3], EPILOGUE[4]), out_desc, buffers, row, end, column, n)
        else:
            return _put(ACTIVATION(acc, EPILOGUE[3], EPILOGUE[4]), out_desc, buffers, row, end, column, n)


@gluon.constexpr_function
def _sizes(MAIN):
    """What a tile may be multiplied as: tokens, and tokens more."""
    return ((64, 0), (128, 0), *(((128, 64), (256, 0)) if MAIN == 256 else ()), (MAIN, 16), (MAIN, 32))


@gluon.jit
def _tile(stage, phase, ring, outputs, buffers, tile, SHAPE: gl.constexpr, N: gl.constexpr, EPILOGUE: gl.constexpr,
          SIZE: gl.constexpr):  # fmt: skip
    """A tile as the first of the sizes, from SIZE on, that holds it."""
    row, height, expert, column = tile
    SIZES: gl.constexpr = _sizes(ring[0].shape[1])
    M: gl.constexpr = SIZES[SIZE][0]
    T: gl.constexpr = SIZES[SIZE][1]
    if height <= M + T:
        end = row + height
        acc, tail, stage, phase = _multiply(stage, phase, ring, M, T, SHAPE)
        n = _finish(acc, outputs, buffers, row, end, expert, column, N, EPILOGUE, 0)
        if T > 0:
            _finish(tail, outputs, buffers, row + M, end, expert, column, N, EPILOGUE, n)
    elif SIZE + 1 < len(SIZES):
        stage, phase = _tile(stage, phase, ring, outputs, buffers, tile, SHAPE, N, EPILOGUE, SIZE + 1)
    return stage, phase


@gluon.jit
def consume(ring, outputs, buffers, cue, SHAPE: gl.constexpr, N: gl.constexpr, EPILOGUE: gl.constexpr):
    """One half of every tile's rows of weights."""
    COLUMNS: gl.constexpr = SHAPE[1] // 2 if EPILOGUE[1] else SHAPE[1]
    stage, phase = 0, 0
    turn = 0 * gl.program_id(0)
    entry = _next_tile(cue, turn)
    while entry != END:
        row, expert, height, tile_n = decode(entry)
        tile = (row, height, expert, (2 * tile_n + SHAPE[0]) * COLUMNS)
        stage, phase = _tile(stage, phase, ring, outputs, buffers, tile, SHAPE, N, EPILOGUE, 0)
        turn += 1
        entry = _next_tile(cue, turn)
    tma.store_wait(0)
