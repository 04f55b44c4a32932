"""The product with A and B swapped, in Gluon, for Hopper: weights on the tensor cores' M side and tokens on N.

A *tall* tile is 256 rows of weights by up to 128 tokens, a *wide* one 128 by 256, and either takes a tail of 16 or 32
tokens more, so that what an expert has beyond full tiles costs about what it is. A program a multiprocessor takes tiles
from a queue. One partition loads; two multiply, each with half of the tile's rows of weights, and may drift apart, so
that the epilogue of one runs under the products of the other.

Legend: N output columns, K contraction; ROWS of weights that a consumer has, and MAIN tokens of a tile but for its
tail. A *stage* of the ring holds 64 columns of a tile's main rows, of its tail and of either consumer's weights.
"""

# annotations are values here: an aggregate checks its fields against them
from typing import Any, NamedTuple

from ....hardware import base_value, gl, gluon
from ....hardware import gluon_aggregate as aggregate
from ....launch import Kernel, TensorMap, ceil_div, follow
from .cost import Cost, microseconds
from .epilogue import Code, clamped, code
from .persistent_tma import maps_why_not, row_map, table_run
from .schedule import Tiles, decode, entries
from .spec import Config, Gemm, GemmSpec

hopper = gl.nvidia.hopper
tma, mbarrier, async_copy = hopper.tma, hopper.mbarrier, hopper.async_copy
fence_async_shared = hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
TAIL, BOX = gl.constexpr(32), gl.constexpr(32)  # tokens at the most, of a load
BLOCK_K, STAGES = gl.constexpr(64), gl.constexpr(4)
END = gl.constexpr(-1)  # no entry of the tile table
EDGE = gl.constexpr(1 << 30)  # see `_put`

TALL, WIDE = Config(128, 256, 64, 4, 4, slack=32), Config(256, 128, 64, 4, 4, slack=32)
# for experts with thousands of rows, of which fewer row tiles at a time fit the L2; the same kernels
TALL8, WIDE4 = Config(128, 256, 64, 4, 4, 8, 32), Config(256, 128, 64, 4, 4, 4, 32)
COSTS = {TALL: (Cost(4.2, 1.1, 1.0, odd=60), Cost(4.4, 1.04, 1.0, odd=60)), WIDE: (None, Cost(3.95, 1.04, 0.5, odd=20))}
COSTS |= {TALL8: COSTS[TALL], WIDE4: COSTS[WIDE]}


# ---------------------------------------------------------------- choice and launch
def why_not(spec: GemmSpec) -> str | None:
    e = spec.epilogue
    if spec.gpu.arch != "sm_90":
        return f"is written for sm_90, got {spec.gpu.arch}"
    if reason := maps_why_not(spec):
        return reason
    if e.gated and spec.input_major and not e.interleaved:
        return "needs K-major weights, or gates and ups that alternate"
    if e.gated and e.interleaved and e.preact:
        return "cannot keep pre-activations that alternate"
    if e.gated and e.preact and spec.top_k:
        return "cannot keep pre-activations of gathered rows: its registers spill"
    if spec.top_k and spec.K % BLOCK_K.value:
        return f"needs gathered rows of whole stages of {BLOCK_K.value}, got {spec.K}"
    return None


def candidates(spec: GemmSpec) -> tuple[Config, ...]:
    tight = spec.epilogue.gated and spec.epilogue.preact  # wide tiles would spill
    able = (c for c, costs in COSTS.items() if costs[0 if spec.top_k else 1] is not None)
    return tuple(c for c in able if c.block_m == TALL.block_m or not tight)


def estimate(spec: GemmSpec, config: Config) -> float:
    cost = COSTS.get(config, COSTS[TALL])[0 if spec.top_k else 1]
    return microseconds(spec, config, cost or COSTS[TALL][0])


