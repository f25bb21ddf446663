"""The first GEMM of the MLP with bias and QuickGELU in its epilogue, and the activation's backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xclip_fast.devices import compute_capability, multiprocessors
from xclip_fast.kernels._launch import as_rows, cdiv, kernel, next_power_of_2, on_device_of
from xclip_fast.kernels._tensors import dot_precision
from xclip_fast.kernels.column_sums import parts_of, rows_of_part, sum_of_parts
from xclip_fast.tuning import Tile, every, listed, tunable

# x * sigmoid(1.702 x) = x / (1 + 2^(-1.702 log2(e) x)): one exp2 and one division, where tl.sigmoid takes 13 operations
EXPONENT = tl.constexpr(-2.4554669595930155)
LARGEST_EXPONENT = tl.constexpr(62.0)  # the product of two powers stays finite
LEAST = tl.constexpr(2.0**-61)  # twice the sigmoid of the largest exponent
ENOUGH_TILES = 80  # of 64 rows by 256 columns: measured at 84 on 132 multiprocessors, a seventh faster than narrow ones
QUARTERS = 4  # a tile of the persistent kernel is stored in as many parts


@tunable(
    "linear_quick_gelu",
    candidates=listed(
        "rows columns depth num_warps num_stages",
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (256, 64, 64, 8, 3),
        (64, 128, 32, 4, 4),
        (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (128, 128, 32, 8, 4),
    ),
)
def forward_tile(rows: int, width: int, dtype: torch.dtype) -> Tile:
    """The default tile of a GEMM of this many rows and four times as many columns as it sums.

    Two programs a multiprocessor where the rows fill it; of few rows the widest tiles that leave few idle.
    """
    depth = min(64, max(16, next_power_of_2(width)))
    if dtype == torch.float32:
        return Tile(64, 64, min(32, depth), 4, 2)
    if rows <= 2048:
        wide = cdiv(rows, 64) * cdiv(4 * width, 256) >= ENOUGH_TILES
        return Tile(64, 256, depth, 8, 3) if wide else Tile(64, 128, depth, 4, 4)
    # four warps would hold 128 sums a thread, and spill in the epilogue
    return Tile(128, 128, depth, 8, 3)


@tunable(
    "quick_gelu_bwd",
    op="linear_quick_gelu",
    backward=True,
    candidates=every(columns=(128, 256), rows=(16, 8, 32)),
)
def backward_tile(dtype: torch.dtype) -> Tile:
    """Rows and columns that a program of the activation's backward pass has at a time, the same for every shape."""
    return Tile(16, 128)


# two programs share a multiprocessor: each has room for three steps of operands and a quarter of the result, and one
# multiplies while the other activates and stores
PERSISTENT = Tile(128, 128, 64, 4, 3)
SHARING = 2


def tiles(rows: int, hidden: int) -> int:
    """How many the persistent kernel cuts a result into."""
    return cdiv(rows, PERSISTENT.rows) * cdiv(hidden, PERSISTENT.columns)


def persistent_programs(rows: int, hidden: int, multiprocessors: int) -> int:
    """Programs of the persistent kernel on a GPU of so many multiprocessors; 0 where there is not a tile for each."""
    programs = SHARING * multiprocessors
    return programs if tiles(rows, hidden) >= programs else 0


