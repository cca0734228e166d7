"""Operations whose complex kernels in PyTorch are analytic, operations on shape, and operations that are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdeq_ep.holomorphic.registry import CannotContinueError, Kind, declare, rule

_NATIVE = {
    "arithmetic": """
        add sub subtract mul multiply div divide true_divide truediv neg negative positive rsub reciprocal square
        sum mean cumsum prod cumprod nan_to_num trace gradient diff trapezoid trapz
        cumulative_trapezoid cross linalg.cross outer ger
    """,
    "elementary functions": """
        exp2 expm1 log log2 log10 sqrt rsqrt sin cos tan sinh cosh asin acos atan asinh acosh atanh
        arcsin arccos arctan arcsinh arccosh arctanh sinc
    """,
    "Fourier transforms": """
        fft.fft fft.ifft fft.fft2 fft.ifft2 fft.fftn fft.ifftn fft.fftshift fft.ifftshift
    """,
    "matrix functions": """
        det inverse matrix_exp matrix_power linalg.det linalg.inv linalg.matrix_exp linalg.matrix_power
    """,
    "shape": """
        reshape reshape_as view view_as permute transpose swapaxes swapdims moveaxis movedim t T mT flatten unflatten
        ravel squeeze unsqueeze expand expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave chunk
        split split_with_sizes tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split unsafe_split_with_sizes
        unbind narrow narrow_copy select roll flip fliplr flipud rot90 cat concat concatenate stack hstack vstack dstack
        column_stack row_stack block_diag atleast_1d atleast_2d atleast_3d diagonal linalg.diagonal diag diag_embed
        diagflat tril triu meshgrid cartesian_prod combinations unfold as_strided contiguous clone detach
        resolve_conj resolve_neg pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle sum_to_size
        constant_pad_nd
    """,
    "indexing": """
        __getitem__ __setitem__ __iter__ __reversed__ __len__ index_select gather take take_along_dim index_add
        index_copy index_fill index_put scatter scatter_add masked_fill masked_scatter masked_select where
        select_scatter slice_scatter diagonal_scatter embedding copy_ fill_ zero_
    """,
    "new tensors": """
        zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_empty_strided new_tensor
    """,
    "copies": "as_tensor asarray tensor",
    "metadata": """
        shape dtype device ndim size dim ndimension numel nelement stride storage_offset element_size itemsize nbytes
        layout requires_grad requires_grad_ retain_grad grad grad_fn is_leaf data data_ptr get_device _version
        _base output_nr is_complex is_contiguous is_conj is_neg is_signed is_nested is_sparse
        is_sparse_csr is_quantized is_cuda is_cpu is_meta is_mps is_xpu
        is_inference is_same_size is_set_to is_shared is_pinned register_hook cpu cuda __repr__ __format__
        __hash__ _make_dual _unpack_dual __deepcopy__ isnan isinf isfinite cfloat cdouble result_type
    """,
}

_CONJUGATE = "it involves the complex conjugate"
_VALUES = "it takes the numbers out of PyTorch, where nothing is known about what becomes of them"
_CAST = "a cast to a real or integer dtype drops the imaginary part"
_CONSTANT = "it is piecewise constant, and has no complex derivative at its jumps"
_REFUSED = {
    "it depends on the real and imaginary parts separately": """
        real imag angle view_as_real view_as_complex complex polar sgn isreal
    """,
    "it accumulates conjugate derivatives in z.grad. Use torch.autograd.grad, which is continued": "backward",
    _CONJUGATE: """
        conj conj_physical vdot linalg.vecdot H mH adjoint cov corrcoef cholesky linalg.cholesky linalg.cholesky_ex
        linalg.qr qr linalg.svd svd linalg.svdvals linalg.eigh linalg.eigvalsh pinverse linalg.pinv linalg.lstsq
    """,
    "it is made of absolute values": """
        norm dist linalg.norm linalg.vector_norm linalg.matrix_norm normalize cosine_similarity pairwise_distance cdist
        pdist renorm lp_pool1d lp_pool2d lp_pool3d slogdet linalg.slogdet linalg.cond hypot copysign
    """,
    "it compares numbers, which complex numbers do not allow": """
        eq ne not_equal equal allclose isclose is_nonzero nonzero argwhere count_nonzero unique unique_consecutive
        searchsorted bucketize isin any all logical_and logical_or logical_xor logical_not
    """,
    _CONSTANT: "round floor ceil trunc fix frac floor_divide floordiv remainder fmod mod heaviside signbit",
    "it is an order statistic": """
        median nanmedian mode quantile nanquantile kthvalue cummax cummin msort histc
        fractional_max_pool2d fractional_max_pool3d
    """,
    _CAST: "float double half bfloat16 int long short char byte bool",
    _VALUES: """
        item tolist numpy __array__ __bool__ __float__ __int__ __index__ __complex__ __contains__ __long__ __nonzero__
        __dlpack__
    """,
    "its output is real by construction: the transform back from half a spectrum adds the conjugate other half. Use "
    "torch.fft.fft and torch.fft.ifft, which are holomorphic": """
        fft.irfft fft.irfft2 fft.irfftn fft.hfft fft.hfft2 fft.hfftn istft
    """,
    "its output is fed by random numbers of another distribution than at real states": """
        rand_like randn_like bernoulli bernoulli_ normal_ uniform_ rrelu gumbel_softmax
    """,
}

for _group, _names in _NATIVE.items():
    declare(_names, Kind.NATIVE, _group)
for _why, _names in _REFUSED.items():
    declare(_names, Kind.REFUSED, "not analytic", _why)


@rule("is_floating_point", "metadata", "true, so that code takes the path it takes at real states")
def _is_floating_point(input: Tensor) -> bool:
    del input
    return True


@rule(
    "to type type_as",
    "casts",
    "device and complex dtypes; refused for real dtypes, which would drop the imaginary part",
)
def _to(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    for value in (*args, *kwargs.values()):
        dtype = value.dtype if isinstance(value, Tensor) else value
        if isinstance(dtype, str) and dtype.endswith("Tensor"):
            raise CannotContinueError(f"{_CAST}; cast to the dtype of the state, z.dtype, instead")
        if isinstance(dtype, torch.dtype) and not dtype.is_complex:
            raise CannotContinueError(f"{_CAST}; cast to the dtype of the state, z.dtype, instead")
    return input.to(*args, **kwargs) if args or kwargs else input.type()