def launch(spec: GemmSpec, config: Config) -> Gemm:
    e, N = spec.epilogue, spec.N
    rows = 16384 // config.block_m
    width = min(64, rows // 2 if e.gated else rows)
    box = (2048 // width, width)  # 4 KiB to store
    maps = {"w_desc": _weight_map(spec, rows), "out_desc": row_map(N, N, *box, gluon=True)}
    if not spec.top_k:
        maps["x_ptr"] = row_map(spec.K, spec.strides[0], 32, 64, gluon=True)
    if e.preact:
        maps["preact_desc"] = row_map(N, spec.width, *box, gluon=True)
        if e.gated:
            maps["up_desc"] = row_map(N, spec.width, *box, gluon=True)
    steps, pairs = ceil_div(spec.K, BLOCK_K.value), e.gated and spec.input_major
    form = Form(N, spec.K, spec.top_k, spec.input_major, pairs, config.block_m, rows, steps, code(e))
    bound = swapped_gemm_kernel.bind(FORM=form, num_warps=4, num_stages=3, maps=maps)
    tiles = Tiles(config.block_m, ceil_div(N, rows if e.gated else 2 * rows), config.group_m, config.slack)
    return Gemm(spec, tiles, table_run(spec, tiles, bound))


def _weight_map(spec: GemmSpec, rows: int) -> TensorMap:
    """A box is a consumer's `rows` rows of one expert's weights, 64 deep; of gated ones eight are gates, eight ups."""
    (_, we, wn, wk), E, N, K, e = spec.strides, spec.experts, spec.N, spec.K, spec.epilogue
    if spec.input_major:
        return TensorMap((E, K, spec.width), (we, wk, 1), (1, 64, rows), gluon=True)
    if not e.gated:
        return TensorMap((E, spec.width, K), (we, wn, 1), (1, rows, 64), gluon=True)
    half, step = (wn, 2 * wn) if e.interleaved else (N * wn, wn)
    return TensorMap((E, N // 8, 2, 8, K), (we, 8 * step, half, step, 1), (1, rows // 16, 2, 8, 64), gluon=True)


# ---------------------------------------------------------------- what the partitions share
class Form(NamedTuple):
    """The kernel's compile-time constants. PAIRS: a thread's gate and up are neighbours in the weights' memory."""

    N: int
    K: int
    TOP_K: int  # 0 where rows are not gathered
    INPUT_MAJOR: bool
    PAIRS: bool
    MAIN: int
    ROWS: int
    STEPS: int
    EPILOGUE: Code

    @property
    def cache_key(self) -> str:
        return f"{tuple(self)[:-1]}{self.EPILOGUE.cache_key}"


@aggregate
class Ring:
    """The buffers of all stages, and their barriers: filled, and free again."""

    rows: gl.shared_memory_descriptor
    tails: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, rows: Any, tails: Any, weights: Any, empty: Any, full: Any):
        self.rows, self.tails, self.weights, self.empty, self.full = rows, tails, weights, empty, full


@aggregate
class Cue:
    """What tells the consumers which tile comes next: the entry, and that it was posted and taken."""

    board: gl.shared_memory_descriptor
    posted: gl.shared_memory_descriptor
    taken: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, board: Any, posted: Any, taken: Any):
        self.board, self.posted, self.taken = board, posted, taken


@aggregate
class Queue:
    """The tile table, and the count of the tiles that were taken from it."""

    entries: gl.tensor
    head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, entries: Any, head: Any):
        self.entries, self.head = entries, head


@gluon.constexpr_function
def _value(argument: Any) -> Any:
    """An argument as a field holds it, also where it is None."""
    return gl.constexpr(None) if argument is None else argument


@aggregate
class Outputs:
    """Where results go, and what the epilogue reads; what is not used is None."""

    out: base_value
    preact: base_value
    up: base_value
    bias: base_value
    scale: base_value
    order: base_value

    @gluon.constexpr_function
    def __init__(self, out: Any, preact: Any, up: Any, bias: Any, scale: Any, order: Any):
        self.out, self.preact, self.up = out, _value(preact), _value(up)
        self.bias, self.scale, self.order = _value(bias), _value(scale), _value(order)


@gluon.jit
def _next(stage, phase):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


# ---------------------------------------------------------------- which tile comes next
@gluon.jit
def _publish(entry, cue, turn, L: gl.constexpr):
    """Tell the consumers which tile comes next."""
    mbarrier.wait(cue.taken.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    cue.board.index(turn & 1).store(gl.full([1], entry, gl.int64, L))
    mbarrier.arrive(cue.posted.index(turn & 1), count=1)


@gluon.jit
def _next_tile(cue, turn):
    """The tile that comes next, END behind the last."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(cue.posted.index(turn & 1), (turn >> 1) & 1)
    entry = gl.max(cue.board.index(turn & 1).load(layout), 0)
    mbarrier.arrive(cue.taken.index(turn & 1), count=1)
    return entry


@gluon.jit
def _claim(taken_tiles, queue, used):
    """The tile after all that were taken; whoever takes the very last zeroes the count for the next launch."""
    if taken_tiles == used - 1:
        gl.store(queue.head + 1, 0)
    return taken_tiles + gl.num_programs(0)


# ---------------------------------------------------------------- loads
@gluon.jit
def _load_weights(w_desc, ring, stage, expert, tile_n, k, FORM: gl.constexpr):
    """A box of an expert's weights for either consumer; of gated ones eight gates and eight ups take turns."""
    for who in gl.static_range(2):
        if FORM.EPILOGUE.gated and not FORM.INPUT_MAJOR:
            at = [expert, (2 * tile_n + who) * (FORM.ROWS // 16), 0, 0, k]
        elif FORM.INPUT_MAJOR:
            at = [expert, k, (2 * tile_n + who) * FORM.ROWS]
        else:
            at = [expert, (2 * tile_n + who) * FORM.ROWS, k]
        tma.async_copy_global_to_shared(w_desc, at, ring.full.index(stage), ring.weights.index(2 * stage + who))


@gluon.jit
def _load(stage, phase, ring, x_desc, w_desc, row, expert, height, tile_n, k, FORM: gl.constexpr):
    """A stage of rows that lie one after the other, no more than the tile's height asks for, and of weights.

    Rows behind the tile's last are zeros, which cost neither traffic nor much power; see `persistent_tma.load_rows`.
    """
    WEIGHTS: gl.constexpr = 2 * w_desc.block_type.nbytes
    BYTES: gl.constexpr = x_desc.block_type.nbytes
    BOXES: gl.constexpr = FORM.MAIN // BOX
    mbarrier.wait(ring.empty.index(stage), phase)
    barrier = ring.full.index(stage)
    pairs = (height + 63) // 64  # of boxes
    for i in gl.static_range(1, BOXES // 2 + 1):
        mbarrier.expect(barrier, WEIGHTS + 2 * i * BYTES, pred=pairs == i)
    mbarrier.expect(barrier, WEIGHTS + (BOXES + 1) * BYTES, pred=pairs > BOXES // 2)
    _load_weights(w_desc, ring, stage, expert, tile_n, k, FORM)
    end = row + height
    boxes = ring.rows._reinterpret(ring.rows.dtype, [STAGES * BOXES, 1, 1, BOX, BLOCK_K], x_desc.layout)
    tail_boxes = ring.tails._reinterpret(ring.rows.dtype, [STAGES, 1, 1, BOX, BLOCK_K], x_desc.layout)
    for i in gl.static_range(BOXES + 1):
        rows = boxes.index(stage * BOXES + i) if i < BOXES else tail_boxes.index(stage)
        at = [EDGE, end, EDGE - height + i * BOX, k]
        tma.async_copy_global_to_shared(x_desc, at, barrier, rows, pred=pairs > i // 2)
    return _next(stage, phase)


@gluon.jit
def produce(x_desc, w_desc, queue, ring, cue, FORM: gl.constexpr):
    """Rows that lie one after the other."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    HALFWAY: gl.constexpr = (FORM.K // 2 + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    stage, phase = 0, 1
    turn = 0 * gl.program_id(0)
    used = gl.load(queue.head)
    t = gl.program_id(0)
    entry = gl.load(queue.entries + t)
    while t < used:
        _publish(entry, cue, turn, layout)
        turn += 1
        row, expert, height, tile_n = decode(entry)
        taken_tiles = gl.atomic_add(queue.head + 1, 1)
        for k in range(0, HALFWAY, BLOCK_K):
            stage, phase = _load(stage, phase, ring, x_desc, w_desc, row, expert, height, tile_n, k, FORM)
        t = _claim(taken_tiles, queue, used)
        entry = gl.load(queue.entries + t)
        for k in range(HALFWAY, FORM.K, BLOCK_K):
            stage, phase = _load(stage, phase, ring, x_desc, w_desc, row, expert, height, tile_n, k, FORM)
    _publish(END, cue, turn, layout)


@gluon.jit
def _sources(gather_ptr, entry, offs_m, offs_t, TOP_K: gl.constexpr):
    """Rows of x that a tile reads in its main part and its tail, 0 behind the last."""
    row, _, height, _ = decode(entry)
    main = gl.load(gather_ptr + row + offs_m, mask=offs_m < height, other=0)
    tail = gl.load(gather_ptr + row + offs_t, mask=offs_t < height, other=0)
    return main // TOP_K, tail // TOP_K


@gluon.jit
def _gather(
    stage, phase, ring, w_desc, x_ptrs, tail_ptrs, live, tail_live, expert, height, tile_n, k, FORM: gl.constexpr
):
    """A stage of rows from anywhere and of weights. Masked rows are filled with zeros."""
    mbarrier.wait(ring.empty.index(stage), phase)
    mbarrier.expect(ring.full.index(stage), 2 * w_desc.block_type.nbytes)
    _load_weights(w_desc, ring, stage, expert, tile_n, k, FORM)
    async_copy.async_copy_global_to_shared(ring.rows.index(stage), x_ptrs + k, mask=live)
    if height > FORM.MAIN:
        async_copy.async_copy_global_to_shared(ring.tails.index(stage), tail_ptrs + k, mask=tail_live)
    async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
    return _next(stage, phase)


@gluon.jit
def produce_gathered(x_ptr, stride_x, gather_ptr, w_desc, queue, ring, cue, FORM: gl.constexpr):
    """Rows from anywhere, by 16-byte copies of four warps. What the next tile needs is asked for on the way."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    K: gl.constexpr = FORM.K
    THIRD: gl.constexpr = (K // 3 + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    TWO_THIRDS: gl.constexpr = 2 * THIRD if 2 * THIRD < K else K
    MAIN: gl.constexpr = FORM.MAIN
    offs_m = gl.arange(0, MAIN, gl.SliceLayout(1, layout))
    offs_t = MAIN + gl.arange(0, TAIL, gl.SliceLayout(1, layout))
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    stage, phase = 0, 1
    turn = 0 * gl.program_id(0)
    used = gl.load(queue.head)
    t = gl.program_id(0)
    entry = gl.load(queue.entries + t)
    TOP_K: gl.constexpr = FORM.TOP_K
    main, tail = _sources(gather_ptr, entry, offs_m, offs_t, TOP_K)
    while t < used:
        _publish(entry, cue, turn, line)
        turn += 1
        _, expert, height, tile_n = decode(entry)
        xs = x_ptr + main.to(gl.int64)[:, None] * stride_x + offs_k[None, :]
        ts = x_ptr + tail.to(gl.int64)[:, None] * stride_x + offs_k[None, :]
        live, far = (offs_m < height)[:, None], (offs_t < height)[:, None]
        taken_tiles = gl.atomic_add(queue.head + 1, 1)
        for k in range(0, THIRD, BLOCK_K):
            stage, phase = _gather(stage, phase, ring, w_desc, xs, ts, live, far, expert, height, tile_n, k, FORM)
        t = _claim(taken_tiles, queue, used)
        entry = gl.load(queue.entries + t)
        for k in range(THIRD, TWO_THIRDS, BLOCK_K):
            stage, phase = _gather(stage, phase, ring, w_desc, xs, ts, live, far, expert, height, tile_n, k, FORM)
        main, tail = _sources(gather_ptr, entry, offs_m, offs_t, TOP_K)
        for k in range(TWO_THIRDS, K, BLOCK_K):
            stage, phase = _gather(stage, phase, ring, w_desc, xs, ts, live, far, expert, height, tile_n, k, FORM)
    _publish(END, cue, turn, line)


# ---------------------------------------------------------------- products
@gluon.jit
def _weights(ring, stage, WHO: gl.constexpr, FORM: gl.constexpr):
    ROWS: gl.constexpr = FORM.ROWS
    if FORM.INPUT_MAJOR:
        return ring.weights.index(2 * stage + WHO).reshape([BLOCK_K, ROWS]).permute((1, 0))
    else:
        return ring.weights.index(2 * stage + WHO).reshape([ROWS, BLOCK_K])


@gluon.jit
def _tokens(ring, stage, FIRST: gl.constexpr, COUNT: gl.constexpr, FORM: gl.constexpr):
    """Some of a stage's tokens as the N side of a product."""
    if FIRST == FORM.MAIN:
        return ring.tails.index(stage).slice(0, COUNT).permute((1, 0))
    else:
        return ring.rows.index(stage).slice(FIRST, COUNT).permute((1, 0))


@gluon.jit
def _wait_full(ring, stage, phase, FORM: gl.constexpr):
    mbarrier.wait(ring.full.index(stage), phase)
    if FORM.TOP_K > 0:  # ordinary copies become visible to the tensor cores
        fence_async_shared()


@gluon.jit
def _multiply(stage, phase, ring, M: gl.constexpr, T: gl.constexpr, WHO: gl.constexpr, FORM: gl.constexpr):
    """A tile's products for M tokens and T more, a step in flight behind the next.

    A stage is given back when its products are done. The first step is peeled: a variable that is assigned another
    carried one both before a loop and in it is taken for constant (Triton 3.6 to 3.9).
    """
    P: gl.constexpr = T if T > 0 else 16
    ROWS: gl.constexpr = FORM.ROWS
    acc = gl.zeros((ROWS, M), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16]))
    tail = gl.zeros((ROWS, P), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16]))
    _wait_full(ring, stage, phase, FORM)
    w = _weights(ring, stage, WHO, FORM)
    acc = warpgroup_mma(w, _tokens(ring, stage, 0, M, FORM), acc, use_acc=False, is_async=True)
    if T > 0:
        tail = warpgroup_mma(w, _tokens(ring, stage, M, T, FORM), tail, use_acc=False, is_async=True)
        acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))  # waits for nothing, but makes tensors of the tokens
    else:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    before = stage
    stage, phase = _next(stage, phase)
    for _ in range(1, FORM.STEPS):
        _wait_full(ring, stage, phase, FORM)
        w = _weights(ring, stage, WHO, FORM)
        acc = warpgroup_mma(w, _tokens(ring, stage, 0, M, FORM), acc, is_async=True)
        if T > 0:
            tail = warpgroup_mma(w, _tokens(ring, stage, M, T, FORM), tail, is_async=True)
            acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(ring.empty.index(before), count=1)
        before = stage
        stage, phase = _next(stage, phase)
    if T > 0:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(before), count=1)
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
def _bias(bias_ptr, expert, column, rows: gl.constexpr, FORM: gl.constexpr, L: gl.constexpr):
    """The biases of an accumulator's rows, in the order of `_gate_up`."""
    GATED: gl.constexpr = FORM.EPILOGUE.gated
    N: gl.constexpr = FORM.N
    j = gl.arange(0, rows, gl.SliceLayout(1, L))
    if FORM.PAIRS:
        at = 2 * column + j
        inside = at < 2 * N
    elif GATED:
        at = column + j // 16 * 8 + j % 8
        inside = at < N
        half = j // 8 % 2
        at = 2 * at + half if FORM.EPILOGUE.interleaved else at + half * N
    else:
        at = column + j
        inside = at < N
    bias_ptr += expert * (2 * N if GATED else N)
    return gl.load(bias_ptr + at, mask=inside, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def _put(values, desc, buffers, row, end, column, n: gl.constexpr, FORM: gl.constexpr):
    """Store the rows before `end` (see `persistent_tma.store_rows`) of a box of columns by tokens.

    The n-th box of the tile: two buffers take turns, and the one before the last must have left. The store turns
    columns by tokens about. A box that is larger than the tokens that are left reaches past `end`.
    """
    if n > 0:
        tma.store_wait(1)
    else:
        tma.store_wait(0)
    buffer = buffers.index(n % 2)
    out = buffer.reshape([desc.block_shape[2], desc.block_shape[3]]).slice(0, values.shape[1])
    SATURATES: gl.constexpr = FORM.EPILOGUE.saturates
    out.permute((1, 0)).store(clamped(values, desc.dtype, SATURATES))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [EDGE, end, EDGE + row - end, column], buffer)
    return n + 1


@gluon.jit
def _finish(acc, to, buffers, row, end, expert, column, n: gl.constexpr, FORM: gl.constexpr):
    """The epilogue, a box at a time: a whole tile's would not fit the registers."""
    E: gl.constexpr = FORM.EPILOGUE
    ALPHA: gl.constexpr = E.alpha
    LIMIT: gl.constexpr = E.limit
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    if TOKENS > to.out.block_shape[2]:
        left, right = acc.reshape((ROWS, 2, TOKENS // 2)).permute((0, 2, 1)).split()
        n = _finish(left, to, buffers, row, end, expert, column, n, FORM)
        return _finish(right, to, buffers, row + TOKENS // 2, end, expert, column, n, FORM)
    elif not E.gated and ROWS > to.out.block_shape[3]:
        upper, lower = acc.reshape((2, ROWS // 2, TOKENS)).permute((1, 2, 0)).split()
        n = _finish(upper, to, buffers, row, end, expert, column, n, FORM)
        return _finish(lower, to, buffers, row, end, expert, column + ROWS // 2, n, FORM)
    else:
        if E.bias:
            layout: gl.constexpr = acc.type.layout
            acc += _bias(to.bias, expert, column, ROWS, FORM, layout)
        if E.gated:
            PAIRS: gl.constexpr = FORM.PAIRS
            gate, up = _gate_up(acc, PAIRS)
            if E.preact:
                n = _put(gate, to.preact, buffers, row, end, column, n, FORM)
                n = _put(up, to.up, buffers, row, end, column, n, FORM)
            y = E.activation(gate, up, ALPHA, LIMIT)
        else:
            if E.preact:
                n = _put(acc, to.preact, buffers, row, end, column, n, FORM)
            y = E.activation(acc, ALPHA, LIMIT)
        if E.scaled:
            tokens = row + gl.arange(0, TOKENS, gl.SliceLayout(0, y.type.layout))
            slots = gl.load(to.order + tokens, mask=tokens < end, other=0)
            y *= gl.load(to.scale + slots, mask=tokens < end, other=0.0).to(gl.float32)[None, :]
        return _put(y, to.out, buffers, row, end, column, n, FORM)


@gluon.constexpr_function
def _sizes(MAIN):
    """What a tile may be multiplied as: tokens, and tokens more."""
    return ((64, 0), (128, 0), *(((128, 64), (256, 0)) if MAIN == 256 else ()), (MAIN, 16), (MAIN, 32))


@gluon.jit
def _tile(stage, phase, ring, to, buffers, row, height, expert, column, SIZE: gl.constexpr, WHO: gl.constexpr,
          FORM: gl.constexpr):  # fmt: skip
    """A tile as the first of the sizes, from SIZE on, that holds it."""
    MAIN: gl.constexpr = FORM.MAIN
    SIZES: gl.constexpr = _sizes(MAIN)
    M: gl.constexpr = SIZES[SIZE][0]
    T: gl.constexpr = SIZES[SIZE][1]
    if height <= M + T:
        end = row + height
        acc, tail, stage, phase = _multiply(stage, phase, ring, M, T, WHO, FORM)
        n = _finish(acc, to, buffers, row, end, expert, column, 0, FORM)
        if T > 0:
            _finish(tail, to, buffers, row + M, end, expert, column, n, FORM)
    elif SIZE + 1 < len(SIZES):
        stage, phase = _tile(stage, phase, ring, to, buffers, row, height, expert, column, SIZE + 1, WHO, FORM)
    return stage, phase


@gluon.jit
def consume(ring, to, buffers, cue, WHO: gl.constexpr, FORM: gl.constexpr):
    """One half of every tile's rows of weights."""
    COLUMNS: gl.constexpr = FORM.ROWS // 2 if FORM.EPILOGUE.gated else FORM.ROWS
    stage, phase = 0, 0
    turn = 0 * gl.program_id(0)
    entry = _next_tile(cue, turn)
    while entry != END:
        row, expert, height, tile_n = decode(entry)
        column = (2 * tile_n + WHO) * COLUMNS
        stage, phase = _tile(stage, phase, ring, to, buffers, row, height, expert, column, 0, WHO, FORM)
        turn += 1
        entry = _next_tile(cue, turn)
    tma.store_wait(0)


@Kernel
@gluon.jit
def swapped_gemm_kernel(
    out_desc, x_ptr, gather_ptr, w_desc, bias_ptr, preact_desc, up_desc, scale_ptr, table_ptr, stride_x,
    FORM: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """`out[r] = epilogue(x[src(r)] @ w[expert(r)].T)`.

    `x_ptr` is a pointer where its rows are gathered, else a map. Registers: 168 a thread at entry, of which the
    producer gives most to the consumers. Barriers are set up only if they live to the end: the allocator puts data on
    those that do not.
    """
    dtype: gl.constexpr = out_desc.dtype
    MAIN: gl.constexpr = FORM.MAIN
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MAIN, BLOCK_K], dtype)
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES, MAIN, BLOCK_K], rows)
    tails = gl.allocate_shared_memory(dtype, [STAGES, TAIL, BLOCK_K], rows)
    w_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    out_0 = gl.allocate_shared_memory(dtype, [2] + out_desc.block_type.shape, out_desc.layout)  # noqa: RUF005
    out_1 = gl.allocate_shared_memory(dtype, [2] + out_desc.block_type.shape, out_desc.layout)  # noqa: RUF005
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    board = gl.allocate_shared_memory(gl.int64, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(posted.index(s), count=1)
        mbarrier.init(taken.index(s), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(empty.index(s), count=2)
        mbarrier.init(full.index(s), count=1 + 128 if FORM.TOP_K > 0 else 1)
    follow(OVERLAP)
    queue = Queue(entries(table_ptr), table_ptr)
    ring = Ring(x_bufs, tails, w_bufs, empty, full)
    cue = Cue(board, posted, taken)
    to = Outputs(out_desc, preact_desc, up_desc, bias_ptr, scale_ptr, gather_ptr)
    if FORM.TOP_K > 0:
        gl.warp_specialize([
            (consume, (ring, to, out_0, cue, 0, FORM)),
            (consume, (ring, to, out_1, cue, 1, FORM)),
            (produce_gathered, (x_ptr, stride_x, gather_ptr, w_desc, queue, ring, cue, FORM)),
        ], [4, 4], [208, 96])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (ring, to, out_0, cue, 0, FORM)),
            (consume, (ring, to, out_1, cue, 1, FORM)),
            (produce, (x_ptr, w_desc, queue, ring, cue, FORM)),
        ], [4, 1], [224, 64])  # fmt: skip