@triton.jit
def _tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile; groups of rows share columns of the weight in the L2 cache."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@kernel
def _linear_quick_gelu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    pre_ptr,
    rows,
    x_stride,
    weight_stride,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_m, tile_n = _tile_of(tl.program_id(0), tiles_m, tl.cdiv(HIDDEN, BLOCK_N), GROUP)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns past the end repeat the last one: no mask in the loop, and they are not stored
    x = x_ptr + tl.minimum(row, rows - 1)[:, None] * x_stride + k[None, :]
    weight = weight_ptr + tl.minimum(column, HIDDEN - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
            x_tile = tl.load(x)
            weight_tile = tl.load(weight)
        else:
            x_tile = tl.load(x, mask=k[None, :] < WIDTH - start, other=0.0)
            weight_tile = tl.load(weight, mask=k[:, None] < WIDTH - start, other=0.0)
        acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
        x += BLOCK_K
        weight += BLOCK_K
    pre = acc + tl.load(bias_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    out = row[:, None] * HIDDEN + column[None, :]
    if SAVE_PRE:
        tl.store(pre_ptr + out, pre.to(pre_ptr.dtype.element_ty), mask=inside)
    hidden = pre / (1.0 + tl.exp2(pre * EXPONENT))
    tl.store(hidden_ptr + out, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right columns of a tile, each where its numbers were: no thread hands any to another."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_activated(
    left, right, bias_ptr, hidden, pre, row, first, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, SAVE_PRE: tl.constexpr
):
    """Bias and QuickGELU of two neighbours with one division for both: reciprocals and powers bound this part."""
    column = first + tl.arange(0, COLUMNS)
    # [rows, COLUMNS]
    left += tl.load(bias_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    column += COLUMNS
    right += tl.load(bias_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    if SAVE_PRE:
        pre.store([row, first], left.to(pre.dtype))
        pre.store([row, first + COLUMNS], right.to(pre.dtype))
    # the smaller of NaN and a number is the number: what is bad in one neighbour stays there
    a = 1.0 + tl.exp2(tl.minimum(left * EXPONENT, LARGEST_EXPONENT))
    b = 1.0 + tl.exp2(tl.minimum(right * EXPONENT, LARGEST_EXPONENT))
    both = 1.0 / (a * b)
    # the sigmoid of larger exponents is zero, and -inf times zero NaN, as by definition; each is one instruction
    left *= tl.clamp(b * both - LEAST, 0.0, 1.0)
    right *= tl.clamp(a * both - LEAST, 0.0, 1.0)
    hidden.store([row, first], left.to(hidden.dtype))
    hidden.store([row, first + COLUMNS], right.to(hidden.dtype))


@triton.jit(do_not_specialize=["rows", "programs"])
def _linear_quick_gelu_persistent_fwd_kernel(
    x,
    weight,
    hidden,
    pre,
    bias_ptr,
    rows,
    programs,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SAVE_PRE: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    stored = tl.program_id(0) - programs
    # flattened, the copies of the next tile's operands go on while this tile is activated and stored
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=True):
        tile_m, tile_n = _tile_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; zeros past the ends
            x_tile = x.load([tile_m * BLOCK_M, k])
            weight_tile = weight.load([tile_n * BLOCK_N, k])
            acc = tl.dot(x_tile, weight_tile.T, acc)
        # computed again: the operands of the next tile are being copied with the indices above
        stored += programs
        tile_m, tile_n = _tile_of(stored, tiles_m, tiles_n, GROUP)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
        _store_activated(first, second, bias_ptr, hidden, pre, row, column, HIDDEN, BLOCK_N // 4, SAVE_PRE)
        column += BLOCK_N // 2
        _store_activated(third, fourth, bias_ptr, hidden, pre, row, column, HIDDEN, BLOCK_N // 4, SAVE_PRE)


@kernel
def _quick_gelu_bwd_kernel(
    grad_ptr,
    pre_ptr,
    grad_pre_ptr,
    hidden_ptr,
    partial_ptr,
    rows,
    part_rows,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WRITE_HIDDEN: tl.constexpr,
):
    columns: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    part = (program // columns).to(tl.int64)
    column = program % columns * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = column < WIDTH
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, part_rows, BLOCK_ROWS):
        row = part * part_rows + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & in_width[None, :]
        index = row[:, None] * WIDTH + column[None, :]
        # [BLOCK_ROWS, BLOCK_COLUMNS]
        pre = tl.load(pre_ptr + index, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp2(pre * EXPONENT))
        grad *= sigmoid + 1.702 * pre * sigmoid * (1.0 - sigmoid)
        sums += grad
        tl.store(grad_pre_ptr + index, grad.to(grad_pre_ptr.dtype.element_ty), mask=inside)
        if WRITE_HIDDEN:
            # computed again here, so that the forward pass need not keep it
            tl.store(hidden_ptr + index, (pre * sigmoid).to(hidden_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + part * WIDTH + column, tl.sum(sums, axis=0), mask=in_width)


def linear_quick_gelu_fwd(x: Tensor, weight: Tensor, bias: Tensor, save_pre: bool) -> tuple[Tensor, Tensor]:
    """Launch the GEMM: activated (..., N), and the pre-activation of the same shape, empty unless asked for."""
    flat = as_rows(x)
    weight = as_rows(weight)
    rows, width = flat.shape
    hidden_width = weight.shape[0]
    if programs := _persistent(flat, weight):
        return linear_quick_gelu_persistent_fwd(x, weight, bias, save_pre, programs)
    hidden = x.new_empty(*x.shape[:-1], hidden_width)
    pre = torch.empty_like(hidden) if save_pre else x.new_empty(0)
    tile = forward_tile(rows, width, x.dtype)
    if hidden.numel():
        with on_device_of(x):
            _linear_quick_gelu_fwd_kernel[(cdiv(rows, tile.rows) * cdiv(hidden_width, tile.columns),)](
                x_ptr=flat,
                weight_ptr=weight,
                bias_ptr=bias.contiguous(),
                hidden_ptr=hidden,
                pre_ptr=pre,
                rows=rows,
                x_stride=flat.stride(0),
                weight_stride=weight.stride(0),
                WIDTH=width,
                HIDDEN=hidden_width,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.columns,
                BLOCK_K=tile.depth,
                GROUP=8,
                SAVE_PRE=save_pre,
                PRECISION=dot_precision(x),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return hidden, pre


def _persistent(x: Tensor, weight: Tensor) -> int:
    """Programs of the persistent kernel; 0 where another launches: not on Hopper, few tiles, rows it cannot copy."""
    if x.dtype == torch.float32 or not x.is_cuda or compute_capability(x.get_device())[0] != 9:
        return 0
    programs = persistent_programs(len(x), len(weight), multiprocessors(x.get_device()))
    sizes = x.stride(0), weight.stride(0), weight.shape[0]
    # a descriptor takes rows of whole 16 bytes, one behind another
    aligned = all(size % 8 == 0 for size in sizes) and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    return programs if aligned and x.stride(0) >= x.shape[1] <= weight.stride(0) else 0


def linear_quick_gelu_persistent_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, save_pre: bool, programs: int
) -> tuple[Tensor, Tensor]:
    """Launch the persistent GEMM by so many programs, or one a tile where there are fewer.

    Activated (..., N), and the pre-activation of the same shape, empty unless asked for.

    Of x (..., K), weight (N, K) and bias (N,), none of them empty; a row of x, of the weight and of the result begins
    at a multiple of 16 bytes, and rows have unit stride. Only Hopper has the shared memory and the copies it is made
    for.

    Raises:
        AssertionError: rows begin elsewhere.
    """
    tile = PERSISTENT
    hidden_width = len(weight)
    # whoever gets them may change them in place, which autograd forbids for views
    hidden = x.new_empty(*x.shape[:-1], hidden_width)
    pre = torch.empty_like(hidden) if save_pre else x.new_empty(0)
    x, out = as_rows(x), hidden.view(-1, hidden_width)
    pre_out = pre.view(-1, hidden_width) if save_pre else out
    programs = min(tiles(len(x), hidden_width), programs)
    with on_device_of(x):
        _linear_quick_gelu_persistent_fwd_kernel[(programs,)](
            x=TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            weight=TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
            hidden=TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // QUARTERS]),
            pre=TensorDescriptor.from_tensor(pre_out, [tile.rows, tile.columns // QUARTERS]),
            bias_ptr=bias.contiguous(),
            rows=len(x),
            programs=programs,
            WIDTH=x.shape[1],
            HIDDEN=hidden_width,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            GROUP=16,
            SAVE_PRE=save_pre,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return hidden, pre


def quick_gelu_bwd(grad: Tensor, pre: Tensor, write_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the activation's backward pass.

    The gradient of the pre-activation (..., N), the activation or an empty tensor, and the sums (N,) of the gradient
    over all rows, which are the gradient of the bias.
    """
    shape = pre.shape
    grad, pre = as_rows(grad.contiguous()), as_rows(pre.contiguous())
    grad_pre = torch.empty_like(pre)
    hidden = torch.empty_like(pre) if write_hidden else pre.new_empty(0)
    tile = backward_tile(pre.dtype)
    rows, width = pre.shape
    part_rows = rows_of_part(rows, parts_of(rows, width, tile), tile)
    parts = max(1, cdiv(rows, part_rows))
    partial = pre.new_empty(parts, width, dtype=torch.float32)
    if width:
        with on_device_of(pre):
            _quick_gelu_bwd_kernel[(parts * cdiv(width, tile.columns),)](
                grad_ptr=grad,
                pre_ptr=pre,
                grad_pre_ptr=grad_pre,
                hidden_ptr=hidden,
                partial_ptr=partial,
                rows=rows,
                part_rows=part_rows,
                WIDTH=width,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=tile.columns,
                WRITE_HIDDEN=write_hidden,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return grad_pre.view(shape), hidden.view(shape) if write_hidden else hidden, sum_of_parts(partial, pre.dtype)
