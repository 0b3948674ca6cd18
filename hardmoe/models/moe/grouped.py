"""Products of sorted rows with a matrix per expert, as operations that torch can differentiate, compile, export and count.

How many rows an expert has is known only to the data, so a loop over them breaks a compiler's graph; as one opaque operation it
does not. On a GPU with bfloat16 it is torch's grouped matrix product, elsewhere one product per expert that has rows. Rows
behind the last expert's are not computed and come out as zeros.

Shape letters: R rows, D and F widths, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

_ALIGNMENT = 16
"""Bytes, of the rows that the grouped kernel reads."""


_LIBRARY = torch.library.Library("hardmoe", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("grouped_product(Tensor rows, Tensor weight, Tensor ends) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define("grouped_outer(Tensor rows, Tensor others, Tensor ends) -> Tensor")  # type: ignore[no-untyped-call]


def grouped_product(rows_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, [R, F]; `ends_E` int64 says where each expert's rows end."""
    product_RF: Tensor = torch.ops.hardmoe.grouped_product(rows_RD, weight_EDF, ends_E)
    return product_RF


def grouped_outer(rows_RD: Tensor, others_RF: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows, transposed, times its other rows, [E, D, F]: the gradient of its matrix."""
    product_EDF: Tensor = torch.ops.hardmoe.grouped_outer(rows_RD, others_RF, ends_E)
    return product_EDF


def _product(rows_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(rows_RD, weight_EDF):
        product_RF = functional.grouped_mm(rows_RD.contiguous(), weight_EDF, offs=ends_E.int())
        inside_R = torch.arange(len(rows_RD), device=rows_RD.device) < ends_E[-1]
        return torch.where(inside_R[:, None], product_RF, 0)
    product_RF = rows_RD.new_empty(len(rows_RD), weight_EDF.shape[2])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(rows_RD[start:end], weight_EDF[expert], out=product_RF[start:end])
        start = end
    product_RF[start:] = 0
    return product_RF


def _outer(rows_RD: Tensor, others_RF: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(rows_RD, others_RF):
        product_EDF = functional.grouped_mm(rows_RD.contiguous().T, others_RF.contiguous(), offs=ends_E.int())
        # The kernel need not write what has no rows.
        counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        return torch.where((counts_E > 0)[:, None, None], product_EDF, 0)
    product_EDF = rows_RD.new_empty(len(ends_E), rows_RD.shape[1], others_RF.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        torch.mm(rows_RD[start:end].T, others_RF[start:end], out=product_EDF[expert])
        start = end
    return product_EDF


def _product_shape(rows_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RD.new_empty(len(rows_RD), weight_EDF.shape[2])


def _outer_shape(rows_RD: Tensor, others_RF: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RD.new_empty(len(ends_E), rows_RD.shape[1], others_RF.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, gradient_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RD, weight_EDF, ends_E = ctx.saved_tensors
    of_rows = grouped_product(gradient_RF, weight_EDF.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    of_weight = grouped_outer(rows_RD, gradient_RF, ends_E) if ctx.needs_input_grad[1] else None
    return of_rows, of_weight, None


# Not by `torch.library.custom_op`, whose first call imports torch's compiler: seconds, for every worker.
for _name, _compute, _shape in (("grouped_product", _product, _product_shape), ("grouped_outer", _outer, _outer_shape)):
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"hardmoe::{_name}", _shape, lib=_LIBRARY)
torch.library.register_autograd("hardmoe::grouped_product", _product_gradients, setup_context=_keep, lib=_LIBRARY)


@register_flop_formula(torch.ops.hardmoe.grouped_product)
def _product_flops(rows: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Of all rows, the largest number there can be."""
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.hardmoe.grouped_outer)
def _outer_flops(rows: torch.Size, others: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * others[1]


def _has_kernel(first: Tensor, second: Tensor) -> bool:
    """Whether torch's grouped kernel takes these: bfloat16 on a GPU, and rows of whole 16 bytes."""
    if first.device.type != "cuda" or first.dtype != torch.bfloat16:
        return False
    return all(size * each.element_size() % _ALIGNMENT == 0 for each in (first, second) for size in each.shape[-2:][-1:]) and (
        second.ndim == 2 or second.shape[1] * second.element_size() % _ALIGNMENT == 0
    )
