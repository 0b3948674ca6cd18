"""The three dispatches against each other and against every expert on every item."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_parts import GATES, mlp_experts, mlp_layer, route_gates
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hardmoe.models.moe.experts.base import PaddedRows, SortedRows
from hardmoe.models.moe.grouped import grouped_outer, grouped_product
from hardmoe.models.moe.layer import DISPATCHES, MoeLayer, Plan
from hardmoe.models.moe.routing import Routing
from hardmoe.models.moe.statistics import observed

TOLERANCE = 1e-10


def _gradients(layer: MoeLayer, images: Tensor, name: str) -> dict[str, Tensor]:
    """Output and gradients of inputs, router and experts under one dispatch."""
    given_BTD = images.clone().requires_grad_()
    layer.dispatch = DISPATCHES[name]()
    layer.zero_grad()
    torch.manual_seed(0)
    outputs = layer(given_BTD)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    (outputs * weights).sum().backward()
    found = {"y": outputs.detach(), "dx": torch.zeros_like(images) if given_BTD.grad is None else given_BTD.grad}
    for parameter_name, parameter in layer.named_parameters():
        found[parameter_name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def _assert_alike(layer: MoeLayer, images: Tensor) -> None:
    found = [_gradients(layer, images, name) for name in DISPATCHES]
    for other in found[1:]:
        for key in found[0]:
            assert torch.allclose(found[0][key], other[key], atol=TOLERANCE, rtol=0), key


@settings(max_examples=60)
@given(st.data())
def test_dispatches_agree_in_outputs_and_all_gradients(data: st.DataObject) -> None:
    draw = data.draw
    num_experts = draw(st.integers(1, 6))
    plan = Plan(
        k=draw(st.integers(1, num_experts)),
        capacity_factor=draw(st.sampled_from([0.0, 0.1, 0.5, 1.05, 4.0])),
        priority=draw(st.booleans()),
        group_images=draw(st.integers(1, 4)),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    dim = draw(st.integers(1, 6))
    layer = mlp_layer(plan, dim=dim, num_experts=num_experts, noise=draw(st.sampled_from([0.0, 1.0]))).train()
    _assert_alike(layer, torch.randn(draw(st.integers(1, 7)), draw(st.integers(1, 9)), dim, dtype=torch.float64))


@pytest.mark.parametrize("priority", [False, True])
def test_dispatches_agree_where_experts_are_empty(priority: bool) -> None:
    layer = mlp_layer(Plan(k=1, capacity_factor=1.0, priority=priority)).train()
    with torch.no_grad():
        layer.router.scores.weight_ED[1:] = 0
        layer.router.scores.weight_ED[0] = torch.tensor([50.0, 0, 0, 0, 0])
    images = torch.randn(3, 5, 5, dtype=torch.float64).abs()
    with observed(layer) as usages:
        _assert_alike(layer, images)
    assert usages[""].summary()["living_experts"] == 1


def test_dispatches_agree_where_everything_is_dropped() -> None:
    layer, images = mlp_layer(Plan(k=2)), torch.randn(1, 6, 5, dtype=torch.float64)
    routing = layer.router(images, torch.ones(1, 6, dtype=torch.bool), layer.limits(6))
    nothing = Routing(**{**routing.__dict__, "kept_GSk": torch.zeros_like(routing.kept_GSk)})
    for name in DISPATCHES:
        outputs = DISPATCHES[name]()(images, nothing, layer.experts)
        assert torch.equal(outputs, torch.zeros_like(images)), name
        layer.zero_grad()
        outputs.sum().backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in layer.experts.parameters()), name


def test_without_a_limit_all_agree_with_every_expert_on_every_item() -> None:
    layer, images = mlp_layer(Plan(k=2)).eval(), torch.randn(3, 4, 5, dtype=torch.float64)
    gates = torch.softmax(layer.router.scores(images), -1)
    kept = gates * (gates >= gates.topk(2, dim=-1).values[..., -1:])
    every = layer.experts(PaddedRows(images.flatten(0, 1).expand(4, -1, -1), torch.ones(4, 12, dtype=torch.bool)))
    expected = torch.einsum("bte,ebtd->btd", kept, every.view(4, 3, 4, 5))
    for name in DISPATCHES:
        layer.dispatch = DISPATCHES[name]()
        assert torch.allclose(layer(images), expected, atol=TOLERANCE, rtol=0), name


@pytest.mark.parametrize("num_experts", [1, 3])
def test_experts_that_are_alike_are_one_dense_network_when_all_are_asked(num_experts: int) -> None:
    layer = mlp_layer(Plan(k=num_experts), num_experts=num_experts, alike=True).eval()
    images, experts = torch.randn(2, 6, 5, dtype=torch.float64), layer.experts
    hidden = nn.functional.gelu(images @ experts.weight1_EDF[0] + experts.bias1.view(num_experts, -1)[0])
    dense = hidden @ experts.weight2_EFO[0] + experts.bias2.view(num_experts, -1)[0]
    assert torch.allclose(layer(images), dense, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatch_compiles_into_one_graph_and_agrees(name: str) -> None:
    plan = Plan(k=2, capacity_factor=0.7, inference_capacity_factor=0.7, priority=True, group_images=2)
    layer, images = mlp_layer(plan).train(), torch.randn(3, 6, 5, dtype=torch.float64)
    expected = _gradients(layer, images, name)
    torch._dynamo.reset()
    layer.dispatch = DISPATCHES[name]()
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given_BTD = images.clone().requires_grad_()
    outputs = compiled(given_BTD)
    (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
    assert torch.allclose(outputs, expected["y"], atol=TOLERANCE, rtol=0)
    assert torch.allclose(given_BTD.grad, expected["dx"], atol=TOLERANCE, rtol=0)
    for parameter_name, parameter in layer.named_parameters():
        assert torch.allclose(parameter.grad, expected[parameter_name], atol=TOLERANCE, rtol=0), parameter_name


@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatch_exports_and_agrees(name: str) -> None:
    layer = mlp_layer(Plan(k=2, inference_capacity_factor=0.7, dispatch=name)).eval()
    images, other = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    exported = torch.export.export(layer, (images,)).module()
    for given_BTD in (images, other):
        assert torch.allclose(exported(given_BTD), layer(given_BTD), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(DISPATCHES, [torch.float32, torch.bfloat16])])
def test_autocast_gives_the_inputs_dtype_and_two_digits(name: str, dtype: torch.dtype) -> None:
    layer = mlp_layer(Plan(k=2, inference_capacity_factor=1.0, dispatch=name), dim=16).eval().float()
    images = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = layer(images.float()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(images).detach()
    assert outputs.dtype == dtype
    scale = float(reference.abs().max())
    assert float((outputs.float() - reference).abs().max()) <= 2e-2 * scale


@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(DISPATCHES, [torch.bfloat16, torch.float32, torch.float64])])
def test_dispatch_gives_the_items_dtype_whatever_experts_compute_in(name: str, dtype: torch.dtype) -> None:
    """Without autocast too: weights are in float32, experts in bfloat16, and neither decides what comes out."""

    def doubled(rows: PaddedRows | SortedRows) -> Tensor:
        return 2 * (rows.rows_ENX if isinstance(rows, PaddedRows) else rows.rows_RX).bfloat16()

    routing = route_gates(torch.tensor(GATES), k=2, capacity=3, priority=False)
    items_GSX = torch.arange(1.0, 7.0, dtype=dtype).view(1, 3, 2).requires_grad_()
    outputs_GSX = DISPATCHES[name]()(items_GSX, routing, doubled)
    assert outputs_GSX.dtype == dtype
    weights_S1 = torch.tensor([[0.4 + 0.2], [0.5 + 0.4], [0.6 + 0.3]])
    assert torch.allclose(outputs_GSX[0].float(), 2 * weights_S1 * items_GSX[0].detach().float(), rtol=1e-2)
    (gradient_GSX,) = torch.autograd.grad(outputs_GSX.sum(), items_GSX)
    assert gradient_GSX.dtype == dtype
    assert torch.allclose(gradient_GSX[0].float(), 2 * weights_S1.expand(3, 2), rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatch_on_a_gpu_agrees_with_the_cpu(name: str) -> None:
    plan = Plan(k=2, capacity_factor=1.05, priority=True, dispatch=name)
    layer, images = mlp_layer(plan, dim=16).train(), torch.randn(5, 64, 16, dtype=torch.float64)
    expected = _gradients(layer, images, name)
    layer = layer.cuda()
    found = _gradients(layer, images.cuda(), name)
    for key, value in expected.items():
        assert torch.allclose(found[key].cpu(), value, atol=1e-9, rtol=0), key
    reference = layer.float()(images.cuda().float())
    with torch.autocast("cuda", torch.bfloat16):
        outputs = layer(images.cuda().float())
    assert float((outputs - reference).abs().max()) <= 2e-2 * float(reference.abs().max())


@pytest.mark.gpu
def test_grouped_products_on_a_gpu_use_the_kernel_and_agree() -> None:
    rows, others = (torch.randn(96, width, device="cuda", dtype=torch.bfloat16) for width in (64, 32))
    weight, ends = torch.randn(4, 64, 32, device="cuda", dtype=torch.bfloat16), torch.tensor([10, 10, 70, 80], device="cuda")
    slow = grouped_product(rows.double(), weight.double(), ends)
    assert torch.allclose(grouped_product(rows, weight, ends).double(), slow, atol=0.3, rtol=2e-2)
    slow = grouped_outer(rows.double(), others.double(), ends)
    assert torch.allclose(grouped_outer(rows, others, ends).double(), slow, atol=0.5, rtol=2e-2)


def test_grouped_products_pass_torchs_own_checks() -> None:
    rows, weight = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    ends = torch.tensor([2, 2, 5])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hardmoe.grouped_product.default, (rows.requires_grad_(), weight.requires_grad_(), ends), test_utils=checks
    )
    found = grouped_product(rows, weight, ends)
    expected = torch.cat([rows[:2] @ weight[0], rows[2:5] @ weight[2], torch.zeros(2, 2, dtype=torch.float64)])
    assert torch.allclose(found, expected)
    assert torch.autograd.gradcheck(lambda r, w: grouped_product(r, w, ends), (rows, weight))


def test_rows_that_experts_compute_are_counted_exactly() -> None:
    """Sorted rows are those that are kept; slots are all that there are; and operations go with them."""
    images = torch.randn(4, 49, 16, dtype=torch.float64)
    for factor in (0.5, 1.0, 1.05):
        layer = mlp_layer(Plan(k=2, inference_capacity_factor=factor, group_images=4), dim=16, num_experts=8).eval()
        rows: dict[str, int] = {}
        run = layer.experts.forward

        def count(given: PaddedRows | SortedRows, rows: dict[str, int] = rows, run=run) -> Tensor:  # type: ignore[no-untyped-def]
            padded = isinstance(given, PaddedRows)
            rows["n"] = given.filled_EN.numel() if padded else int(given.ends_E[-1])
            rows["kept"] = int(given.filled_EN.sum()) if padded else rows["n"]
            return run(given)

        layer.experts.forward = count
        capacity = layer.limits(196).capacity
        for name in DISPATCHES:
            layer.dispatch = DISPATCHES[name]()
            with FlopCounterMode(display=False) as counter:
                layer(images)
            assert rows["kept"] <= min(2 * 196, 8 * capacity) <= 1.05 * 2 * 196 + 4 * 8
            assert rows["n"] == (rows["kept"] if name == "grouped" else 8 * capacity)
            of_experts = 2 * 2 * 16 * 7 * (min(2 * 196, 8 * capacity) if name == "grouped" else 8 * capacity)
            of_router = 2 * 196 * 16 * 8
            of_einsum = 2 * 2 * 196 * 8 * capacity * 16 if name == "einsum" else 0
            assert counter.get_total_flops() - of_experts - of_router in {of_einsum, of_einsum + 2 * 196 * 2 * 8 * capacity}


def test_experts_in_both_layouts_are_the_same_networks() -> None:
    experts = mlp_experts(5, 7, 3)
    rows = torch.randn(3, 4, 5, dtype=torch.float64)
    padded = experts(PaddedRows(rows, torch.ones(3, 4, dtype=torch.bool)))
    ends = torch.tensor([4, 8, 12])
    in_order = experts(SortedRows(rows.flatten(0, 1), torch.arange(3).repeat_interleave(4), ends))
    assert torch.allclose(padded.flatten(0, 1), in_order, atol=TOLERANCE)
